"""The parts of the tiny Wan pipeline: stock diffusers and transformers classes with small configurations."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from procedural_video import vocabulary
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

# How to call the finished pipeline; also written beside it, as recommended.json.
RECOMMENDED = dict(
    prompt="a large yellow square moves down over purple stripes",
    negative_prompt="",
    num_inference_steps=20,
    guidance_scale=4.0,
    max_sequence_length=32,
    height=256,
    width=256,
    num_frames=61,
    seed=0,
)
LATENT_CHANNELS = 16
TEXT_WIDTH = 128
CAPTION_TOKENS = 16


def build_vae() -> AutoencoderKLWan:
    """8x8 spatial and 4x temporal compression, a factor two of it by pixel unshuffling, which is cheap."""
    return AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=24,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
    )


def build_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=128,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=256,
        ffn_dim=1024,
        num_layers=6,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per caption word; whatever else is written becomes the unknown token."""
    words = ["<pad>", "</s>", "<unk>", *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", words.index("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        padding_side="right",
    )


def build_text_encoder(tokenizer: PreTrainedTokenizerFast) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=64,
            d_ff=256,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def build_scheduler() -> UniPCMultistepScheduler:
    """The scheduler of the released Wan models."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )


def normalise_latents(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """From the VAE's scale to the zero mean and unit variance that the transformer works in."""
    mean, std = _latent_statistics(vae, latents)
    return (latents - mean) / std


def decode_latents(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Videos `[videos, 3, frames, height, width]` of the transformer's latents, as `WanPipeline` makes them."""
    mean, std = _latent_statistics(vae, latents)
    return vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0].float()


def _latent_statistics(vae: AutoencoderKLWan, latents: torch.Tensor) -> list[torch.Tensor]:
    values = (vae.config.latents_mean, vae.config.latents_std)
    return [torch.tensor(each, device=latents.device).view(1, -1, 1, 1, 1) for each in values]


class TinyWan(nn.Module):
    """Transformer and text encoder, trained together."""

    def __init__(self):
        super().__init__()
        self.tokenizer = build_tokenizer()
        self.text_encoder = build_text_encoder(self.tokenizer)
        self.transformer = build_transformer()
        nn.init.zeros_(self.transformer.proj_out.weight)

    def embed(self, captions: list[str], padded_length: int) -> torch.Tensor:
        """As `WanPipeline` does: encode, then zeros up to the padded length."""
        tokens = self.tokenizer(captions, padding="max_length", max_length=CAPTION_TOKENS, return_tensors="pt")
        ids, mask = (tokens[name].to(self.text_encoder.device) for name in ("input_ids", "attention_mask"))
        embeds = self.text_encoder(ids, mask).last_hidden_state * mask.unsqueeze(-1)
        return F.pad(embeds, (0, 0, 0, padded_length - CAPTION_TOKENS))

    def loss(self, latents: torch.Tensor, captions: list[str], shift: float, padded_length: int) -> torch.Tensor:
        """Flow matching with logit-normal times (arXiv 2403.03206), moved towards noise for large grids."""
        time = torch.sigmoid(torch.randn(len(latents), device=latents.device))
        time = shift * time / (1 + (shift - 1) * time)
        noise = torch.randn_like(latents)
        noisy = torch.lerp(latents, noise, time.view(-1, 1, 1, 1, 1))
        velocity = self.transformer(noisy, 1000 * time, self.embed(captions, padded_length), return_dict=False)[0]
        return F.mse_loss(velocity.float(), noise - latents)


def save_pipeline(folder: Path, vae: AutoencoderKLWan, model: TinyWan) -> None:
    """Write everything that `WanPipeline.from_pretrained` needs, and the settings that suit it."""
    pipeline = WanPipeline(
        tokenizer=model.tokenizer,
        text_encoder=model.text_encoder.cpu(),
        vae=vae.cpu(),
        scheduler=build_scheduler(),
        # Half the size on disk; without `dtype` it is loaded as fp32 all the same.
        transformer=model.transformer.cpu().half(),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    # transformers 5 writes a class name that 4 does not know; both know this one.
    _edit(folder / "model_index.json", tokenizer=["transformers", "PreTrainedTokenizerFast"])
    _edit(folder / "tokenizer" / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    # Otherwise the folder that the VAE was trained in.
    _edit(folder / "vae" / "config.json", _name_or_path="")
    (folder / "recommended.json").write_text(json.dumps(RECOMMENDED, indent=2) + "\n")


def _edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2) + "\n")
