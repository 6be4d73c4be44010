"""What the attention processors of all families share."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from .attention import video_sparse_attention
from .calls import running
from .config import VSAConfig
from .gate_state import is_trained
from .layer_skip import why_scores_are_skipped
from .parallel import RING, Exchange, dense_attention, exchange_of
from .record import DENSE_STEP, GRID, STEP
from .running import RunningForward
from .schedule import AUTO
from .wording import as_arguments, settings

logger = logging.getLogger(__name__)

TRAINED_BLOCK_SIZE = (4, 4, 4)
"""Of published models with gates, and of the operation."""
DENSE = ()
"""In the place of a video shape: attention over all tokens, which several ranks hold together."""
DENSE_LAYER = "this layer is one of those that stay dense"
WITH_COARSE = ("gate", "sum")
"""Ways to combine in which the coarse branch is a term of its own, part of what the model learned."""


class FamilyAttnProcessor:
    """Base of one small processor per attention shape. Subclasses project, call `attend`, and finish.

    Args:
        config: with choices settled: see `settle_choices`.
        original: the processor that this one stands in for; it serves every call that must be dense.
        state: what is known of the running forward.
        name: the attention module's name, for messages.
        strict: raise if the tokens do not match the video shape; otherwise run dense.
    """

    stock: type
    """The processor that diffusers gives such a module, able to serve every call to its class."""
    __call__: Callable[..., Any]
    streams: tuple[str, ...] = ("hidden_states",)
    """The first arguments of the attention module's forward, of each of which it returns an output."""
    surplus: str | None = None
    """Where tokens beyond the grid sit in this family's video stream: "before", "after", or None if there are none."""
    stays_dense: bool = False
    """Whether all tiles are kept at every call: to make several ranks attend together, or for a trained gate's sake."""
    only_video: bool = True
    """Whether the modules' class attends within the video only; in some families text or audio layers share it."""
    operation: Callable[..., torch.Tensor] | None = None
    """What sparse calls go to instead of `video_sparse_attention`: an inspection sets its own on the instance."""

    def __init__(self, config: VSAConfig, original: Any, state: RunningForward, name: str = "", strict: bool = False):
        self.config = config
        self.original = original
        self.state = state
        self.name = name
        self.strict = strict
        self.owner: Any = None
        self.is_video = True
        self._logged: set[str] = set()

    @classmethod
    def stand_in(cls, config: VSAConfig, attn: torch.nn.Module) -> FamilyAttnProcessor:
        """For a module whose place in the transformer is unknown: only the number of tokens tells that it is video."""
        strict = cls.only_video and cls.surplus is None
        processor = cls(settle_choices(config, attn), cls.stock(), RunningForward(), strict=strict)
        processor.surplus = None
        return processor

    def __repr__(self) -> str:
        if "original" not in vars(self):  # not yet initialised, as in the message that refuses it
            return super().__repr__()
        what = [self.name] if self.name else []
        what += [as_arguments(settings(self.config)), f"dense calls by {type(self.original).__name__}"]
        return f"{type(self).__name__}({', '.join(what)})"

    @staticmethod
    def tiled_grid(grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """The grid that is cut into tiles, for a transformer's `(T, H, W)`: one family attends over two videos."""
        return grid

    # diffusers sets these two on every processor that has them; they belong to the dense attention.
    @property
    def _attention_backend(self) -> Any:
        return getattr(self.original, "_attention_backend", None)

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.original._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return getattr(self.original, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.original._parallel_config = config

    @property
    def exchange(self) -> Exchange | None:
        """With the ranks that have the rest of the tokens; `None` where this one has all of them."""
        # Kept with the config, not here: the processor that this one stands in for may be given another.
        config = self._parallel_config
        return None if config is None else exchange_of(config)

    def sparse_shape(
        self, sequence: int, attention_mask: torch.Tensor | None, obstacle: str | None = None
    ) -> tuple[int, ...] | None:
        """The video shape if this call can be sparse. If it cannot, `None`, and the reason is logged, once per reason.

        Dense steps and layers of what has a coarse branch keep it: they count as sparse, and keep all tiles. Where
        other ranks have the rest of the tokens, the processor that this one stands in for would attend to its own: a
        dense call is `DENSE` there, and goes through `attend`, too.

        Args:
            sequence: number of tokens in the video stream, without a text stream that `attend` gets as `text`.
            attention_mask: the call's mask, unless it becomes the `text_mask` of `attend`.
            obstacle: the family's own reason why this call cannot be sparse, if there is one.

        Raises:
            ValueError: the user's own `video_shape` does not match the `sequence` tokens; or a dense call is one that
                several ranks cannot make together, or one that would lose the coarse branch.
        """
        if not self.is_video:
            return None
        exchange = self.exchange
        if not torch.compiler.is_compiling() and not self.state.is_active:
            self.state.catch_up(sequence if exchange is None else sum(exchange.sizes(sequence)))
        shape = self.state.video_shape or self.config.video_shape
        if exchange is not None:
            sequence = self._all_tokens(sequence, shape)
        kind, reason = self._why_dense(shape, sequence, attention_mask, obstacle)
        if reason is None:
            return shape
        if self.keeps_coarse and kind != "scores":
            raise ValueError(
                f"{self.name or 'attention'} cannot run dense without the coarse branch that combine="
                f'"{self.config.combine}" adds, and that is not known here, since {reason}; mend that, or choose '
                'combine="sparse" to leave the branch out.'
            )
        if exchange is not None and (obstacle or attention_mask is not None):
            raise ValueError(
                f"{self.name or 'attention'} runs dense, since {reason}, and such calls are not served under context "
                "parallelism; call the pipeline without enable_parallelism."
            )
        if not torch.compiler.is_compiling() and not self.stays_dense:
            self._say_dense(kind, reason)
        return None if exchange is None else DENSE

    def _say_dense(self, kind: str, reason: str) -> None:
        """To the transformer's hooks, which count it and log it once for all modules; without them, log it here."""
        if running.tally is not None:
            running.tally.add_dense(kind, reason, self.name)
        elif kind not in self._logged:
            self._logged.add(kind)
            level = logging.INFO if kind == STEP else logging.WARNING
            logger.log(level, "%s runs dense: %s.", self.name or "attention", reason)

    @property
    def keeps_coarse(self) -> bool:
        """Whether its dense calls are those with all tiles kept, since stock attention lacks the coarse branch."""
        return self.config.combine in WITH_COARSE

    def _all_tokens(self, local: int, shape: tuple[int, int, int] | None) -> int:
        """The number of tokens on all ranks together, for that of this one."""
        assert self.exchange is not None
        sizes = self._sizes(local, shape)
        if sizes[self.exchange.rank] != local:
            raise ValueError(
                f"{self.name or 'attention'}: video_shape={shape} has {math.prod(shape or ())} tokens, of which rank "
                f"{self.exchange.rank} of {self.exchange.ranks} would have {sizes[self.exchange.rank]}, but it has "
                f"{local}; pass the (T, H, W) grid of the whole video after patchification."
            )
        return sum(sizes)

    def _sizes(self, local: int, shape: tuple[int, ...] | None, videos: int = 1) -> list[int]:
        """Number of tokens of every rank, of one video."""
        assert self.exchange is not None
        return self.exchange.sizes(local, math.prod(shape) // videos if shape and self.surplus is None else None)

    def _why_dense(
        self,
        shape: tuple[int, int, int] | None,
        sequence: int,
        attention_mask: torch.Tensor | None,
        obstacle: str | None,
    ) -> tuple[str, str | None]:
        """The kind of the reason, which is logged once, and the reason; `None` if there is none."""
        reasons = {
            obstacle or "": obstacle,
            "scores": why_scores_are_skipped(),
            "layer": DENSE_LAYER if self.stays_dense and not self.keeps_coarse else None,
            STEP: DENSE_STEP if self.state.dense_step and not self.keeps_coarse else None,
            "mask": None if attention_mask is None else "the call has an attention mask",
            "parallel": RING if self._parallel_config is not None and self.exchange is None else None,
        }
        for kind, reason in reasons.items():
            if reason is not None:
                return kind, reason
        if shape is None:
            return GRID, self.state.reason
        tokens = math.prod(shape)
        if tokens == sequence or (tokens < sequence and self.surplus is not None):
            return "", None
        mismatch = f"video_shape={shape} has {tokens} tokens, but the attention sees {sequence}"
        if self.strict:
            raise ValueError(
                f"{self.name or 'attention'}: {mismatch}; pass the (T, H, W) grid after patchification, or leave "
                "video_shape out, which is then read from the transformer's inputs."
            )
        return "tokens", mismatch

    def uses_gate_since(self, attn: torch.nn.Module, asked: VSAConfig) -> bool:
        """Settle what was asked for anew, and say whether the gate is used now; looks at the gate's values."""
        if isinstance(asked.block_size, str):
            if is_trained(attn):
                logger.warning(
                    '%s has trained gates now, which block_size="auto" cannot use; call enable_vsa with the block size '
                    "that they were trained for.",
                    self.name or "attention",
                )
            return False
        settled = settle_choices(asked, attn, self.name)
        if settled.combine != "gate":
            return False
        choices = {name: getattr(settled, name) for name in ("combine", "selection", "block_size")}
        schedule = settled.schedule if asked.schedule == "auto" else self.config.schedule
        self.config = replace(self.config, **choices, schedule=schedule)
        return True

    def dense_processor(self, attn: torch.nn.Module) -> Any:
        """What serves the module's dense calls."""
        return self.original

    def is_in_place(self, found: Any) -> bool:
        """Whether a module's processor is this one, perhaps behind one that serves several modules."""
        return found is self or found is self.owner

    def attend(
        self,
        attn: torch.nn.Module,
        shape: tuple[int, ...],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        hidden: torch.Tensor,
        text: tuple[int, int] = (0, 0),
        text_mask: torch.Tensor | None = None,
        videos: int = 1,
    ) -> torch.Tensor:
        """Sparse attention of `[batch, sequence, heads, head_dim]`; the gate, if any, is projected from `hidden`.

        Where several ranks have the tokens, each attends to all of them with a part of the heads in between.

        Args:
            shape: what `sparse_shape` returned.
            hidden: the video stream `[batch, sequence without text, channels]`, surplus tokens included.
            text: number of text tokens before and after the video stream in `query`, `key` and `value`.
            text_mask: bool `[batch, sum(text)]`, False where text is padding.
            videos: how many of one size make up the grid, one after the other.
        """
        tensors = list(_autocast(query, key, value))
        if shape and self.config.combine == "gate":
            gate = attn.to_gate_compress(hidden).unflatten(-1, query.shape[2:])
            if gate.shape != query.shape:
                gate = F.pad(gate, (0, 0, 0, 0, text[0], query.shape[1] - text[0] - gate.shape[1]))
            tensors.append(gate)
        if self.exchange is None:
            return self._attend(shape, tensors, text, text_mask)
        sizes = self._sizes((query.shape[1] - sum(text)) // videos, shape, videos)
        output = self._attend(shape, self.exchange.to_heads(tensors, sizes, *text, videos), text, text_mask)
        return self.exchange.to_tokens(output, sizes, query.shape[2], *text, videos)

    def _attend(
        self,
        shape: tuple[int, ...],
        tensors: Sequence[torch.Tensor],
        text: tuple[int, int],
        text_mask: torch.Tensor | None,
        combine: str | None = None,
    ) -> torch.Tensor:
        """Attention over whole sequences: query, key, value, and perhaps the gate; `combine` as in the config."""
        query, key, value, *gate = tensors
        before, after = text
        surplus = query.shape[1] - math.prod(shape) - before - after if shape else query.shape[1] - before - after
        if surplus and text_mask is not None:
            text_mask = torch.cat(
                [text_mask[:, :before], text_mask.new_ones(len(text_mask), surplus), text_mask[:, before:]], 1
            )
        if not shape:
            return dense_attention(query, key, value, text_mask, self._attention_backend)
        return (self.operation or video_sparse_attention)(
            query,
            key,
            value,
            shape,
            **self._tiles(),
            gate=gate[0] if gate else None,
            combine=combine or self.config.combine,
            context_tokens=(before + surplus, after) if self.surplus == "before" else (before, after + surplus),
            context_mask=text_mask,
            selection=self.config.selection,
            implementation=self.config.implementation,
        )

    def _tiles(self) -> dict[str, Any]:
        """The arguments that say how tokens are cut, and how many tiles are kept: settled once for a forward."""
        kept = self.state.kept
        if kept is None:
            config = self.config
            return {"block_size": config.block_size, "top_k": config.top_k, "top_k_ratio": config.top_k_ratio}
        return {"block_size": self.state.block_size, "top_k": kept}


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Under autocast, what `scaled_dot_product_attention` would compute in; norms may have left fp32 behind."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def dense_processor(processor: Any, attn: torch.nn.Module) -> Any:
    """What serves a module's dense calls, where `processor` may be one of ours already."""
    ours = getattr(processor, "dense_processor", None)
    return processor if ours is None else ours(attn)


def settle_choices(config: VSAConfig, attn: torch.nn.Module, name: str = "") -> VSAConfig:
    """Settle `combine`, `selection`, `block_size` and `schedule`, where left open, for one attention module.

    Looks at the gate's values, so call it outside of the loop.

    Raises:
        ValueError: `combine="gate"`, and the module has no `to_gate_compress`.
    """
    gate = getattr(attn, "to_gate_compress", None)
    if config.combine == "gate" and gate is None:
        raise ValueError(
            f'combine="gate" needs gates, but {name or type(attn).__name__} has no to_gate_compress; load trained ones '
            'with load_gates(transformer, path), add new ones with add_gate_compress(transformer), or use "merge".'
        )
    if config.combine != "auto":
        return _settled(config, config.combine)
    return _settled(config, "gate" if is_trained(attn) else "merge")


def _settled(config: VSAConfig, combine: str) -> VSAConfig:
    selection, block_size = config.selection, config.block_size
    if selection == "auto":
        selection = "quarters" if combine == "merge" else "mean"
    if block_size is None:
        block_size = "auto" if combine == "merge" else TRAINED_BLOCK_SIZE
    schedule = config.schedule
    if schedule == "auto":
        schedule = AUTO if combine == "merge" and config.top_k is None else "constant"
    return replace(config, combine=combine, selection=selection, block_size=block_size, schedule=schedule)


def dense_gate_configs(
    config: VSAConfig | Mapping[str, Any],
    asked: Mapping[str, VSAConfig],
    configs: Mapping[str, VSAConfig],
    modules: Mapping[str, torch.nn.Module],
) -> dict[str, VSAConfig]:
    """For modules that stay dense though they have trained gates: settings for dense attention plus the gated branch.

    None where the config leaves gates out by its choice of `combine`.

    Args:
        config: as it was given.
        asked: the configs of the modules that become sparse.
        configs: the same with choices settled.
        modules: all video self-attention modules.
    """
    combines = {each.combine for each in asked.values()}
    if isinstance(config, VSAConfig):
        combines.add(config.combine)
    if combines and combines.isdisjoint(("auto", "gate")):
        return {}
    trained = [name for name, attn in modules.items() if name not in configs and is_trained(attn)]
    if not trained:
        return {}
    like = next((each for each in configs.values() if each.combine == "gate"), None)
    if like is None:
        shape = next((each.video_shape for each in configs.values()), None)
        like = config if isinstance(config, VSAConfig) else VSAConfig(video_shape=shape)
    everywhere: dict[str, Any] = dict(dense_steps=0, dense_layers=(), modules=None, schedule="constant")
    whole = replace(like, top_k=None, top_k_ratio=1.0, combine="gate", **everywhere)
    return dict.fromkeys(trained, _settled(whole, "gate"))
