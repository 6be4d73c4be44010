"""Context parallelism over several GPUs: every rank has a part of the tokens, attention needs all of them.

Ulysses: one exchange gives each rank all tokens of a part of the heads, another one gives its own tokens back. Both
count text, which every rank has whole, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F

RING = (
    "context parallelism splits the sequence, and ring attention gives a rank only part of the keys, while tiles are "
    "selected among all of them; use ContextParallelConfig(ulysses_degree=...)"
)
_EXCHANGE = "_vsa_exchange"


@dataclass
class Exchange:
    """Ulysses' two exchanges over one group of ranks, with gradients.

    Args:
        group: of the ranks that share a video, in the order in which their tokens lie.
        rank: this rank's place in it.
        ranks: how many there are.
        uneven: whether the number of tokens need not be a multiple of `ranks`: the first ranks have one more then.
    """

    group: Any
    rank: int
    ranks: int
    uneven: bool = False
    _told: dict[int, list[int]] = field(default_factory=dict)

    def forget(self) -> None:
        """Sizes that other ranks told are those of one forward."""
        self._told.clear()

    def sizes(self, local: int, whole: int | None = None) -> list[int]:
        """Number of tokens of every rank.

        Args:
            local: that of this one.
            whole: that of all together, where it is known; otherwise, the ranks of an uneven split tell each other.
        """
        if not self.uneven:
            return [local] * self.ranks
        return self._told_sizes(local) if whole is None else self.shares(whole)

    def shares(self, whole: int) -> list[int]:
        """How many of `whole` tokens every rank has.

        Raises:
            ValueError: they do not divide evenly, and the config does not say that they need not.
        """
        if whole % self.ranks and not self.uneven:
            raise ValueError(
                f"{whole} tokens cannot be split evenly over {self.ranks} ranks; pass "
                "ContextParallelConfig(ulysses_anything=True)."
            )
        return [whole // self.ranks + (rank < whole % self.ranks) for rank in range(self.ranks)]

    def own(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's part of what is whole along `dim`."""
        sizes = self.shares(tensor.shape[dim])
        return tensor.narrow(dim, self.start(sizes), sizes[self.rank])

    @torch.compiler.disable
    def _told_sizes(self, local: int) -> list[int]:
        if local not in self._told:
            sizes: list[Any] = [None] * self.ranks
            dist.all_gather_object(sizes, local, self.group)
            self._told[local] = sizes
        return self._told[local]

    def start(self, sizes: Sequence[int]) -> int:
        """The place of this rank's first token among all."""
        return sum(sizes[: self.rank])

    def to_heads(
        self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], before: int = 0, after: int = 0, videos: int = 1
    ) -> tuple[torch.Tensor, ...]:
        """All tokens of this rank's heads, `[batch, before + sum(sizes) + after, heads / ranks, head_dim]` each.

        Args:
            tensors: `[batch, before + local + after, heads, head_dim]` each, exchanged together. Heads are filled up
                with zeros to a multiple of `ranks`.
            sizes: every rank's `local`.
            before: text tokens before the video, equal on all ranks.
            after: text tokens after it.
            videos: how many of equal size lie one after the other, each split by itself; without text.
        """
        _, length, heads, _ = tensors[0].shape
        # Text comes from the ranks at both ends, so that it arrives in its place.
        begin, end = (0 if self.rank == 0 else before), (length if self.rank == self.ranks - 1 else length - after)
        share = -(-heads // self.ranks)
        parts = []
        for tensor in tensors:
            rows = tensor[:, begin:end].to(tensors[0].dtype)
            if share * self.ranks > heads:
                rows = F.pad(rows, (0, 0, 0, share * self.ranks - heads))
            parts.append(rows.unflatten(2, (self.ranks, share)).permute(2, 1, 0, 3, 4))
        sent = torch.stack(parts, 3).flatten(0, 1)
        counts = [videos * size for size in sizes]
        counts[0] += before
        counts[-1] += after
        received = self._all_to_all(sent, counts, [end - begin] * self.ranks)
        if videos > 1:
            pieces = received.split([size for size in sizes for _ in range(videos)])
            received = torch.cat([piece for video in range(videos) for piece in pieces[video::videos]])
        return tuple(each.transpose(0, 1) for each in received.unbind(2))

    def to_tokens(
        self,
        output: torch.Tensor,
        sizes: Sequence[int],
        heads: int,
        before: int = 0,
        after: int = 0,
        videos: int = 1,
    ) -> torch.Tensor:
        """The inverse for one tensor: all `heads` of this rank's tokens, and of the text around them.

        Args:
            output: `[batch, before + sum(sizes) + after, heads / ranks, head_dim]`.
            sizes: every rank's number of video tokens.
            heads: how many there are in all.
            before: text tokens before the video, which every rank gets.
            after: text tokens after it.
            videos: as in `to_heads`.
        """
        rows = output.transpose(0, 1)
        if before or after:
            text_before, video, text_after = rows.split([before, sum(sizes), after])
            rows = torch.cat([part for own in video.split(list(sizes)) for part in (text_before, own, text_after)])
        elif videos > 1:
            pieces = rows.split(list(sizes) * videos)
            rows = torch.cat([piece for rank in range(self.ranks) for piece in pieces[rank :: self.ranks]])
        own = before + videos * sizes[self.rank] + after
        received = self._all_to_all(rows, [own] * self.ranks, [before + videos * size + after for size in sizes])
        joined = received.unflatten(0, (self.ranks, own)).permute(2, 1, 0, 3, 4).flatten(2, 3)
        return joined[:, :, :heads]

    def gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The parts of all ranks joined along `dim`; a gradient returns as the sum of what all ranks' copies got."""
        rows = tensor.movedim(dim, 0)
        local = rows.shape[0]
        sent = rows.expand(self.ranks, *rows.shape).flatten(0, 1)
        return self._all_to_all(sent, self.sizes(local), [local] * self.ranks).movedim(0, dim)

    def _all_to_all(self, rows: torch.Tensor, received: list[int], sent: list[int]) -> torch.Tensor:
        rows = rows.contiguous()
        needs_gradient = torch.is_grad_enabled() and rows.requires_grad
        function = funcol.all_to_all_single_autograd if needs_gradient else funcol.all_to_all_single
        result = function(rows, received, sent, self.group)
        return result.wait() if isinstance(result, funcol.AsyncCollectiveTensor) else result


def exchange_of(config: Any) -> Exchange | None:
    """The exchange of diffusers' `ParallelConfig` or `ContextParallelConfig`; `None` where there is none to make.

    The ranks of a ring within Ulysses hold parts of the sequence, too, so all of them take part.
    """
    config = getattr(config, "context_parallel_config", config)
    if getattr(config, "_flattened_mesh", None) is None or config.ulysses_degree == 1:
        return None
    exchange = getattr(config, _EXCHANGE, None)
    if exchange is None:
        group = config._flattened_mesh.get_group()
        exchange = Exchange(group, dist.get_rank(group), dist.get_world_size(group), config.ulysses_anything)
        setattr(config, _EXCHANGE, exchange)
    return exchange


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_mask: torch.Tensor | None, backend: Any
) -> torch.Tensor:
    """Attention of `[batch, sequence, heads, head_dim]` by one of diffusers' backends; `key_mask` `[batch, keys]`."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    mask = None if key_mask is None else key_mask[:, None, None]
    return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend)
