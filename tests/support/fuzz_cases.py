"""Random calls of the operation, made from a seed, and what each must be equal to within rounding.

The oracle is given the tiles that the implementation kept, which must be the highest-scoring ones; a query tile whose
last kept and first dropped score lie closer together than rounding can tell is a near-tie and not held to its choice.
"""

from __future__ import annotations

import math
import random
import zlib
from dataclasses import dataclass, field

import torch

from vsa_diffusers.tiles import MAX_TILE_TOKENS, TileGrid, settle

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BLOCKS = ((4, 4, 4), (3, 5, 4), (1, 8, 8), (2, 4, 8), (2, 3, 4), (1, 1, 1), (1, 3, 3), (4, 4, 8), (2, 2, 2), (2, 4, 1))
CONTENTS = ("normal", "normal", "normal", "normal", "ties", "equal", "zeros", "spikes", "offset")
STRIDES = ("contiguous", "transposed", "fused", "sliced", "expanded", "permuted")
MOST_PAIRS = 6e7  # of tokens, of all heads; the oracle holds several numbers for each
COMBINES = ("gate", "sum", "sparse", "merge")


@dataclass(frozen=True)
class Limits:
    """What is drawn for one implementation. `forms` bounds how many kinds of calls are compiled, if it is not 0."""

    dtypes: tuple[torch.dtype, ...]
    head_dims: tuple[int, ...]
    blocks: tuple[tuple[int, int, int] | None, ...]  # `None`: any, or the one that fits
    video_shape: tuple[int, int, int]
    tokens: int
    context: int
    heads: int = 3
    batch: int = 3
    forms: int = 0


HALVES = (torch.bfloat16, torch.float16)
LIMITS = {
    "torch": Limits(
        dtypes=DTYPES,
        head_dims=(1, 2, 3, 4, 5, 8, 16, 32, 33, 40, 64),
        blocks=(*BLOCKS, None, None, None),
        video_shape=(7, 7, 7),
        tokens=140,
        context=9,
    ),
    "interpreter": Limits(
        dtypes=(torch.float32, *HALVES),
        head_dims=(1, 8, 16, 24, 32, 40),
        blocks=((2, 4, 4), (2, 2, 2), (1, 3, 3), (4, 4, 4)),
        video_shape=(4, 6, 6),
        tokens=40,
        context=5,
        heads=2,
        batch=2,
    ),
    "cuda": Limits(
        dtypes=(torch.float32, *HALVES, *HALVES, *HALVES),
        head_dims=(128, 128, 128, 64, 64, 64, 32, 40, 72, 96, 256),
        blocks=((4, 4, 4), (3, 5, 4), (1, 8, 8), (2, 4, 8), (2, 3, 4), (4, 4, 8)),
        video_shape=(9, 20, 30),
        tokens=4 * 9 * 20 * 30,
        context=150,
        heads=4,
        forms=48,
    ),
}


