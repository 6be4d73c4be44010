"""The backward pass of `torch_impl`: recomputes each chunk, keeps sums in fp32. Shapes as there."""

from __future__ import annotations

import torch

from .problem import Problem
from .torch_impl import MIN_CHUNK_BYTES, Tiled, accumulator, context_key_mask, context_of


def backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor | None,
    context_mask: torch.Tensor | None,
    indices: torch.Tensor,
    problem: Problem,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of query, key, value and gate. Which tiles are selected is not differentiated, as published."""
    tiled = Tiled(query, key, value, context_mask, problem)
    grads = _Gradients(tiled, query)
    for tiles in tiled.chunks():
        grads.add_sparse(tiles, indices[:, :, tiles], query, grad_output)
    grad_gate = None
    if problem.has_coarse:
        grad_video = grad_output[:, problem.video].to(grads.dtype)
        if gate is not None:
            grad_gate = torch.zeros_like(gate)
            grad_gate[:, problem.video] = grad_video * tiled.spread(tiled.coarse())
            grad_video = grad_video * gate[:, problem.video]
        grads.add_coarse(grad_video)
    if problem.num_context:
        grads.add_context(query, key, value, context_key_mask(key, context_mask, problem), grad_output)
    return (*(grad.to(query.dtype) for grad in grads.finish()), grad_gate)


def attention_grads(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of softmax attention of `[..., Q, D]` queries over `[..., L, D]` keys, in chunks of queries."""
    query, key, value, grad_output = (x.to(accumulator(x.dtype)) for x in (query, key, value, grad_output))
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    rows = max(1, MIN_CHUNK_BYTES // (query.element_size() * (key.numel() // key.shape[-1])))
    for start in range(0, query.shape[-2], rows):
        part = slice(start, start + rows)
        logits = query[..., part, :] @ key.transpose(-1, -2) * scale
        weights = (logits if bias is None else logits + bias).softmax(-1)
        grad = grad_output[..., part, :]
        grad_value += weights.transpose(-1, -2) @ grad
        grad_weights = grad @ value.transpose(-1, -2)
        grad_logits = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True)) * scale
        grad_query[..., part, :] = grad_logits @ key
        grad_key += grad_logits.transpose(-1, -2) @ query[..., part, :]
    return grad_query, grad_key, grad_value


class _Gradients:
    """Sums of the gradients, by token, by tile slot and by tile mean, brought together in `finish`."""

    def __init__(self, tiled: Tiled, query: torch.Tensor):
        self.tiled = tiled
        self.dtype = accumulator(query.dtype)
        self.tokens = [torch.zeros_like(query, dtype=self.dtype) for _ in range(3)]
        self.tiles = [torch.zeros_like(tiled.key_tiles, dtype=self.dtype) for _ in range(2)]
        self.extra = [torch.zeros_like(tiled.extra_key, dtype=self.dtype) for _ in range(2)]
        self.means = [torch.zeros_like(tiled.mean_query) for _ in range(3)]

    def add_sparse(self, tiles: slice, selected: torch.Tensor, query: torch.Tensor, grad_output: torch.Tensor) -> None:
        tiled, (batch, heads, count, top_k) = self.tiled, selected.shape
        valid = tiled.valid[tiles].repeat(batch * heads, 1)[..., None]
        bias = tiled.bias(selected, self.dtype)
        grad_query, *grad_rows = attention_grads(
            tiled.tokens(grad_output, tiles) * valid,
            tiled.tokens(query, tiles),
            tiled.row_keys(tiled.key_tiles, tiled.extra_key, selected),
            tiled.row_keys(tiled.value_tiles, tiled.extra_value, selected),
            None if bias is None else bias[:, 0],
            tiled.problem.scale,
        )
        tiled.put_tokens(self.tokens[0], grad_query, tiles)
        slots = top_k * tiled.problem.grid.tile_capacity
        rows = tiled.selected_rows(selected)
        for total, extra, grad in zip(self.tiles, self.extra, grad_rows, strict=True):
            total.index_add_(0, rows, grad[:, :slots].reshape(len(rows), -1))
            extra += grad[:, slots:].unflatten(0, (batch, heads, count)).sum(2)

    def add_coarse(self, grad_video: torch.Tensor) -> None:
        tiled = self.tiled
        tokens = grad_video.index_select(1, (tiled.index - tiled.problem.before).flatten())
        per_tile = tokens.unflatten(1, tiled.index.shape) * tiled.valid[..., None, None]
        grads = attention_grads(
            per_tile.sum(2).transpose(1, 2),
            tiled.mean_query,
            tiled.mean_key,
            tiled.mean_value,
            None,
            tiled.problem.scale,
        )
        for total, grad in zip(self.means, grads, strict=True):
            total += grad

    def add_context(self, query, key, value, mask, grad_output) -> None:
        problem = self.tiled.problem
        bias = None
        if mask is not None:
            bias = torch.zeros(mask.shape, device=mask.device, dtype=self.dtype).masked_fill_(~mask, -torch.inf)
        grad_query, grad_key, grad_value = attention_grads(
            context_of(grad_output, problem).transpose(1, 2),
            context_of(query, problem).transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            bias,
            problem.scale,
        )
        self._add_to_context(0, grad_query)
        self.tokens[1] += grad_key.transpose(1, 2)
        self.tokens[2] += grad_value.transpose(1, 2)

    def finish(self) -> list[torch.Tensor]:
        """Gradients of query, key and value, `[B, S, H, D]`."""
        tiled, problem = self.tiled, self.tiled.problem
        batch, _, heads, dim = self.tokens[0].shape
        slots = tiled.index[tiled.valid]
        for which, (tiles, extra) in enumerate(zip(self.tiles, self.extra, strict=True), start=1):
            by_slot = tiles.reshape(batch, heads, *tiled.index.shape, dim)[:, :, tiled.valid]
            self.tokens[which].index_add_(1, slots, by_slot.transpose(1, 2))
            self._add_to_context(which, extra[:, :, : problem.num_context])
            if problem.combine == "merge":
                self.means[which] += extra[:, :, problem.num_context :]
        for tokens, means in zip(self.tokens, self.means, strict=True):
            tokens[:, problem.video] += tiled.spread(means / tiled.sizes[:, None])
        return self.tokens

    def _add_to_context(self, which: int, grad: torch.Tensor) -> None:
        problem, grad = self.tiled.problem, grad.transpose(1, 2)
        self.tokens[which][:, : problem.before] += grad[:, : problem.before]
        self.tokens[which][:, problem.video.stop :] += grad[:, problem.before :]
