"""What one forward spends on attention and on the exchange between GPUs, and what its tiles come to on each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..operators import forward
from ..parallel import exchange_of
from ..problem import Problem
from ..processor import FamilyAttnProcessor
from ..tiles import TileGrid, settle

SENT = "sent_bytes"


def mark(device: str) -> Any:
    """This moment: of the GPU's work, or of the clock."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Any, end: Any) -> float:
    """Seconds from one `mark` to another, waiting for the GPU to reach it."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class Parts:
    """Calls that were timed, by name, and bytes that were sent to other ranks."""

    def __init__(self) -> None:
        self.spans: dict[str, list[tuple[Any, Any]]] = {}
        self.sent_bytes: int | None = None

    def totals(self) -> dict[str, float]:
        """Seconds by name, and the bytes, of what ran."""
        found: dict[str, float] = {name: sum(between(*span) for span in spans) for name, spans in self.spans.items()}
        return found if self.sent_bytes is None else found | {SENT: self.sent_bytes}


@contextmanager
def timed_parts(model: torch.nn.Module, device: str) -> Iterator[Parts]:
    """While inside, the calls of attention and of the exchange are timed, waiting for other ranks included.

    Attention includes its exchange, and that what a rank copies for itself meanwhile. Of a model with diffusers' own
    processors attention is `scaled_dot_product_attention` of as many queries as keys.
    """
    parts = Parts()
    undo: list[Callable[[], None]] = []

    def time_calls(owner: Any, method: str, name: str, counts: Callable[..., bool] = lambda *_, **__: True) -> None:
        function = getattr(owner, method)
        own = method in vars(owner)

        def call(*args: Any, **kwargs: Any) -> Any:
            start = mark(device)
            result = function(*args, **kwargs)
            if counts(*args, **kwargs):
                parts.spans.setdefault(name, []).append((start, mark(device)))
            return result

        setattr(owner, method, call)
        undo.append(lambda: setattr(owner, method, function) if own else delattr(owner, method))

    processors = [getattr(module, "processor", None) for module in model.modules()]
    ours = [processor for processor in processors if isinstance(processor, FamilyAttnProcessor)]
    for processor in ours:
        time_calls(processor, "attend", "attention")
    if not ours:
        functions = torch.nn.functional
        time_calls(functions, "scaled_dot_product_attention", "attention", _is_within_one_sequence)
    exchange = exchange_of(getattr(model, "_parallel_config", None))
    if exchange is not None:
        parts.sent_bytes = 0

        def count_bytes(sent: Mapping[int, torch.Tensor], *_: Any) -> bool:
            assert parts.sent_bytes is not None
            parts.sent_bytes += sum(rows.nbytes for rows in sent.values())
            return True

        time_calls(exchange, "to_heads", "to_heads")
        time_calls(exchange, "to_tokens", "to_tokens")
        time_calls(exchange, "_swap", "exchange", count_bytes)
    try:
        yield parts
    finally:
        for each in reversed(undo):
            each()


def _is_within_one_sequence(query: torch.Tensor, key: torch.Tensor, *_: Any, **__: Any) -> bool:
    return query.shape == key.shape


@contextmanager
def counted_tiles(model: torch.nn.Module) -> Iterator[dict[str, int]]:
    """While inside, sparse calls tell what they compute on this rank.

    Yields:
        `heads`, those among them that are `filled_heads` (zeros, since the heads do not divide by the ranks),
        `kept_tiles` (pairs of a query tile and a key tile that it keeps) and `kept_pairs` (the query and key tokens in
        these), summed over all calls. Empty where none was sparse.
    """
    found: dict[str, int] = {}

    def operation(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, video_shape: tuple[int, int, int], **options: Any
    ) -> torch.Tensor:
        block, kept = settle(video_shape, options["block_size"], options.get("top_k_ratio", 0.5), options.get("top_k"))
        grid, scale = TileGrid(video_shape, block), query.shape[-1] ** -0.5
        before, after = options["context_tokens"]
        problem = Problem(grid, kept, options["combine"], scale, before, after, options["selection"])
        call = query, key, value, options["gate"], options["context_mask"], problem, options["implementation"]
        output, indices, _ = forward(*call)
        tokens = (grid.token_index(query.device) >= 0).sum(1)
        counts = {
            "heads": query.shape[2],
            "filled_heads": int((query == 0).all(-1).all(1).all(0).sum()),
            "kept_tiles": indices.numel(),
            "kept_pairs": int((tokens[indices.long()].sum(-1) * tokens).sum()),
        }
        for name, count in counts.items():
            found[name] = found.get(name, 0) + count
        return output

    processors = [
        processor
        for module in model.modules()
        if isinstance(processor := getattr(module, "processor", None), FamilyAttnProcessor)
    ]
    for processor in processors:
        processor.operation = operation
    try:
        yield found
    finally:
        for processor in processors:
            del processor.operation
