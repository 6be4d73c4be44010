"""Tiny instances of every supported transformer, each with the inputs that its pipelines pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch

from tiny_models_context import CONTEXT_RECIPES
from tiny_models_joint import JOINT_RECIPES
from tiny_models_video import VIDEO_RECIPES


@dataclass(frozen=True)
class Recipe:
    """How to build one transformer class, and how to call it on a latent grid.

    Args:
        name: of the test case.
        cls: class name in diffusers.
        config: constructor arguments.
        inputs: from the latent grid `(frames, height, width)`, forward's keyword arguments.
        patch: latent cells per token along each axis.
        sparse: number of video self-attention modules.
        dense: number of other attention modules.
        tags: what some tests have to know.
        projections: names of the query, key and value projections.
    """

    name: str
    cls: str
    config: dict[str, Any]
    inputs: Callable[[tuple[int, int, int]], dict[str, Any]]
    patch: tuple[int, int, int]
    sparse: int
    dense: int
    tags: tuple[str, ...] = field(default=())
    projections: tuple[str, str, str] = ("to_q", "to_k", "to_v")

    def build(self) -> torch.nn.Module:
        torch.manual_seed(0)
        model = getattr(diffusers, self.cls)(**self.config).eval()
        # Larger query and key projections than at initialisation, so that attention is not nearly uniform.
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)  # zero-initialised branches would hide what attention does
            if name.endswith(tuple(f".{projection}.weight" for projection in self.projections[:2])):
                parameter.data.mul_(4)
            if name.endswith("history_key_scale"):  # Helios's history would drown the video
                parameter.data.normal_(-1)
        return model

    def is_available(self) -> bool:
        """Whether the installed diffusers has this class, in this configuration."""
        cls = getattr(diffusers, self.cls, None)
        return cls is not None and self.config.keys() <= inspect.signature(cls.__init__).parameters.keys()

    def video_shape(self, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        return tuple(extent // patch for extent, patch in zip(grid, self.patch, strict=True))


def call(model: torch.nn.Module, recipe: Recipe, grid: tuple[int, int, int]) -> torch.Tensor:
    """The model's (video) output on fixed random inputs."""
    torch.manual_seed(1)
    output = model(**recipe.inputs(grid), return_dict=False)[0]
    return torch.stack(list(output)) if isinstance(output, (list, tuple)) else output


def run(model: torch.nn.Module, recipe: Recipe, grid: tuple[int, int, int]) -> torch.Tensor:
    """The same without gradients."""
    with torch.no_grad():
        return call(model, recipe, grid)


def diffusers_class(name: str) -> type | None:
    """A class of diffusers, or `None` where this diffusers, or what it needs for the class, is not installed."""
    try:
        return getattr(diffusers, name, None)
    except RuntimeError as error:
        if isinstance(error.__cause__, ImportError):
            return None
        raise


WAN = dict(
    num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32,
    num_layers=2,
)  # fmt: skip


def wan_inputs(grid, channels=4, batch=2):
    return dict(
        hidden_states=torch.randn(batch, channels, *grid),
        timestep=torch.tensor([700] * batch),
        encoder_hidden_states=torch.randn(batch, 8, 16),
    )


def wan_i2v_inputs(grid):
    # The cross-attention takes the last 512 tokens as text, whatever precedes them as image tokens.
    return wan_inputs(grid, channels=9) | dict(
        encoder_hidden_states=torch.randn(2, 512, 16), encoder_hidden_states_image=torch.randn(2, 5, 20)
    )


