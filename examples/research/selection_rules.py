"""Rules by which key tiles can be chosen, and what each keeps of one head's attention.

Shapes: N full tiles of C tokens, D head_dim, c query tiles of a chunk, V choices of tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from unittest import mock

import torch

from vsa_diffusers.tiles import TileGrid, num_selected_tiles
from vsa_diffusers.torch_impl import Tiled

Parts = tuple[int, int, int]
Rounding = Callable[[torch.Tensor], torch.Tensor]
Rule = Callable[[torch.Tensor, torch.Tensor, TileGrid], torch.Tensor]
"""From query and key `[N, C, D]` to scores `[N, N]`: a query tile keeps the key tiles of the highest ones."""
CHUNK_BYTES = 2**26


def block_means(tiles: torch.Tensor, parts: Parts, grid: TileGrid) -> torch.Tensor:
    """Means of each tile's `parts` blocks: `[N, C, D]` to `[N, blocks, D]`."""
    tiles = tiles.unflatten(1, grid.block_size)
    for axis, count in enumerate(parts):
        tiles = tiles.unflatten(1 + 2 * axis, (count, -1))
    return tiles.mean((2, 4, 6)).flatten(1, 3)


def logits_of_means(
    query: torch.Tensor, key: torch.Tensor, parts: Sequence[Parts], grid: TileGrid, rounding: Rounding | None = None
) -> torch.Tensor:
    """Logits between the means of query and key blocks, `[N, blocks, N, blocks]`; `rounding` is done to the means."""
    q, k = (block_means(x, each, grid) for x, each in zip((query, key), parts, strict=True))
    if rounding is not None:
        q, k = rounding(q), rounding(k)
    logits = q.flatten(0, 1) @ k.flatten(0, 1).T * q.shape[-1] ** -0.5
    return logits.unflatten(1, (len(key), -1)).unflatten(0, (len(query), -1))


def scores_by_means(*parts: Parts) -> Rule:
    """Share of attention that each key tile gets from the query tile's block means."""

    def scores(query: torch.Tensor, key: torch.Tensor, grid: TileGrid) -> torch.Tensor:
        logits = logits_of_means(query, key, parts, grid)
        return logits.flatten(2).softmax(-1).unflatten(2, logits.shape[2:]).sum(3).mean(1)

    return scores


def against_tile_means(*parts: Parts) -> Rule:
    """As `scores_by_means`, but what each query block gives away is summed over the means of whole key tiles."""

    def scores(query: torch.Tensor, key: torch.Tensor, grid: TileGrid) -> torch.Tensor:
        whole = logits_of_means(query, key, (parts[0], (1, 1, 1)), grid).logsumexp((2, 3), keepdim=True)
        return (logits_of_means(query, key, parts, grid) - whole).logsumexp((1, 3))

    return scores


def highest_pair(*parts: Parts, relative: bool = False, rounding: Rounding | None = None) -> Rule:
    """The highest logit of a query block and a key block; `relative` to the highest that the query block has."""

    def scores(query: torch.Tensor, key: torch.Tensor, grid: TileGrid) -> torch.Tensor:
        logits = logits_of_means(query, key, parts, grid, rounding)
        if relative:
            logits = logits - logits.amax((2, 3), keepdim=True)
        return logits.amax((1, 3))

    return scores


def exact_mass(query: torch.Tensor, key: torch.Tensor, grid: TileGrid) -> torch.Tensor:
    """What the rules estimate: the share that each key tile gets from the query tile's own tokens."""
    keys, scale = key.flatten(0, 1).T, query.shape[-1] ** -0.5
    shares = [
        (part.flatten(0, 1) @ keys * scale).softmax(-1).unflatten(1, key.shape[:2]).sum(2).unflatten(0, part.shape[:2])
        for part in query.split(_chunk(key))
    ]
    return torch.cat([share.mean(1) for share in shares])


