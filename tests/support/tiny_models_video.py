"""Recipes of the families whose self-attention sees video tokens only."""

import importlib
import importlib.util
import types

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
from diffusers.utils import is_torchvision_available

WAN_LIKE = dict(
    num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32,
    num_layers=2,
)  # fmt: skip
ALLEGRO_HEAD_DIM = 24

# Cosmos resizes its padding mask with torchvision, which has no build for every torch: this does the same.
if not is_torchvision_available():
    modules = ("diffusers.models.transformers.transformer_cosmos", "diffusers.models.controlnets.controlnet_cosmos")
    for module in filter(importlib.util.find_spec, modules):
        importlib.import_module(module).transforms = types.SimpleNamespace(
            functional=types.SimpleNamespace(resize=lambda mask, size, interpolation: F.interpolate(mask, size)),
            InterpolationMode=types.SimpleNamespace(NEAREST=None),
        )


def text_to_video(grid, channels=4, batch=2):
    return dict(
        hidden_states=torch.randn(batch, channels, *grid),
        timestep=torch.tensor([700] * batch),
        encoder_hidden_states=torch.randn(batch, 8, 16),
    )


def image_to_video(grid, channels=9):
    # The cross-attention takes the last 512 tokens as text, whatever precedes them as image tokens.
    return text_to_video(grid, channels) | dict(
        encoder_hidden_states=torch.randn(2, 512, 16), encoder_hidden_states_image=torch.randn(2, 5, 20)
    )


def diffusion_forcing(grid):
    """Every latent frame has a noise level of its own, and the frame rate is an input."""
    levels = torch.randint(0, 1000, (1, grid[0]))
    return text_to_video(grid, batch=1) | dict(timestep=levels, enable_diffusion_forcing=True, fps=[1])


def animate(grid):
    """The first latent frame is the reference image; pose and face videos cover the others."""
    frames = grid[0] - 1
    return image_to_video(grid, channels=12) | dict(
        pose_hidden_states=torch.randn(2, 4, frames, *grid[1:]),
        face_pixel_values=torch.rand(2, 3, 4 * (frames - 1) + 1, 16, 16),
    )


def anyflow(grid):
    frames, height, width = grid
    return dict(
        hidden_states=torch.randn(2, frames, 4, height, width),
        timestep=torch.full((2, frames), 700.0),
        r_timestep=torch.full((2, frames), 500.0),
        encoder_hidden_states=torch.randn(2, 8, 16),
    )


def anyflow_image(grid):
    return anyflow(grid) | dict(encoder_hidden_states_image=torch.randn(2, 5, 20))


def cosmos(grid, channels=4):
    return dict(
        hidden_states=torch.randn(2, channels, *grid),
        timestep=torch.tensor([700.0, 700.0]),
        encoder_hidden_states=torch.randn(2, 8, 16),
        attention_mask=torch.tensor([[True] * 8, [True] * 5 + [False] * 3]),
        fps=24,
        padding_mask=torch.zeros(1, 1, grid[1] * 8, grid[2] * 8),
    )


def cosmos_conditioned(grid):
    """Predict 2: a mask channel says which frames are given, and every frame has a noise level of its own."""
    return cosmos(grid) | dict(
        condition_mask=torch.zeros(2, 1, *grid).index_fill(2, torch.tensor([0]), 1.0),
        timestep=torch.full((2, 1, grid[0], 1, 1), 0.7),
    )


