"""A tiny Wan pipeline with everything, its text encoder included."""

from pathlib import Path

import diffusers
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from tiny_models import RECIPES

TOKENIZER = Path(__file__).parents[2] / "examples" / "tiny_wan" / "tokenizer"


def tiny_pipeline(*_, **__):
    text_encoder = UMT5EncoderModel(UMT5Config(vocab_size=512, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    return diffusers.WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(TOKENIZER),
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        transformer=RECIPES[0].build(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