TILE, QUARTERS, EIGHTHS = (1, 1, 1), (1, 2, 2), (2, 2, 2)
MEAN = 'mean of query, mean of key (selection="mean")'
BY_QUARTERS = 'highest pair of quarters (selection="quarters")'
QUERY_QUARTERS = "highest pair, query quarters and key eighths"
BY_EIGHTHS = "highest pair of eighths"
EXACT = "exact mass (not available to a kernel)"

RULES: dict[str, Rule] = {
    MEAN: highest_pair(TILE, TILE),
    "keys in 2 halves, in time": scores_by_means(TILE, (2, 1, 1)),
    "keys in 4 quarters, in space": scores_by_means(TILE, QUARTERS),
    "queries in 2 halves, in time": scores_by_means((2, 1, 1), TILE),
    "queries in 4 quarters, in space": scores_by_means(QUARTERS, TILE),
    "both in 2 halves, in time": scores_by_means((2, 1, 1), (2, 1, 1)),
    "both in 4 quarters, in space": scores_by_means(QUARTERS, QUARTERS),
    "both in 4 quarters, sums over tile means": against_tile_means(QUARTERS, QUARTERS),
    "highest pair of quarters, per query quarter": highest_pair(QUARTERS, QUARTERS, relative=True),
    BY_QUARTERS: highest_pair(QUARTERS, QUARTERS),
    "highest pair of 2 halves, in width": highest_pair((1, 1, 2), (1, 1, 2)),
    QUERY_QUARTERS: highest_pair(QUARTERS, EIGHTHS),
    BY_EIGHTHS: highest_pair(EIGHTHS, EIGHTHS),
    "both in 8 parts": scores_by_means(EIGHTHS, EIGHTHS),
    EXACT: exact_mass,
}
SHORT = (MEAN, BY_QUARTERS, QUERY_QUARTERS, BY_EIGHTHS, EXACT)
"""Those that videos are made with."""


