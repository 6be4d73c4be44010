"""What the package knows of a model family, as data."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..facts import UNREADABLE
from ..layer_skip import register_processor
from ..parallel import Exchange
from ..plans import Plan, prepare
from ..processor import FamilyAttnProcessor
from ..tiles import check_video_shape

Grid = tuple[int, int, int]
ReadGrid = Callable[[torch.nn.Module, Mapping[str, Any]], Grid | None]
ATTENTION = ("processor", "heads", "to_q", "to_k", "to_v", "to_out")
"""What the attention modules of most families have, and their processors use."""
NORMED = (*ATTENTION, "norm_q", "norm_k")
"""The same with norms of query and key, which may be `None`."""


@dataclass(frozen=True)
class Family:
    """Where a family of transformers has its video self-attention, and how to read its token grid.

    Args:
        name: the family's name in the docs.
        transformers: class names in diffusers.
        modules: regular expression that the full name of every video self-attention module matches.
        processor: serves these modules.
        read_grid: from the transformer and its forward's arguments by name, the grid `(T, H, W)`, or `None` where the
            arguments do not tell.
        query_projection: name of the query's projection in these modules; a gate has its sizes.
        checkpoints: public checkpoints, for the docs.
        stays_dense: what is never sparse in this family, for the docs.
        trained_gates: public checkpoints with trained gates, for the docs.
        foreign_gates: why public checkpoints' gates cannot be used in this family, for the docs and `load_gates`.
        processor_at: from the transformer and a module's name, its processor, where `processor` does not serve all.
        needs: attributes without which a module is not one that `processor` can serve.
        plan: how tokens are split over ranks, or that from the transformer; `None` leaves it to the user.
        parallel_obstacle: from the transformer, why its tokens cannot be split over ranks, or `None`.
        parallel_hooks: what the plan cannot say, as hooks; returns their handles.
        stock_ring: whether diffusers' own ring attention is right for it under the plan.
        gate_bias: whether its gates have a bias.
        read_segments: from the transformer and its forward's arguments by name, the numbers of the rows before the
            video, by kind; in families whose gated branch has tiles of them.
    """

    name: str
    transformers: tuple[str, ...]
    modules: str
    processor: type[FamilyAttnProcessor]
    read_grid: ReadGrid
    query_projection: str = "to_q"
    checkpoints: tuple[str, ...] = ()
    stays_dense: str = "cross-attention"
    trained_gates: tuple[str, ...] = ()
    foreign_gates: str = ""
    processor_at: Callable[[torch.nn.Module, str], type[FamilyAttnProcessor]] | None = None
    needs: tuple[str, ...] = ATTENTION
    plan: Plan | Callable[[torch.nn.Module], Plan] | None = None
    parallel_obstacle: Callable[[torch.nn.Module], str | None] | None = None
    parallel_hooks: Callable[[torch.nn.Module, Exchange], list[Any]] | None = None
    stock_ring: bool = False
    gate_bias: bool = True
    read_segments: Callable[[torch.nn.Module, Mapping[str, Any]], tuple[int, ...]] | None = None

    def why_not_parallel(self, transformer: torch.nn.Module) -> str | None:
        """Why the transformer's tokens cannot be split over ranks; `None` if they can."""
        return None if self.parallel_obstacle is None else self.parallel_obstacle(transformer)

    def context_parallel_plan(self, transformer: torch.nn.Module) -> Plan | None:
        """How its tokens are split over ranks; `None` where that is left to the user."""
        return self.plan(transformer) if callable(self.plan) else self.plan

    def hooks_for_ranks(self, transformer: torch.nn.Module, exchange: Exchange) -> list[Any]:
        """What the plan cannot say, as hooks; returns their handles."""
        return [] if self.parallel_hooks is None else self.parallel_hooks(transformer, exchange)

    def prepare(self, transformer: torch.nn.Module) -> None:
        """Before a forward: see `plans.prepare`."""
        prepare(transformer, self)

    def processor_of(self, transformer: torch.nn.Module, name: str) -> type[FamilyAttnProcessor]:
        """The processor that serves the module of this name, made known to diffusers' LayerSkip."""
        processor = self.processor if self.processor_at is None else self.processor_at(transformer, name)
        register_processor(processor, lambda attn: processor.streams)
        return processor

    def grid(self, transformer: torch.nn.Module, inputs: Mapping[str, Any]) -> tuple[Grid | None, str | None]:
        """The grid of the video tokens, or `None` and the reason why `inputs` do not tell.

        A forward whose arguments have other names, or a config without what the family's has, is such a reason: the
        class may be a subclass, or another package's of the same name.

        Args:
            transformer: of this family.
            inputs: its forward's arguments by name.
        """
        try:
            grid = self.read_grid(transformer, inputs)
        except KeyError as error:
            return None, f"{UNREADABLE} (forward has no {error}, but {', '.join(map(str, inputs)) or 'no arguments'})"
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            return None, f"{UNREADABLE} ({type(error).__name__}: {error})"
        if grid is None:
            return None, UNREADABLE
        try:
            return check_video_shape(grid), None
        except ValueError:
            return None, f"{UNREADABLE} ({grid!r} is not a grid of tokens)"

    def segments(self, transformer: torch.nn.Module, inputs: Mapping[str, Any]) -> tuple[int, ...] | None:
        """What `read_segments` reads; `None` where the family has no such branch, or `inputs` do not tell."""
        if self.read_segments is None:
            return None
        try:
            return self.read_segments(transformer, inputs)
        except (KeyError, AttributeError, IndexError, TypeError, ValueError):
            return None

    def video_modules(self, transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """The video self-attention modules by name, in the order of the transformer's blocks.

        Raises:
            ValueError: there are none, or they lack what `processor` needs.
        """
        found = {name: module for name, module in transformer.named_modules() if re.fullmatch(self.modules, name)}
        if not found:
            raise ValueError(
                f"{type(transformer).__name__} has no module whose name matches {self.modules!r}, where its video "
                "self-attention should be; correct the pattern given to register_transformer."
            )
        for name, module in found.items():
            missing = [attribute for attribute in self.needs if not hasattr(module, attribute)]
            if missing:
                raise ValueError(
                    f"{type(transformer).__name__} of {type(transformer).__module__} is not served as {self.name}: "
                    f"{name} ({type(module).__name__}) has no {', '.join(missing)}; teach your own class with "
                    "register_transformer."
                )
        return found


def patchified_grid(transformer: torch.nn.Module, inputs: Mapping[str, Any]) -> Grid:
    """Grid of `hidden_states` `[batch, channels, frames, height, width]` cut into `config.patch_size` patches."""
    return patches(inputs["hidden_states"].shape[-3:], transformer.config.patch_size)


def patches(extents: tuple[int, ...], patch_size: tuple[int, ...]) -> Grid:
    """The grid that `(frames, height, width)` latent cells make when cut into patches."""
    t, h, w = (extent // patch for extent, patch in zip(extents, patch_size, strict=True))
    return t, h, w
