"""Recipes of the families in which video and text share one attention."""

import torch

TEXT = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])


def rotary(tokens, dim):
    """Cosines and sines `[tokens, dim]` of random angles, each repeated for its pair of channels."""
    angles = torch.rand(tokens, dim // 2).mul(6).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def hunyuan_inputs(grid, channels=4):
    return dict(
        hidden_states=torch.randn(2, channels, *grid),
        timestep=torch.tensor([700, 700]),
        encoder_hidden_states=torch.randn(2, 9, 16),
        encoder_attention_mask=TEXT,
        pooled_projections=torch.randn(2, 8),
        guidance=torch.tensor([6000.0, 6000.0]),
    )


def hunyuan_concat_inputs(grid):
    return hunyuan_inputs(grid, channels=9) | dict(guidance=None)


def framepack_inputs(grid, batch=2):
    frames, height, width = grid
    history = {"clean": 2, "history_2x": 2, "history_4x": 5}
    inputs = {name: value[:batch] for name, value in hunyuan_inputs(grid).items()}
    inputs |= {f"latents_{name}": torch.randn(batch, 4, count, height, width) for name, count in history.items()}
    inputs |= {f"indices_latents_{name}": torch.arange(count) for name, count in history.items()}
    mask = TEXT[2 - batch :]
    return inputs | dict(
        indices_latents=torch.arange(9, 9 + frames),
        image_embeds=torch.randn(batch, 3, 20),
        encoder_attention_mask=mask,
    )


def framepack_one_inputs(grid):
    """One batch item: the model trims the padded text and passes no mask."""
    return framepack_inputs(grid, batch=1)


def hunyuan15_inputs(grid):
    return dict(
        hidden_states=torch.randn(2, 9, *grid),
        timestep=torch.tensor([700.0, 700.0]),
        encoder_hidden_states=torch.randn(2, 9, 16),
        encoder_attention_mask=TEXT,
        encoder_hidden_states_2=torch.randn(2, 6, 12),
        encoder_attention_mask_2=torch.tensor([[1] * 3 + [0] * 3, [0] * 6]),
        image_embeds=torch.randn(2, 5, 20),
    )


def hunyuan15_text_inputs(grid):
    """Text-to-video: the image embeddings are all zeros, and masked."""
    return hunyuan15_inputs(grid) | dict(image_embeds=torch.zeros(2, 5, 20), timestep_r=torch.tensor([500.0, 500.0]))


def cogvideox_inputs(grid, frames=None, channels=4):
    frames = frames or grid[0]
    return dict(
        hidden_states=torch.randn(2, frames, channels, *grid[1:]),
        encoder_hidden_states=torch.randn(2, 9, 16),
        timestep=torch.tensor([700, 700]),
    )


def cogvideox_5b_inputs(grid, channels=4):
    tokens = grid[0] * (grid[1] // 2) * (grid[2] // 2)
    return cogvideox_inputs(grid, channels=channels) | dict(image_rotary_emb=rotary(tokens, 32))


def cogvideox15_inputs(grid):
    """The pipelines of 1.5 pad the latent frames to whole patches."""
    tokens = grid[0] // 2 * (grid[1] // 2) * (grid[2] // 2)
    return cogvideox_inputs(grid, frames=grid[0] // 2 * 2, channels=8) | dict(
        image_rotary_emb=rotary(tokens, 32), ofs=torch.tensor([2.0])
    )


def consisid_inputs(grid):
    return cogvideox_5b_inputs(grid, channels=8) | dict(id_cond=torch.randn(2, 2), id_vit_hidden=[torch.randn(2, 2, 2)])


def mochi_inputs(grid):
    return dict(
        hidden_states=torch.randn(2, 4, *grid),
        encoder_hidden_states=torch.randn(2, 9, 16),
        timestep=torch.tensor([700, 700]),
        encoder_attention_mask=TEXT.bool(),
    )


def mochi_empty_prompt_inputs(grid):
    """The pipeline zeroes the mask of an empty negative prompt."""
    return mochi_inputs(grid) | dict(encoder_attention_mask=TEXT.bool() & torch.tensor([[False], [True]]))


def easyanimate_inputs(grid):
    return dict(
        hidden_states=torch.randn(2, 4, *grid),
        timestep=torch.tensor([700, 700]),
        encoder_hidden_states=torch.randn(2, 9, 16),
        encoder_hidden_states_t5=torch.randn(2, 6, 12),
        inpaint_latents=torch.randn(2, 5, *grid),
        control_latents=torch.randn(2, 3, *grid),
    )


def motif_inputs(grid):
    return dict(
        hidden_states=torch.randn(2, 9, *grid),
        timestep=torch.tensor([700, 700]),
        encoder_hidden_states=torch.randn(2, 9, 16),
        encoder_attention_mask=TEXT,
        image_embeds=torch.randn(2, 5, 20),
    )


HUNYUAN = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=32, num_layers=1, num_single_layers=1,
    num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(8, 12, 12),
)  # fmt: skip
FRAMEPACK = HUNYUAN | dict(has_image_proj=True, image_proj_dim=20, has_clean_x_embedder=True)
HUNYUAN15 = dict(
    in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=32, num_layers=2, num_refiner_layers=1,
    text_embed_dim=16, text_embed_2_dim=12, image_embed_dim=20, rope_axes_dim=(8, 12, 12),
)  # fmt: skip
COGVIDEOX = dict(
    num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16,
    num_layers=2, sample_width=12, sample_height=10, sample_frames=17, max_text_seq_length=9,
)  # fmt: skip
COGVIDEOX_5B = COGVIDEOX | dict(use_rotary_positional_embeddings=True)
COGVIDEOX15 = COGVIDEOX_5B | dict(in_channels=8, patch_size_t=2, patch_bias=False, ofs_embed_dim=8)
CONSISID = COGVIDEOX_5B | dict(
    in_channels=8, is_train_face=True, cross_attn_interval=1, cross_attn_dim_head=1, cross_attn_num_heads=1,
    LFE_id_dim=2, LFE_vit_dim=2, LFE_depth=5, LFE_dim_head=8, LFE_num_heads=2, LFE_num_id_token=1, LFE_num_querie=1,
    LFE_output_dim=42, LFE_ff_mult=1, LFE_num_scale=1,
)  # fmt: skip
MOCHI = dict(
    num_attention_heads=2, attention_head_dim=32, num_layers=2, pooled_projection_dim=24, in_channels=4,
    text_embed_dim=16, time_embed_dim=8, max_sequence_length=9,
)  # fmt: skip
EASYANIMATE = dict(
    num_attention_heads=2, attention_head_dim=32, in_channels=12, out_channels=4, patch_size=2, num_layers=2,
    mmdit_layers=1, time_embed_dim=8, text_embed_dim=16, text_embed_dim_t5=12,
)  # fmt: skip
MOTIF = dict(
    in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=32, num_layers=1, num_single_layers=2,
    num_decoder_layers=1, text_embed_dim=16, image_embed_dim=20, rope_axes_dim=(8, 12, 12),
    enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True,
)  # fmt: skip


def recipe(name, cls, config, inputs, *, patch=(1, 2, 2), sparse=2, dense=0, tags=("legacy",), **rest):
    """Fields of a `Recipe`, with what most families have in common."""
    return rest | dict(
        name=name, cls=cls, config=config, inputs=inputs, patch=patch, sparse=sparse, dense=dense, tags=tags
    )  # fmt: skip


JOINT_RECIPES = [
    recipe("hunyuan-video", "HunyuanVideoTransformer3DModel", HUNYUAN, hunyuan_inputs, dense=1),
    recipe(
        "hunyuan-video-concat", "HunyuanVideoTransformer3DModel",
        HUNYUAN | dict(in_channels=9, guidance_embeds=False, image_condition_type="latent_concat"),
        hunyuan_concat_inputs, dense=1,
    ),
    recipe(
        "hunyuan-video-replace", "HunyuanVideoTransformer3DModel",
        HUNYUAN | dict(image_condition_type="token_replace"), hunyuan_inputs, dense=1,
    ),
    recipe("framepack", "HunyuanVideoFramepackTransformer3DModel", FRAMEPACK, framepack_inputs, dense=1),
    recipe("framepack-one", "HunyuanVideoFramepackTransformer3DModel", FRAMEPACK, framepack_one_inputs, dense=1),
    recipe(
        "hunyuan-video-1.5", "HunyuanVideo15Transformer3DModel", HUNYUAN15, hunyuan15_inputs, patch=(1, 1, 1), dense=1
    ),
    recipe(
        "hunyuan-video-1.5-text", "HunyuanVideo15Transformer3DModel", HUNYUAN15 | dict(use_meanflow=True),
        hunyuan15_text_inputs, patch=(1, 1, 1), dense=1,
    ),
    recipe("cogvideox-2b", "CogVideoXTransformer3DModel", COGVIDEOX, cogvideox_inputs),
    recipe("cogvideox-5b", "CogVideoXTransformer3DModel", COGVIDEOX_5B, cogvideox_5b_inputs),
    recipe("cogvideox-1.5", "CogVideoXTransformer3DModel", COGVIDEOX15, cogvideox15_inputs, patch=(2, 2, 2)),
    recipe("consisid", "ConsisIDTransformer3DModel", CONSISID, consisid_inputs),
    recipe("mochi", "MochiTransformer3DModel", MOCHI, mochi_inputs, tags=()),
    recipe("mochi-empty-prompt", "MochiTransformer3DModel", MOCHI, mochi_empty_prompt_inputs, tags=()),
    recipe("easyanimate", "EasyAnimateTransformer3DModel", EASYANIMATE, easyanimate_inputs),
    recipe(
        "motif-video", "MotifVideoTransformer3DModel", MOTIF, motif_inputs, sparse=3, dense=2,
        tags=("decoder",),
    ),
]  # fmt: skip