def to_bf16(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().to(x.dtype)


def to_tf32(x: torch.Tensor) -> torch.Tensor:
    """As tensor cores read fp32: the last 13 bits are not looked at."""
    return (x.float().view(torch.int32) & ~0x1FFF).view(torch.float32)


ROUNDINGS: dict[str, Rounding | None] = {"bf16": to_bf16, "tf32": to_tf32, "fp32": None}
ROUNDED_PARTS = {"mean": (TILE, TILE), "quarters": (QUARTERS, QUARTERS), "eighths": (EIGHTHS, EIGHTHS)}


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` key tiles of the highest score in every row, bool of the shape of `scores`."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    return kept.scatter_(-1, scores.topk(count, dim=-1).indices, value=True)


def attention_by_choice(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kept: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What choices of tiles keep, and how far their outputs are from dense attention.

    Args:
        query, key, value: `[N, C, D]`.
        kept: bool `[V, N, N]`, query tiles first.

    Returns:
        `mass`, the mean share of the softmax in the tiles kept, and the relative errors `merge` and `sparse` of the
        output: `[V]` each.
    """
    scale, size = query.shape[-1] ** -0.5, key.shape[1]
    keys, mean_key, mean_value = key.flatten(0, 1).T, key.mean(1).T, value.mean(1)
    log_size = torch.tensor(float(size)).log().item()
    mass, merge, sparse = (kept.new_zeros(len(kept), dtype=query.dtype) for _ in range(3))
    norm = query.new_zeros(())
    step = _chunk(value)
    for part, chosen in zip(query.split(step), kept.to(query.dtype).split(step, dim=1), strict=True):
        rows = part.flatten(0, 1)  # [c * C, D]
        logits = rows @ keys * scale
        highest = logits.amax(1, keepdim=True)
        weights = (logits - highest).exp().unflatten(1, (-1, size))  # [c * C, N, C]
        pooled = (rows @ mean_key * scale + log_size - highest).exp().unflatten(0, (-1, size))  # [c, C, N]
        in_tile = weights.sum(2).unflatten(0, (-1, size))  # [c, C, N]
        by_tile = torch.bmm(weights.transpose(0, 1), value).unflatten(1, (-1, size))  # [N, c, C, D]
        dense = by_tile.sum(0) / in_tile.sum(2, keepdim=True)
        norm += dense.square().sum()
        among = torch.einsum("vcn,ncxd->vcxd", chosen, by_tile)
        weight = torch.einsum("vcn,cxn->vcx", chosen, in_tile)
        mass += (weight / in_tile.sum(2)).sum((1, 2))
        sparse += (among / weight[..., None] - dense).square().sum((1, 2, 3))
        rest = (1 - chosen)[:, :, None] * pooled  # [V, c, C, N]
        merged = (among + rest @ mean_value) / (weight + rest.sum(3))[..., None]
        merge += (merged - dense).square().sum((1, 2, 3))
    return {"mass": mass / query.shape[:2].numel(), "merge": (merge / norm).sqrt(), "sparse": (sparse / norm).sqrt()}


def compare_rules(
    call: Sequence[torch.Tensor], grid: TileGrid, ratios: Sequence[float], rules: Mapping[str, Rule] = RULES
) -> dict[tuple[str, float], dict[str, float]]:
    """What every rule keeps at every ratio: measures by rule and ratio, given query, key and value `[N, C, D]`."""
    scores = {name: rule(call[0], call[1], grid) for name, rule in rules.items()}
    where = [(name, ratio) for name in rules for ratio in ratios]
    kept = torch.stack([best(scores[name], num_selected_tiles(grid.num_tiles, ratio)) for name, ratio in where])
    found = {name: values.tolist() for name, values in attention_by_choice(*call, kept).items()}
    return {key: {name: values[index] for name, values in found.items()} for index, key in enumerate(where)}


def compare_roundings(
    call: Sequence[torch.Tensor], grid: TileGrid, ratio: float
) -> dict[tuple[str, str], dict[str, float]]:
    """What rounding of the means changes, by selection and rounding, given query, key and value `[N, C, D]`.

    `changed` is the share of kept tiles that fp64 would not keep, `lost` the share of the kept mass that is lost.
    """
    count = num_selected_tiles(grid.num_tiles, ratio)
    wide = [x.double() for x in call[:2]]
    names, kept = [], []
    for name, parts in ROUNDED_PARTS.items():
        names.append((name, "fp64"))
        kept.append(best(highest_pair(*parts)(*wide, grid), count))
        for rounding, function in ROUNDINGS.items():
            names.append((name, rounding))
            kept.append(best(highest_pair(*parts, rounding=function)(call[0], call[1], grid), count))
    mass = attention_by_choice(*call, torch.stack(kept))["mass"].tolist()
    found = {}
    for index, (name, rounding) in enumerate(names):
        exact = names.index((name, "fp64"))
        if index != exact:
            changed = (kept[index] & ~kept[exact]).sum() / kept[exact].sum()
            found[name, rounding] = {"changed": changed.item(), "lost": 1 - mass[index] / mass[exact]}
    return found


@contextmanager
def selecting(rule: Rule) -> Iterator[None]:
    """Let the PyTorch implementation choose tiles by a rule, whatever `selection` says; for grids of full tiles."""

    def scores(self: Tiled) -> Iterator[torch.Tensor]:
        query, key = (x[:, self.layout.index].movedim(3, 1).float() for x in (self.query, self.key))  # [b, h, N, C, D]
        rows = [rule(q, k, self.problem.grid) for q, k in zip(query.flatten(0, 1), key.flatten(0, 1), strict=True)]
        yield torch.stack(rows).unflatten(0, query.shape[:2])

    with mock.patch.object(Tiled, "scores", scores):
        yield


def _chunk(tiles: torch.Tensor) -> int:
    """Query tiles whose numbers, as many for each token as all of `tiles` has, fit the bound; or one."""
    return max(1, CHUNK_BYTES // (tiles.shape[1] * tiles[:, 0].numel() * tiles.element_size()))
