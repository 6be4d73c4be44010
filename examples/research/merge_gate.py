"""An experiment: `combine="merge"` plus a learned gate on the coarse branch. For Wan only, and not in the package."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vsa_diffusers.models import require_family
from vsa_diffusers.models.wan import WanVSAProcessor
from vsa_diffusers.tiles import TileGrid, settle


class MergeGateProcessor(WanVSAProcessor):
    """Output `merge + gate * coarse`. Shares its state with the processor that it replaces, for `set_top_k_ratio`."""

    def __init__(self, replaced: WanVSAProcessor):
        self.__dict__ = replaced.__dict__

    def attend(self, attn, shape, query, key, value, hidden, text=(0, 0), text_mask=None) -> torch.Tensor:
        """As the base class; the video must be whole tiles."""
        merged = super().attend(attn, shape, query, key, value, hidden, text, text_mask)
        gate = attn.to_gate_compress(hidden).unflatten(-1, query.shape[2:])
        block_size, _ = settle(shape, self._tiles()["block_size"])
        return merged + gate * coarse_branch(query, key, value, TileGrid(shape, block_size))


def coarse_branch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grid: TileGrid) -> torch.Tensor:
    """Attention between tile means, given to every token of the query's tile: `[B, S, H, D]`, differentiable."""
    if grid.padding:
        raise ValueError(f"video_shape={grid.video_shape} is not a whole number of tiles of {grid.block_size}.")
    index = grid.token_index(query.device)
    tile_of_token = torch.empty(grid.num_tokens, dtype=torch.long, device=query.device)
    tile_of_token[index.flatten()] = torch.arange(grid.num_tiles, device=query.device).repeat_interleave(index.shape[1])
    means = (x[:, index].float().mean(2).to(value.dtype).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*means).transpose(1, 2)[:, tile_of_token]


def add_gates_to_merge(transformer: torch.nn.Module) -> None:
    """After `enable_vsa(transformer, ratio, combine="merge")` on a model with gates: they weigh the coarse branch."""
    for attn in require_family(transformer).video_modules(transformer).values():
        if isinstance(attn.processor, WanVSAProcessor):  # dense layers keep their own
            attn.processor = MergeGateProcessor(attn.processor)
