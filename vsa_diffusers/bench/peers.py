"""Attention of other packages, each as its users call it: from `[B, S, H, D]` in the order of the sequence, and back.

What a package needs for every call (masks, copies into its layout) is in the time. What holds for a whole video (which
token lies in which tile) is made once before.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..tiles import TileGrid, num_selected_tiles
from .shapes import Shape

BLOCK_SIZE = (4, 4, 4)  # the only one that all of them have
Inputs = list[torch.Tensor]


class TileOrder:
    """Tokens tile by tile, in slots: every tile has 64, of which its tokens fill the first."""

    def __init__(self, shape: Shape, device: str):
        grid = TileGrid(shape.video_shape, BLOCK_SIZE)
        index = grid.token_index(device)
        self.num_tiles = grid.num_tiles
        self.num_slots = index.numel()
        self.sizes = (index >= 0).sum(1)
        self.tokens = index[index >= 0]
        self.slots = (torch.arange(grid.tile_capacity, device=device) < self.sizes[:, None]).flatten().nonzero()[:, 0]
        self.back = self.slots[torch.argsort(self.tokens)]

    def tile(self, x: torch.Tensor) -> torch.Tensor:
        """From `[B, S, H, D]` to `[B, slots, H, D]`, zeros where a slot is empty."""
        out = x.new_zeros(x.shape[0], self.num_slots, *x.shape[2:])
        out[:, self.slots] = x[:, self.tokens]
        return out

    def untile(self, x: torch.Tensor) -> torch.Tensor:
        """The opposite of `tile`."""
        return x[:, self.back]


class FastVideo:
    """The kernels of VSA's authors, behind the gathers of their users."""

    def __init__(self, inputs: Inputs, shape: Shape, device: str):
        from fastvideo_kernel import video_sparse_attn

        self.attend, self.inputs, self.order = video_sparse_attn, inputs, TileOrder(shape, device)

    def __call__(self, ratio: float) -> torch.Tensor:
        order = self.order
        query, key, value, gate = (order.tile(x).transpose(1, 2).contiguous() for x in self.inputs)
        top_k = num_selected_tiles(order.num_tiles, ratio)
        sizes, block = order.sizes, BLOCK_SIZE
        out = self.attend(query, key, value, sizes, sizes, top_k, block_size=block, compress_attn_weight=gate)
        return order.untile(out.transpose(1, 2))


class FlexVSA:
    """VSA of attention-gym as in its example: FlexAttention compiled, and PyTorch around it."""

    def __init__(self, inputs: Inputs, shape: Shape, device: str):
        from attn_gym import masks
        from torch.nn.attention.flex_attention import flex_attention

        torch.compiler.reset()  # past a number of shapes it would no longer compile, and then ignore the mask's blocks
        self.masks, self.inputs = masks, inputs
        self.layout = masks.create_vsa_tile_metadata(shape.video_shape, BLOCK_SIZE, device=device)
        sizes = self.layout.variable_block_sizes
        self.sizes = None if bool((sizes == self.layout.tile_numel).all()) else sizes
        # By default its blocks are larger than a tile on some GPUs, and it refuses.
        self.options = None if device == "cpu" else {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4}
        self.attend = torch.compile(flex_attention, dynamic=False)

    def __call__(self, ratio: float) -> torch.Tensor:
        masks, layout, sizes = self.masks, self.layout, self.sizes
        query, key, value, gate = (masks.tile_vsa_sequence(x.transpose(1, 2), layout) for x in self.inputs)
        num_tiles = len(layout.variable_block_sizes)
        coarse = masks.compute_vsa_coarse_attention(
            query,
            key,
            value,
            layout.tile_numel,
            num_selected_tiles(num_tiles, ratio),
            q_variable_block_sizes=sizes,
            kv_variable_block_sizes=sizes,
        )
        mask = masks.create_vsa_block_mask(coarse.topk_indices, layout.tile_numel, num_tiles, sizes)
        fine = self.attend(query, key, value, block_mask=mask, kernel_options=self.options)
        out = masks.vsa_additive_combine(fine, coarse.output, gate, layout.tile_numel)
        return masks.untile_vsa_sequence(out, layout).transpose(1, 2)


class CompiledFlexVSA(FlexVSA):
    """The same with all of it compiled as one, which takes long, and again for every ratio."""

    def __init__(self, inputs: Inputs, shape: Shape, device: str):
        from torch.nn.attention.flex_attention import flex_attention

        super().__init__(inputs, shape, device)
        self.attend = flex_attention
        self.whole = torch.compile(super().__call__, dynamic=False)
        self.compiled_for: float | None = None

    def __call__(self, ratio: float) -> torch.Tensor:
        if ratio != self.compiled_for:
            torch.compiler.reset()  # as for shapes: it compiles so many ratios and no more
            self.compiled_for = ratio
        return self.whole(ratio)