def cosmos_transfer(grid):
    """Transfer 2.5: text and image context, and residuals of the ControlNet."""
    tokens = grid[0] * (grid[1] // 2) * (grid[2] // 2)
    return cosmos_conditioned(grid) | dict(
        encoder_hidden_states=(torch.randn(2, 8, 16), torch.randn(2, 6, 20)),
        attention_mask=None,
        block_controlnet_hidden_states=[torch.randn(2, tokens, 64)],
    )


def cosmos_controlnet(grid):
    inputs = cosmos_conditioned(grid)
    latents = inputs.pop("hidden_states")
    return inputs | dict(
        controls_latents=torch.randn(2, 4, *grid), latents=latents, conditioning_scale=[1.0, 0.5], fps=24
    )


def allegro(grid):
    frames, height, width = grid[0], grid[1] // 2, grid[2] // 2
    *frequencies, t, h, w = get_3d_rotary_pos_embed_allegro(
        ALLEGRO_HEAD_DIM, ((0, 0), (height, width)), (height, width), frames, (2.2, 2.0, 2.0)
    )
    positions = torch.cartesian_prod(t.long(), h.long(), w.long()).unbind(-1)
    return text_to_video(grid) | dict(
        encoder_attention_mask=torch.tensor([[1] * 8, [1] * 5 + [0] * 3]),
        image_rotary_emb=(tuple(frequencies), tuple(each[None] for each in positions)),
    )


def kandinsky5(grid, channels=4):
    frames, height, width = grid
    return dict(
        hidden_states=torch.randn(2, frames, height, width, channels),
        encoder_hidden_states=torch.randn(2, 8, 16),
        timestep=torch.tensor([700.0, 700.0]),
        pooled_projections=torch.randn(2, 16),
        visual_rope_pos=[torch.arange(frames), torch.arange(height // 2), torch.arange(width // 2)],
        text_rope_pos=torch.arange(8),
        scale_factor=(1.0, 2.0, 2.0),
    )


def kandinsky5_image(grid):
    """Image to video: noise, image latents and a mask side by side."""
    return kandinsky5(grid, channels=9)


def kandinsky6(grid, audio=11):
    """Video and audio, the last latent frame the reference image at the first one's position."""
    frames, height, width = grid
    return dict(
        hidden_states=torch.randn(2, frames, height, width, 9),
        encoder_hidden_states=torch.randn(2, 8, 16),
        pooled_projections=torch.randn(2, 16),
        timestep=torch.tensor([700.0, 700.0]),
        audio_hidden_states=torch.randn(2, audio, 6),
        visual_rope_pos=(torch.arange(frames) % (frames - 1), torch.arange(height // 2), torch.arange(width // 2)),
        encoder_attention_mask=torch.tensor([[True] * 8, [True] * 5 + [False] * 3])[:, None, None],
        visual_token_type_ids=torch.tensor([[0] * (frames - 1) + [1]] * 2),
    )


COSMOS = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=32, num_layers=2, mlp_ratio=2,
    text_embed_dim=16, adaln_lora_dim=4, max_size=(8, 32, 32),
)  # fmt: skip
COSMOS_CONTROLNET = dict(
    n_controlnet_blocks=2, in_channels=8, latent_channels=6, model_channels=64, num_attention_heads=2,
    attention_head_dim=32, mlp_ratio=2, text_embed_dim=16, adaln_lora_dim=4, max_size=(8, 32, 32),
)  # fmt: skip
KANDINSKY5 = dict(
    in_visual_dim=4, in_text_dim=16, in_text_dim2=16, time_dim=16, out_visual_dim=4, model_dim=64, ff_dim=64,
    num_text_blocks=1, num_visual_blocks=2, axes_dims=(8, 12, 12),
)  # fmt: skip
KANDINSKY6 = dict(
    in_visual_dim=4, in_text_dim=16, in_text_dim2=16, time_dim=16, out_visual_dim=4, model_dim=64, ff_dim=64,
    num_text_blocks=1, num_visual_blocks=2, axes_dims=(8, 12, 12), in_audio_dim=6, out_audio_dim=6,
    text_token_padding=True, ca_rope=True, cross_gates=True, fix_modulation=True, visual_token_type_num_embeddings=2,
)  # fmt: skip
COSMOS2 = COSMOS | dict(in_channels=5, extra_pos_embed_type=None)
COSMOS_TRANSFER = COSMOS2 | dict(
    controlnet_block_every_n=2, img_context_dim_in=20, img_context_num_tokens=6, img_context_dim_out=64
)
ALLEGRO = dict(
    num_attention_heads=2, attention_head_dim=ALLEGRO_HEAD_DIM, in_channels=4, out_channels=4, num_layers=2,
    cross_attention_dim=48, caption_channels=16, sample_height=10, sample_width=12, sample_frames=5,
)  # fmt: skip
IMAGE = dict(in_channels=9, image_dim=20, added_kv_proj_dim=64)
ANIMATE = WAN_LIKE | dict(
    in_channels=12, latent_channels=4, image_dim=20, added_kv_proj_dim=64, motion_encoder_size=16, motion_style_dim=8,
    motion_dim=4, motion_encoder_dim=8, face_encoder_hidden_dim=8, face_encoder_num_heads=2,
    inject_face_latents_blocks=2, motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
)  # fmt: skip


def recipe(name, cls, config, inputs, sparse=2, dense=2, **more):
    return dict(more, name=name, cls=cls, config=config, inputs=inputs, patch=(1, 2, 2), sparse=sparse, dense=dense)


def kandinsky5_recipe(name, config, inputs):
    return recipe(
        name, "Kandinsky5Transformer3DModel", config, inputs, dense=3, projections=("to_query", "to_key", "to_value")
    )


VIDEO_RECIPES = [
    recipe("skyreels-v2", "SkyReelsV2Transformer3DModel", WAN_LIKE, text_to_video),
    recipe("skyreels-v2-i2v", "SkyReelsV2Transformer3DModel", WAN_LIKE | IMAGE, image_to_video),
    recipe(
        "skyreels-v2-df", "SkyReelsV2Transformer3DModel", WAN_LIKE | dict(inject_sample_info=True), diffusion_forcing
    ),
    recipe("wan-animate", "WanAnimateTransformer3DModel", ANIMATE, animate, dense=3),
    recipe("chronoedit", "ChronoEditTransformer3DModel", WAN_LIKE | IMAGE, image_to_video),
    recipe("anyflow", "AnyFlowTransformer3DModel", WAN_LIKE, anyflow),
    recipe("anyflow-image", "AnyFlowTransformer3DModel", WAN_LIKE | dict(image_dim=20), anyflow_image),
    recipe("cosmos-1", "CosmosTransformer3DModel", COSMOS, cosmos, tags=("legacy",)),
    recipe("cosmos-predict2", "CosmosTransformer3DModel", COSMOS2, cosmos_conditioned, tags=("legacy",)),
    recipe("cosmos-transfer2.5", "CosmosTransformer3DModel", COSMOS_TRANSFER, cosmos_transfer, tags=("legacy",)),
    recipe("cosmos-controlnet", "CosmosControlNetModel", COSMOS_CONTROLNET, cosmos_controlnet, tags=("legacy",)),
    recipe("allegro", "AllegroTransformer3DModel", ALLEGRO, allegro, tags=("legacy",)),
    kandinsky5_recipe("kandinsky5", KANDINSKY5, kandinsky5),
    kandinsky5_recipe("kandinsky5-i2v", KANDINSKY5 | dict(visual_cond=True), kandinsky5_image),
    recipe(
        "kandinsky6", "Kandinsky6Transformer3DModel", KANDINSKY6, kandinsky6, dense=12,
        projections=("to_query", "to_key", "to_value"),
    ),
]  # fmt: skip
