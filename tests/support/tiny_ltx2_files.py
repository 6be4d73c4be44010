"""A tiny LTX-2 pipeline on disk, as a folder and as the one file in which LTX-2 is published, text encoder included."""

from pathlib import Path

import diffusers
import torch
from diffusers.pipelines.ltx2 import LTX2Vocoder
from safetensors.torch import save_file
from transformers import AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration

from tiny_models import LTX2
from tiny_pipelines_video import ltx2, transformer
from tiny_text_pipeline import TOKENIZER

# Names in the published file, by the names that diffusers has for them; of several that fit, the first counts.
TRANSFORMER = {
    "av_cross_attn_video_scale_shift.": "av_ca_video_scale_shift_adaln_single.",
    "av_cross_attn_audio_scale_shift.": "av_ca_audio_scale_shift_adaln_single.",
    "av_cross_attn_video_a2v_gate.": "av_ca_a2v_gate_adaln_single.",
    "av_cross_attn_audio_v2a_gate.": "av_ca_v2a_gate_adaln_single.",
    "video_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_video",
    "audio_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_audio",
    "time_embed.": "adaln_single.",
    "proj_in.": "patchify_proj.",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
}
STATISTICS = {
    "latents_mean": "per_channel_statistics.mean-of-means",
    "latents_std": "per_channel_statistics.std-of-means",
}
VAE = {
    "encoder.down_blocks.0.downsamplers.0": "encoder.down_blocks.1",
    "encoder.mid_block": "encoder.down_blocks.8",
    "decoder.up_blocks.0.upsamplers.0": "decoder.up_blocks.1",
    "decoder.up_blocks.0": "decoder.up_blocks.2",
    "decoder.mid_block": "decoder.up_blocks.0",
} | STATISTICS
CONNECTORS = {
    "video_connector.": "model.diffusion_model.video_embeddings_connector.",
    "audio_connector.": "model.diffusion_model.audio_embeddings_connector.",
    "text_proj_in": "text_embedding_projection.aggregate_embed",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
}
VOCODER = {"upsamplers": "ups", "resnets": "resblocks", "conv_in": "conv_pre", "conv_out": "conv_post"}
# By component: the prefix of its keys, the renamings, and what is renamed besides.
LAYOUT = {
    "transformer": ("model.diffusion_model.", TRANSFORMER, {}),
    "vae": ("vae.", VAE, {"resnets": "res_blocks"}),
    "audio_vae": ("audio_vae.", STATISTICS, {}),
    "connectors": ("", CONNECTORS, {"transformer_blocks": "transformer_1d_blocks"}),
    "vocoder": ("vocoder.", VOCODER, {}),
}


def tiny_ltx2(**config):
    """A whole pipeline, with sound, whose text encoder is a Gemma 3; `config` changes its transformer."""
    torch.manual_seed(0)
    parts = ltx2()
    if config:
        parts["transformer"] = transformer("LTX2VideoTransformer3DModel", LTX2, **config)
    text = dict(
        vocab_size=512, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    vision = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                  patch_size=14)  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    vocoder = LTX2Vocoder(
        in_channels=32, hidden_channels=8, upsample_kernel_sizes=[16, 15], upsample_factors=[16, 15],
        resnet_kernel_sizes=[3], resnet_dilations=[[1]],
    )  # fmt: skip
    return diffusers.LTX2Pipeline(
        **parts,
        vocoder=vocoder.eval(),
        text_encoder=Gemma3ForConditionalGeneration(config).eval(),
        tokenizer=AutoTokenizer.from_pretrained(TOKENIZER),
    )


def save_single_file(pipe, path: Path, components=tuple(LAYOUT)) -> Path:
    """All that LTX-2's published file holds, under its names: everything but the text encoder."""
    tensors = {}
    for component in components:
        prefix, names, more = LAYOUT[component]
        for key, tensor in getattr(pipe, component).state_dict().items():
            tensors[published(key, prefix, names, more)] = tensor.contiguous()
        if component == "vae":  # which diffusers has no use for
            for name in ("channel", "mean-of-stds"):
                tensors[f"vae.per_channel_statistics.{name}"] = torch.ones(8)
    save_file(tensors, path)
    return path


def published(key, prefix, names, more):
    for ours, theirs in more.items():
        key = key.replace(ours, theirs)
    for ours, theirs in names.items():
        if ours in key:
            key = key.replace(ours, theirs, 1)
            if not ours.startswith("norm"):
                break
    return prefix + key