@dataclass(frozen=True)
class Case:
    """One call. What decides which kernels are compiled comes first."""

    dtype: torch.dtype
    head_dim: int
    heads: int
    block_size: tuple[int, int, int] | str
    combine: str
    selection: str
    has_context: bool
    masked: bool
    strides: str
    video_shape: tuple[int, int, int] = (1, 1, 1)
    batch: int = 1
    kept: dict = field(default_factory=dict)
    scale: float | None = None
    context: tuple[int, int] = (0, 0)
    content: str = "normal"
    spread: float = 1.0
    value_scale: float = 1.0
    chunk_bytes: int = 2**22  # of the PyTorch implementation; small ones cut even small calls into many chunks
    seed: int = 0

    @property
    def settled(self) -> tuple[TileGrid, int]:
        """The grid, and how many tiles are kept."""
        block, kept = settle(self.video_shape, self.block_size, **self.kept)
        return TileGrid(self.video_shape, block), kept

    @property
    def logit_scale(self) -> float:
        """The factor on the logits."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def call(self) -> dict:
        """Arguments of `video_sparse_attention` but the tensors."""
        options = {"block_size": self.block_size, "combine": self.combine, "selection": self.selection}
        return options | self.kept | {"scale": self.scale, "context_tokens": self.context}


def make_case(seed: int, index: int, limits: Limits) -> Case:
    """The `index`-th case of a seed."""
    form = _form(random.Random(f"form {seed} {index % limits.forms}" if limits.forms else f"{seed} {index}"), limits)
    rng = random.Random(f"case {seed} {index}")
    while True:
        shape = tuple(rng.randint(1, extent) for extent in limits.video_shape)
        few = math.prod(shape) <= max(1, limits.tokens // rng.choice((1, 2, 4, 8, 16)))
        if few and math.prod(shape) ** 2 * form["heads"] <= MOST_PAIRS:
            break
    context = (0, 0)
    if form["has_context"]:
        context = rng.choice([(0, 1), (1, 0), (1, 1)])
        context = tuple(side * rng.randint(1, limits.context) for side in context)
    block, _ = settle(shape, form["block_size"])
    tiles = TileGrid(shape, block).num_tiles
    kept = {"top_k": rng.choice([1, rng.randint(1, tiles), rng.randint(1, tiles), tiles, tiles + 3])}
    if rng.random() < 0.5:
        kept = {"top_k_ratio": rng.choice([1e-3, 0.2, 0.5, 1.0, rng.uniform(0.01, 1.0)])}
    content = rng.choice(CONTENTS)
    return Case(
        **form,
        video_shape=shape,
        batch=rng.choice([1, 1, *range(1, limits.batch + 1)]) if math.prod(shape) < 2000 else 1,
        kept=kept,
        scale=rng.choice([None, None, None, rng.uniform(-0.5, 0.5), rng.uniform(0.01, 2.0), 0.0]),
        context=context,
        content=content,
        spread=1.0 if content == "spikes" else rng.choice([*[1.0] * 5, 1e-3, 0.1, 3.0, 10.0, 100.0, 1e3]),
        value_scale=rng.choice([1.0, 1.0, 1e-3, 0.1, 30.0, 1e3]),
        chunk_bytes=rng.choice([2**22, 2**22, 2**14, 2**10]),
        seed=zlib.crc32(f"{seed} {index}".encode()),
    )


def _form(rng: random.Random, limits: Limits) -> dict:
    combine = rng.choice(COMBINES)
    block = rng.choice(limits.blocks)
    if block is None and combine != "gate" and rng.random() < 0.5:
        block = "auto"
    while block is None:
        block = tuple(rng.randint(1, 8) for _ in range(3))
        if math.prod(block) > MAX_TILE_TOKENS:
            block = None
    has_context = rng.random() < 0.5
    return {
        "dtype": rng.choice(limits.dtypes),
        "head_dim": rng.choice(limits.head_dims),
        "heads": rng.randint(1, limits.heads),
        "block_size": block,
        "combine": combine,
        "selection": rng.choice(["mean", "quarters"]),
        "has_context": has_context,
        "masked": has_context and rng.random() < 0.5,
        "strides": rng.choice(STRIDES),
    }


def make_tensors(case: Case, device: str) -> list[torch.Tensor | None]:
    """Query, key, value, gate and context mask, of the case's strides."""
    generator = torch.Generator(device).manual_seed(case.seed)
    rng = random.Random(case.seed)
    sequence = sum(case.context) + math.prod(case.video_shape)
    size = (case.batch, sequence, case.heads, case.head_dim)

    def randn(*shape):
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float64)

    zeros = rng.choice([(0,), (1,), (2,), (0, 1), (0, 1, 2)]) if case.content == "zeros" else ()
    tensors: list[torch.Tensor | None] = []
    for which in range(4 if case.combine == "gate" else 3):
        x = randn(*size)
        if case.content == "ties":  # three kinds of tokens
            kinds = torch.randint(3, (sequence,), generator=generator, device=device)
            x = x[:, :3].repeat(1, 3, 1, 1)[:, kinds]
        elif case.content == "equal":
            x = x[:, :1].repeat(1, sequence, 1, 1)
        elif case.content == "spikes":
            x = x * 10 ** (2 * randn(case.batch, sequence, case.heads, 1)).clamp(-3, 3)
        elif case.content == "offset":
            x = x + 5 * randn(1, 1, case.heads, case.head_dim)
        if which in zeros:
            x = torch.zeros_like(x)
        factor = case.spread if which < 2 else case.value_scale if which == 2 else 1.0
        tensors.append(_strided((x * factor).clamp(-6e4, 6e4).to(case.dtype), case.strides))
    mask = None
    if case.masked:
        mask = torch.rand(case.batch, sum(case.context), generator=generator, device=device) < rng.choice(
            [0.0, 0.6, 1.0]
        )
    return [*tensors, *[None] * (4 - len(tensors)), mask]


def _strided(x: torch.Tensor, strides: str) -> torch.Tensor:
    """The same numbers (but for "expanded") in memory of another form, in which all else is NaN."""
    batch, sequence, heads, dim = x.shape
    if strides == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if strides == "fused":
        return torch.cat([torch.full_like(x, math.nan), x, torch.full_like(x, math.nan)], -1)[..., dim : 2 * dim]
    if strides == "sliced":
        wide = torch.full((batch, sequence + 5, heads + 1, dim), math.nan, dtype=x.dtype, device=x.device)
        wide[:, 2 : sequence + 2, 1:] = x
        return wide[:, 2 : sequence + 2, 1:]
    if strides == "expanded":
        return x[:1].expand_as(x) if batch > 1 else x[:, :, :1].expand_as(x)
    if strides == "permuted":
        return x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    return x
