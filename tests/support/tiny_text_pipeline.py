"""Tiny pipelines with everything, their text encoders included, as users load them from disk."""

from pathlib import Path

import diffusers
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tiny_models import RECIPES
from tiny_pipelines_joint import hunyuan_parts, transformer

TOKENIZER = Path(__file__).parents[2] / "examples" / "tiny_wan" / "tokenizer"


def tiny_pipeline(*_, **more):
    """Wan 2.1; two experts with `experts=2`."""
    text_encoder = UMT5EncoderModel(UMT5Config(vocab_size=512, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    vae = diffusers.AutoencoderKLWan(
        base_dim=2, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    second = dict(transformer_2=RECIPES[0].build(), boundary_ratio=0.875) if more.get("experts") == 2 else {}
    return diffusers.WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(TOKENIZER),
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        transformer=RECIPES[0].build(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        **second,
    )


def tiny_hunyuan_video():
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    parts = hunyuan_parts()  # seeds the generator
    size = dict(vocab_size=512, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
    encoders = dict(
        text_encoder=LlamaModel(LlamaConfig(hidden_size=16, num_key_value_heads=1, **size)).eval(),
        text_encoder_2=CLIPTextModel(CLIPTextConfig(hidden_size=8, **size)).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
    )
    return diffusers.HunyuanVideoPipeline(transformer=transformer("hunyuan-video"), **parts | encoders)
