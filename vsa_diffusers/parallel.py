"""Context parallelism over several GPUs: every rank has a part of the tokens, attention needs all of them.

Ulysses: one exchange gives each rank all tokens of a part of the heads, another one gives its own tokens back. Both
count text, which every rank has whole, once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
        rows = [tensor[:, begin:end].to(tensors[0].dtype) for tensor in tensors]
        share = -(-heads // self.ranks)
        counts = [videos * size for size in sizes]
        counts[0] += before
        counts[-1] += after
        if _is_recorded(rows):
            filled = [F.pad(each, (0, 0, 0, share * self.ranks - heads)) for each in rows]
            parts = [each.unflatten(2, (self.ranks, share)).permute(2, 1, 0, 3, 4) for each in filled]
            received = self._all_to_all(torch.stack(parts, 3).flatten(0, 1), counts, [end - begin] * self.ranks)
        else:
            received = self._heads_now(rows, share, counts)
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
        first, *pieces, last = output.transpose(0, 1).split([before, *list(sizes) * videos, after])
        of_ranks = [[first, *pieces[rank :: self.ranks], last] for rank in range(self.ranks)]
        own = before + videos * sizes[self.rank] + after
        if _is_recorded([output]):
            rows = torch.cat([piece for of_rank in of_ranks for piece in of_rank])
            counts = [before + videos * size + after for size in sizes]
            received = self._all_to_all(rows, [own] * self.ranks, counts)
            joined = received.unflatten(0, (self.ranks, own)).permute(2, 1, 0, 3, 4)
        else:
            joined = self._tokens_now(of_ranks, own)
        return joined.flatten(2, 3)[:, :, :heads]

    def _heads_now(self, rows: Sequence[torch.Tensor], share: int, counts: Sequence[int]) -> torch.Tensor:
        """Rows of all ranks, `[tokens, batch, tensors, share, head_dim]`, from `[batch, tokens, heads, head_dim]`."""
        batch, tokens, heads, head_dim = rows[0].shape
        form = (batch, len(rows), share, head_dim)
        received = rows[0].new_empty(sum(counts), *form)
        parts = received.split(list(counts))

        def fill(part: torch.Tensor, rank: int) -> torch.Tensor:
            begin, end = (min(heads, share * each) for each in (rank, rank + 1))
            for index, each in enumerate(rows):
                _copy(part[:, :, index, : end - begin], each[:, :, begin:end].transpose(0, 1))
            part[:, :, :, end - begin :] = 0
            return part

        sent = {rank: fill(rows[0].new_empty(tokens, *form), rank) for rank in self._others}
        self._swap(sent, {rank: parts[rank] for rank in sent}, lambda: fill(parts[self.rank], self.rank))
        return received

    def _tokens_now(self, of_ranks: Sequence[Sequence[torch.Tensor]], own: int) -> torch.Tensor:
        """`[batch, own, ranks, share, head_dim]` from the pieces of each rank, `[tokens, batch, share, head_dim]`."""
        form = of_ranks[0][0].shape[1:]
        joined = of_ranks[0][0].new_empty(form[0], own, self.ranks, *form[1:])

        def rows_of(rank: int) -> torch.Tensor:
            pieces = [piece for piece in of_ranks[rank] if len(piece)]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

        def place(rank: int, rows: torch.Tensor) -> None:
            _copy(joined[:, :, rank], rows.transpose(0, 1))

        sent = {rank: rows_of(rank).contiguous() for rank in self._others}
        received = {rank: joined.new_empty(own, *form) for rank in sent}
        self._swap(sent, received, lambda: place(self.rank, rows_of(self.rank)))
        for rank, rows in received.items():
            place(rank, rows)
        return joined

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(self.ranks) if rank != self.rank]

    def _swap(
        self, sent: Mapping[int, torch.Tensor], received: Mapping[int, torch.Tensor], meanwhile: Callable[[], object]
    ) -> None:
        """Send to other ranks and receive from them, and do what needs neither meanwhile."""
        transfers = []
        for function, tensors in ((dist.isend, sent), (dist.irecv, received)):
            for rank, tensor in tensors.items():
                if tensor.numel():
                    peer = dist.get_global_rank(self.group, rank)
                    transfers.append(dist.P2POp(function, tensor, peer, self.group))
        works = dist.batch_isend_irecv(transfers) if transfers else []
        meanwhile()
        for work in works:
            work.wait()

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


def _is_recorded(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether gradients or a compiler have to see what is done."""
    return torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(each.requires_grad for each in tensors))


_WIDEST = 16  # bytes


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """`target.copy_(source)` by 16 bytes at a time where that fits; PyTorch copies strided tensors by elements."""
    size = source.element_size()
    wide = _WIDEST // size
    if all(
        each.stride(-1) == 1
        and each.shape[-1] % wide == 0
        and each.storage_offset() % wide == 0
        and each.data_ptr() % _WIDEST == 0
        and all(stride % wide == 0 for stride in each.stride()[:-1])
        for each in (target, source)
    ):
        target, source = target.view(torch.complex128), source.view(torch.complex128)
    target.copy_(source)


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