class Sol:
    """Sol-Attn of comfy-kitchen: blocks of 64 tokens as they follow in the sequence, no copies, and its pooled rest.

    Its kernels compute in int8. Beside the share of blocks, each block keeps itself and its two neighbours.
    """

    def __init__(self, inputs: Inputs, shape: Shape, device: str):
        import comfy_kitchen

        self.attend, self.inputs = comfy_kitchen.sol_attn, inputs
        if device != "cpu":  # where its kernels do not run it takes a reference in their place, without a word
            _check_kernels_of_sol(comfy_kitchen, inputs[0])

    def __call__(self, ratio: float) -> torch.Tensor:
        query, key, value, _ = self.inputs
        return self.attend(query, key, value, topk_ratio=ratio)


class SolVSA(Sol):
    """The same kernels computing VSA: in tiles, without the rest, with the gated coarse branch."""

    def __init__(self, inputs: Inputs, shape: Shape, device: str):
        super().__init__(inputs, shape, device)
        self.order = TileOrder(shape, device)
        self.sizes = self.order.sizes.int()

    def __call__(self, ratio: float) -> torch.Tensor:
        query, key, value, gate = (self.order.tile(x) for x in self.inputs)
        out = self.attend(
            query, key, value, topk_ratio=ratio, tail=False, block_len=self.sizes, coarse_gate=gate
        )  # fmt: skip
        return self.order.untile(out)


def _check_kernels_of_sol(package, query: torch.Tensor) -> None:
    if not package.sol_attn_is_available(query.device):
        reason = package.registry.list_backends()["cuda"]["unavailable_reason"]
        raise RuntimeError(f"the kernels of comfy-kitchen cannot run here: {reason or 'this GPU is not served'}")
    if query.shape[-1] != 128 or query.dtype not in (torch.bfloat16, torch.float16):
        raise RuntimeError(
            f"the kernels of comfy-kitchen take head_dim 128 in bf16 or fp16, not {query.shape[-1]} in {query.dtype}"
        )


class Sage:
    """SageAttention: dense, with query and key in int8."""

    def __init__(self, inputs: Inputs, shape: Shape, device: str):
        from sageattention import sageattn

        query, key, value, _ = inputs
        # It subtracts the mean of the keys from the tensor that it is given; others measure these inputs, too.
        self.attend, self.inputs = sageattn, (query, key.detach().clone(), value)

    def __call__(self, ratio: float | None) -> torch.Tensor:
        return self.attend(*self.inputs, tensor_layout="NHD")


@dataclass(frozen=True)
class Peer:
    """Attention of another package.

    Args:
        package: name on the package index.
        module: what is imported of it.
        make: from query, key, value and gate, the shape and the device: what takes a ratio and returns the output.
        computes: the combine of ours whose formula it has, "dense", or `None` if it has one of its own.
    """

    package: str
    module: str
    make: Callable[[Inputs, Shape, str], Callable[[float], torch.Tensor]]
    computes: str | None

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None

    @property
    def release(self) -> str:
        """Package and version."""
        try:
            return f"{self.package} {importlib.metadata.version(self.package)}"
        except importlib.metadata.PackageNotFoundError:
            return self.package


PEERS = {
    "attn-gym": Peer("attn-gym", "attn_gym", FlexVSA, "gate"),
    "attn-gym-compiled": Peer("attn-gym", "attn_gym", CompiledFlexVSA, "gate"),
    "comfy-kitchen-sol": Peer("comfy-kitchen", "comfy_kitchen", Sol, None),
    "comfy-kitchen-vsa": Peer("comfy-kitchen", "comfy_kitchen", SolVSA, "gate"),
    "sageattention": Peer("sageattention", "sageattention", Sage, "dense"),
    "fastvideo-kernel": Peer("fastvideo-kernel", "fastvideo_kernel", FastVideo, "gate"),
}


def chosen(names: Sequence[str] | None, device: str) -> list[str]:
    """The peers of these names, which may be "all" or "none"; without names, on a GPU those that are installed.

    Raises:
        ValueError: a name is no peer.
    """
    if names is None:
        return [name for name, peer in PEERS.items() if device != "cpu" and peer.is_installed]
    for name in names:
        if name not in ("all", "none", *PEERS):
            raise ValueError(f"peers has {name!r}, which is unknown; choose of all, none, {', '.join(PEERS)}.")
    if "all" in names:
        return list(PEERS)
    return [name for name in names if name != "none"]