def wan_ti2v_inputs(grid):
    tokens = grid[0] * (grid[1] // 2) * (grid[2] // 2)
    return wan_inputs(grid) | dict(timestep=torch.randint(0, 1000, (2, tokens)))


def wan_vace_inputs(grid):
    return wan_inputs(grid) | dict(
        control_hidden_states=torch.randn(2, 6, *grid), control_hidden_states_scale=torch.tensor([1.0, 0.5])
    )


def ltx_inputs(grid):
    tokens = grid[0] * grid[1] * grid[2]
    return dict(
        hidden_states=torch.randn(2, tokens, 8),
        encoder_hidden_states=torch.randn(2, 6, 16),
        timestep=torch.tensor([500, 500]),
        encoder_attention_mask=torch.tensor([[1] * 6, [1] * 4 + [0] * 2]),
        num_frames=grid[0],
        height=grid[1],
        width=grid[2],
        rope_interpolation_scale=(0.32, 32, 32),
    )


def ltx2_inputs(grid, audio=11):
    tokens = grid[0] * grid[1] * grid[2]
    return dict(
        hidden_states=torch.randn(2, tokens, 8),
        audio_hidden_states=torch.randn(2, audio, 8),
        encoder_hidden_states=torch.randn(2, 6, 16),
        audio_encoder_hidden_states=torch.randn(2, 6, 16),
        timestep=torch.tensor([[500.0], [500.0]]).expand(2, tokens),
        audio_timestep=torch.tensor([500.0, 500.0]),
        encoder_attention_mask=torch.ones(2, 6),
        audio_encoder_attention_mask=torch.ones(2, 6),
        num_frames=grid[0],
        height=grid[1],
        width=grid[2],
        fps=25.0,
        audio_num_frames=audio,
    )


def ltx23_inputs(grid):
    """Spatio-temporal guidance on the first block, for the second batch item only, as LTX-2.3 pipelines ask for it."""
    return ltx2_inputs(grid) | dict(
        spatio_temporal_guidance_blocks=[0],
        perturbation_mask=torch.tensor([1.0, 0.0]),
        use_cross_timestep=True,
        sigma=torch.tensor([0.5, 0.5]),
        audio_sigma=torch.tensor([0.5, 0.5]),
    )


def ltx2_reference_inputs(grid):
    """Keyframe or reference tokens after the video tokens, with coordinates of their own."""
    inputs = ltx2_inputs(grid)
    extra = 7
    tokens = inputs["hidden_states"].shape[1]
    coords = torch.rand(2, 3, tokens + extra, 2) * 5
    return inputs | dict(
        hidden_states=torch.randn(2, tokens + extra, 8),
        timestep=torch.full((2, tokens + extra), 500.0),
        video_coords=coords,
    )


def ltx2_coordinate_inputs(grid):
    """Coordinates instead of extents, of the video and of a keyframe and half-sized reference frames after it."""
    frames, height, width = grid
    inputs = ltx2_inputs(grid) | dict(num_frames=None, height=None, width=None)
    blocks = [(range(frames), 1), ([frames - 2], 1), (range(2), 2)]
    coords = [
        torch.stack(
            torch.meshgrid(
                torch.tensor([float(t) for t in times]), torch.arange(0.0, height, step),
                torch.arange(0.0, width, step), indexing="ij",
            )
        ).flatten(1)
        for times, step in blocks
    ]  # fmt: skip
    starts = torch.cat(coords, 1)[None, :, :, None].expand(2, 3, -1, 1)
    tokens = starts.shape[2]
    return inputs | dict(
        hidden_states=torch.randn(2, tokens, 8),
        timestep=torch.full((2, tokens), 500.0),
        video_coords=torch.cat([starts, starts + 1], -1),
    )


LTX = dict(
    in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=32, cross_attention_dim=64, num_layers=2,
    caption_channels=16,
)  # fmt: skip
LTX2 = dict(
    LTX, audio_in_channels=8, audio_out_channels=8, audio_num_attention_heads=2, audio_attention_head_dim=16,
    audio_cross_attention_dim=32,
)  # fmt: skip

ALL_RECIPES = [
    Recipe("wan", "WanTransformer3DModel", WAN, wan_inputs, (1, 2, 2), sparse=2, dense=2),
    Recipe(
        "wan-i2v", "WanTransformer3DModel", WAN | dict(in_channels=9, image_dim=20, added_kv_proj_dim=64),
        wan_i2v_inputs, (1, 2, 2), sparse=2, dense=2,
    ),
    Recipe("wan-ti2v-5b", "WanTransformer3DModel", WAN, wan_ti2v_inputs, (1, 2, 2), sparse=2, dense=2),
    Recipe(
        "wan-vace", "WanVACETransformer3DModel", WAN | dict(vace_layers=[0, 1], vace_in_channels=6),
        wan_vace_inputs, (1, 2, 2), sparse=4, dense=4,
    ),
    Recipe("ltx", "LTXVideoTransformer3DModel", LTX, ltx_inputs, (1, 1, 1), sparse=2, dense=2),
    Recipe("ltx2", "LTX2VideoTransformer3DModel", LTX2, ltx2_inputs, (1, 1, 1), sparse=2, dense=10),
    Recipe(
        "ltx2-split-rope", "LTX2VideoTransformer3DModel", LTX2 | dict(rope_type="split"), ltx2_inputs, (1, 1, 1),
        sparse=2, dense=10,
    ),
    Recipe(
        "ltx2.3", "LTX2VideoTransformer3DModel",
        LTX2 | dict(perturbed_attn=True, gated_attn=True, audio_gated_attn=True, rope_type="split",
                    cross_attn_mod=True, audio_cross_attn_mod=True),
        ltx23_inputs, (1, 1, 1), sparse=2, dense=10,
    ),
    Recipe(
        "ltx2-references", "LTX2VideoTransformer3DModel", LTX2, ltx2_reference_inputs, (1, 1, 1), sparse=2, dense=10,
        tags=("surplus",),
    ),
    Recipe(
        "ltx2-coordinates", "LTX2VideoTransformer3DModel", LTX2, ltx2_coordinate_inputs, (1, 1, 1), sparse=2,
        dense=10, tags=("surplus",),
    ),
    *(Recipe(**fields) for fields in [*JOINT_RECIPES, *CONTEXT_RECIPES, *VIDEO_RECIPES]),
]  # fmt: skip
RECIPES = [recipe for recipe in ALL_RECIPES if recipe.is_available()]
