"""The backward pass of `torch_impl`: recomputes each chunk, keeps sums in fp32. Shapes as there."""

from __future__ import annotations

import functools

import torch

from .problem import Problem
from .selection import MIN_CHUNK_BYTES
from .torch_impl import Layout, Tiled, accumulator, context_key_mask, context_of, part_of, parts


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
    layout = Layout(problem, query.device, accumulator(query.dtype))
    empty = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)
    grads, grad_gate = [empty(x) for x in (query, key, value)], None if gate is None else empty(gate)
    for items, heads in parts(query):
        grad, q, k, v = (part_of(x, items, heads) for x in (grad_output, query, key, value))
        mask = None if context_mask is None else context_mask[items]
        tiled = Tiled(q, k, v, mask, layout)
        sums = _Gradients(tiled)
        for tiles in tiled.chunks():
            sums.add_sparse(tiles, indices[items, heads, tiles], grad)
        if problem.has_coarse:
            sums.add_coarse(
                grad,
                None if gate is None else gate[items, :, heads],
                None if grad_gate is None else grad_gate[items, :, heads],
            )
        if problem.num_context:
            sums.add_context(q, k, v, context_key_mask(k, mask, problem), grad)
        for total, part in zip(grads, sums.finish(), strict=True):
            total[items, :, heads] = part
    return grads[0], grads[1], grads[2], grad_gate


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

    def __init__(self, tiled: Tiled):
        self.tiled = tiled
        self.dtype = accumulator(tiled.query.dtype)
        self.tokens = [torch.zeros_like(tiled.query, dtype=self.dtype) for _ in range(3)]
        self.tiles = [torch.zeros_like(tiled.key_tiles, dtype=self.dtype) for _ in range(2)]
        self.means = [torch.zeros_like(tiled.mean_query) for _ in range(3)]
        self.rooms = [tiled.new_rows() for _ in range(2)]

    def add_sparse(self, tiles: slice, selected: torch.Tensor, grad_output: torch.Tensor) -> None:
        tiled = self.tiled
        valid = tiled.layout.valid[tiles].repeat(selected.shape[0] * selected.shape[1], 1)[..., None]
        rows = tiled.selected_rows(selected)
        bias = tiled.bias(selected, self.dtype)
        grad_query, *grad_keys = attention_grads(
            tiled.tokens(grad_output, tiles) * valid,
            tiled.tokens(tiled.query, tiles),
            tiled.row_keys(tiled.key_tiles, rows, self.rooms[0]),
            tiled.row_keys(tiled.value_tiles, rows, self.rooms[1]),
            None if bias is None else bias[:, 0],
            tiled.problem.scale,
        )
        tiled.put_tokens(self.tokens[0], grad_query, tiles)
        for total, grad in zip(self.tiles, grad_keys, strict=True):
            total.view(-1, total.shape[3]).index_add_(0, rows, grad.reshape(len(rows), -1))

    def add_coarse(self, grad_output: torch.Tensor, gate: torch.Tensor | None, grad_gate: torch.Tensor | None) -> None:
        """Adds to the sums of the means, and fills `grad_gate`."""
        tiled, video = self.tiled, self.tiled.problem.video
        grad_video = grad_output[:, video].to(self.dtype)
        if gate is not None and grad_gate is not None:
            grad_gate.zero_()
            grad_gate[:, video] = grad_video * tiled.spread(tiled.coarse())
            grad_video = grad_video * gate[:, video]
        index = tiled.layout.index
        tokens = grad_video.index_select(1, (index - tiled.problem.before).flatten())
        per_tile = tokens.unflatten(1, index.shape) * tiled.layout.valid[..., None, None]
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
        """Gradients of query, key and value, `[b, S, h, D]`."""
        tiled, problem, layout = self.tiled, self.tiled.problem, self.tiled.layout
        items, _, heads, dim = self.tokens[0].shape
        slots, num_tiles = layout.index[layout.valid], problem.grid.num_tiles
        for which, tiles in enumerate(self.tiles, start=1):
            by_slot = tiles[:, :, :num_tiles].reshape(items, heads, *layout.index.shape, dim)[:, :, layout.valid]
            self.tokens[which].index_add_(1, slots, by_slot.transpose(1, 2))
            extra = tiles[:, :, num_tiles:].reshape(items, heads, -1, dim)[:, :, : tiled.num_extra]
            self._add_to_context(which, extra[:, :, : problem.num_context])
            if problem.combine == "merge":
                self.means[which] += extra[:, :, problem.num_context :]
        for tokens, means in zip(self.tokens, self.means, strict=True):
            tokens[:, problem.video] += tiled.spread(means / layout.sizes[:, None])
        return self.tokens

    def _add_to_context(self, which: int, grad: torch.Tensor) -> None:
        problem, grad = self.tiled.problem, grad.transpose(1, 2)
        self.tokens[which][:, : problem.before] += grad[:, : problem.before]
        self.tokens[which][:, problem.video.stop :] += grad[:, problem.before :]
