"""What a transformer's processors know of the forward that is running, and the hooks that tell them.

Such state belongs to the thread that runs the forward: several pipelines may call one transformer at once.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from .calls import Tally, running
from .facts import NOTHING, Facts, Grid, facts_of
from .gate_state import gate_version, is_trained
from .record import Record
from .schedule import RatioSchedule, needs_position
from .steps import Position, position_in_run

logger = logging.getLogger(__name__)

ByPlace = Mapping[int, "Facts"]
"""The facts of one forward, by the place of the state that is told them."""
MAX_PENDING = 8
_BY_HAND = "_vsa_processor_hooks"
CHECKPOINTING = "_gradient_checkpointing_func"


class RunningForward(threading.local):
    """The facts of the forward that this thread runs, as its processors read them, compiled or not.

    Args:
        hooks: of the transformer; `None` for a module that is called by itself.
        place: which of the transformer's configs this is.
    """

    # A thread-local object is initialised once in every thread that looks at it.
    def __init__(self, hooks: ForwardHooks | None = None, place: int = 0):
        self.hooks = hooks
        self.place = place
        self.is_active = False
        self.position: Position | None = None
        self.set(NOTHING)

    def __reduce__(self) -> tuple[Any, ...]:
        return RunningForward, (self.hooks, self.place)

    def set(self, facts: Facts) -> None:
        """Make these the facts that the processors see."""
        self.facts = facts
        self.dense_step = facts.dense_step
        self.reason = facts.reason
        # Kept as the shapes of empty tensors: torch.compile makes sizes of tensors dynamic, but bakes in numbers.
        self._grid = None if facts.grid is None else torch.empty(1).expand(facts.grid)
        self._block_size = None if facts.block_size is None else torch.empty(1).expand(facts.block_size)
        self._kept = None if facts.kept is None else torch.empty(1).expand(facts.kept)
        self._segments = None if facts.segments is None else torch.empty(1).expand(facts.segments or (0,))
        if self._kept is not None:
            torch._dynamo.maybe_mark_dynamic(self._kept, 0)

    @property
    def video_shape(self) -> Grid | None:
        """`(T, H, W)`, or `None` if the transformer's inputs did not tell."""
        if self._grid is None:
            return None
        frames, height, width = self._grid.shape
        return frames, height, width

    @property
    def block_size(self) -> Grid | None:
        """The tiles' extents; `None` where there is no grid."""
        if self._block_size is None:
            return None
        t, h, w = self._block_size.shape
        return t, h, w

    @property
    def kept(self) -> int | None:
        """Number of key tiles that each query tile keeps; `None` where there is no grid."""
        return None if self._kept is None else self._kept.shape[0]

    @property
    def segments(self) -> tuple[int, ...] | None:
        """Numbers of the rows before the video, by kind; `None` where they are not told."""
        return None if self._segments is None else tuple(self._segments.shape)

    def catch_up(self, sequence: int) -> None:
        """Learn the facts where the hooks did not run in this thread: see `ForwardHooks.facts_without_hooks`."""
        facts = None if self.hooks is None else self.hooks.facts_without_hooks(sequence)
        self.set(NOTHING if facts is None else facts.get(self.place, NOTHING))


class ReadsGrid(Protocol):
    """What the hooks need of a model family."""

    def grid(self, transformer: torch.nn.Module, inputs: Mapping[str, Any]) -> tuple[Grid | None, str | None]: ...
    def segments(self, transformer: torch.nn.Module, inputs: Mapping[str, Any]) -> tuple[int, ...] | None: ...
    def prepare(self, transformer: torch.nn.Module) -> None: ...


class ForwardHooks:
    """Hooks of one transformer, before and after its forward, that tell its processors what is running.

    PyTorch runs them before the hooks of diffusers and accelerate, so they see the inputs whole.

    Args:
        transformer: gets the hooks with `register`.
        family: reads the grid.
        leave: remove themselves once none of the processors is in its place any more.
        label: the transformer's name in messages; `None` is that of its class.
    """

    def __init__(self, transformer: torch.nn.Module, family: ReadsGrid, leave: bool = False, label: str | None = None):
        self.transformer = transformer
        self.family = family
        self.leave = leave
        self.label = label or type(transformer).__name__
        self.record = Record()
        self.were_in_place = False
        self.parameters = list(inspect.signature(type(transformer).forward).parameters)[1:]
        self._processors: dict[str, tuple[torch.nn.Module, Any]] = {}
        self._states: dict[Any, RunningForward] = {}
        self._handles: list[Any] = []
        # Versions of the gates that were not trained when "auto" was settled.
        self._gates: dict[str, tuple[Any, Any]] = {}
        # The same of modules that stay dense, with the modules.
        self._dense_gates: dict[str, tuple[Any, Any]] = {}
        self._told: set[str] = set()
        # Facts of the forwards that a backward pass may run again.
        self._pending: list[ByPlace] = []
        self._recalled = False

    @classmethod
    def set_by_hand(cls, transformer: torch.nn.Module, family: ReadsGrid) -> ForwardHooks:
        """Those that processors set by hand share, one for each module perhaps; made and registered if need be."""
        hooks = hooks_by_hand(transformer)
        if hooks is None:
            hooks = cls(transformer, family, leave=True)
            hooks.register_alone()
        return hooks

    def state_for(self, config: Any, tiled_grid: Callable[[Grid], Grid], stays_dense: bool = False) -> RunningForward:
        """The state that all processors share whose tiles are cut alike: see `FamilyAttnProcessor.tiled_grid`.

        Args:
            config: the processor's, choices settled. `set_top_k_ratio` changes that of all of them alike.
            tiled_grid: the processor's.
            stays_dense: the processor's.
        """
        # One dense step equals all of them, 1 == 1.0, but is not the same.
        key = (config, type(config.dense_steps), tiled_grid, stays_dense)
        return self._states.setdefault(key, RunningForward(self, len(self._states)))

    def watch(self, name: str, attn: torch.nn.Module, processor: Any, asked: Any) -> None:
        """Tell this processor of a module; notice if it is replaced, or its gate trained.

        Args:
            name: the module's.
            attn: the module.
            processor: its own; has a `config`, whose choices are settled, and a `state`.
            asked: the config as it was asked for, choices perhaps "auto".
        """
        self._processors[name] = (attn, processor)
        if asked.combine == "auto" and processor.config.combine != "gate":
            self._gates[name] = (asked, gate_version(attn))
        else:
            self._gates.pop(name, None)

    def watch_dense(self, name: str, attn: torch.nn.Module) -> None:
        """Notice if the gate of a module that stays dense, with its stock processor, is loaded or trained."""
        self._dense_gates[name] = (attn, gate_version(attn))

    def register(self) -> None:
        """Begin."""
        self._handles += [
            self.transformer.register_forward_pre_hook(self.before, with_kwargs=True),
            self.transformer.register_forward_hook(self.after, always_call=True),
        ]

    def register_alone(self) -> None:
        """Begin, in the place of other hooks of processors that were set by hand."""
        others = getattr(self.transformer, _BY_HAND, None)
        if others is not None:
            others.remove()
        setattr(self.transformer, _BY_HAND, self)
        self.register()

    def remove(self) -> None:
        """End; once more is harmless."""
        if vars(self.transformer).get(_BY_HAND) is self:
            delattr(self.transformer, _BY_HAND)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        checkpointing = getattr(self.transformer, CHECKPOINTING, None)
        if isinstance(checkpointing, Checkpointing):
            setattr(self.transformer, CHECKPOINTING, checkpointing.function)

    # What changes with every call would, compiled, be a new graph for every call.
    @torch.compiler.disable
    def before(self, transformer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Learn the grid and the step of the forward that begins."""
        self._notice_replaced_processors()
        self._notice_trained_gates()
        self._notice_trained_gates_of_dense_modules()
        self.family.prepare(transformer)
        facts = self._facts(transformer, args, kwargs)
        self._tell(facts)
        running.tally = Tally() if self._handles else None
        if torch.is_grad_enabled():
            self._remember(facts)
            self._carry_facts_into_checkpointing()

    @torch.compiler.disable
    def after(self, transformer: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forget it: what is called without the hooks must not see the last forward's grid."""
        tally, running.tally = running.tally, None
        if tally is not None:
            self.record.add(self.label, tally, self.sparse_processors())
        self._tell(None)

    def sparse_processors(self) -> dict[str, Any]:
        """Those that are in the place of a video self-attention module, by its name."""
        replaced = self.replaced_processors()
        return {
            name: processor
            for name, (_, processor) in self._processors.items()
            if processor.is_video and name not in replaced
        }

    def told(self) -> ByPlace:
        """What this thread's states were told last."""
        return {place: leader.state.facts for place, leader in self._leaders().items()}

    def _tell(self, facts: ByPlace | None) -> None:
        for place, leader in self._leaders().items():
            leader.state.is_active = facts is not None
            leader.state.set(NOTHING if facts is None else facts.get(place, NOTHING))

    def facts_without_hooks(self, sequence: int) -> ByPlace | None:
        """In a backward pass that runs a block again, the facts of the forward it is from.

        Otherwise those of the call of the transformer that leads here, if it began before the hooks were there.

        Raises:
            RuntimeError: several forwards may be the one that is run again.
        """
        if not self._handles:
            return None
        if in_backward():
            return self._recall(sequence)
        call = calling_transformer(lambda module: module is self.transformer)
        return None if call is None else self._facts(*call)

    def _facts(self, transformer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ByPlace:
        inputs = dict(zip(self.parameters, args, strict=False)) | kwargs
        grid, reason = self.family.grid(transformer, inputs)
        segments = self.family.segments(transformer, inputs)
        leaders = self._leaders()
        position = None
        configs = [leader.config for leader in leaders.values()]
        if any(needs_position(config.schedule, config.dense_steps) for config in configs):
            position = position_in_run()
            if position is None:
                self._warn_unknown_step(configs)
            else:
                self._tell_dense_steps(position)
        facts = {place: facts_of(leader, grid, reason, position) for place, leader in leaders.items()}
        return facts if segments is None else {place: replace(each, segments=segments) for place, each in facts.items()}

    def _leaders(self) -> dict[int, Any]:
        """One processor by place for each state that has any; trained gates may leave states without."""
        return {processor.state.place: processor for _, processor in self._processors.values()}

    def _remember(self, facts: ByPlace) -> None:
        if self._recalled:
            self._pending.clear()
            self._recalled = False
        if facts not in self._pending:
            self._pending.append(facts)
            del self._pending[:-MAX_PENDING]

    def _recall(self, sequence: int) -> ByPlace | None:
        self._recalled = True
        fitting = list(self._pending)
        if len(fitting) > 1:
            exact = [facts for facts in fitting if _tokens(facts) == sequence]
            fitting = exact or [facts for facts in fitting if _tokens(facts) < sequence]
        if len(fitting) > 1:
            raise RuntimeError(
                f"a backward pass runs attention over {sequence} tokens again, and {len(fitting)} forwards before it "
                "may be meant; call backward() after each forward whose video size, ratio or step differs, or use the "
                "transformer's enable_gradient_checkpointing()."
            )
        return fitting[0] if fitting else None

    def replaced_processors(self) -> dict[str, str]:
        """Class names of the processors that have taken a watched one's place, by module."""
        return {
            name: type(found).__name__
            for name, (attn, processor) in self._processors.items()
            if not processor.is_in_place(found := getattr(attn, "processor", processor))
        }

    def _notice_replaced_processors(self) -> None:
        replaced = self.replaced_processors()
        if self.leave and len(replaced) == len(self._processors):
            if self.were_in_place:
                self.remove()
            return
        self.were_in_place = True
        if not self._told.issuperset(replaced):
            self._told.update(replaced)
            logger.warning(
                "%s: %d of %d sparse modules had their processor replaced since and do not run sparse, among them %s; "
                "call enable_vsa again, after what replaced them.",
                self.label, len(replaced), len(self._processors),
                ", ".join(f"{name} ({what})" for name, what in list(replaced.items())[:3]),
            )  # fmt: skip

    def _notice_trained_gates(self) -> None:
        """Gates that were loaded or trained since are used from now on, as "auto" promises."""
        used = []
        for name, (asked, version) in list(self._gates.items()):
            attn, processor = self._processors[name]
            if (now := gate_version(attn)) == version:
                continue
            self._gates[name] = (asked, now)
            if processor.uses_gate_since(attn, asked):
                del self._gates[name]
                used.append(name)
                processor.state = self.state_for(processor.config, processor.tiled_grid)
        if used:
            logger.info(
                '%s: gates were loaded or trained since VSA was enabled; %d modules use them now (combine="gate").',
                self.label, len(used),
            )  # fmt: skip

    def _notice_trained_gates_of_dense_modules(self) -> None:
        """Their stock processors leave gates out, which enabling again exchanges."""
        changed = {name: attn for name, (attn, version) in self._dense_gates.items() if gate_version(attn) != version}
        for name, attn in changed.items():
            self._dense_gates[name] = (attn, gate_version(attn))
        trained = [name for name, attn in changed.items() if is_trained(attn)]
        if trained:
            logger.warning(
                "%s: gates were loaded or trained since VSA was enabled in %d modules that stay dense and leave them "
                "out, among them %s; call enable_vsa again.",
                self.label, len(trained), ", ".join(trained[:3]),
            )  # fmt: skip

    def _warn_unknown_step(self, configs: Sequence[Any]) -> None:
        """A budget is its mean without a run to be in, which is as it should be; anything else was meant for a run."""
        problems = {
            "dense_steps cannot be counted": any(config.dense_steps for config in configs),
            "the schedule cannot be followed": any(isinstance(config.schedule, RatioSchedule) for config in configs),
        }
        for problem, is_there in problems.items():
            if is_there and problem not in self._told:
                self._told.add(problem)
                logger.warning(
                    "%s: %s, since no denoising loop calls the transformer; it runs sparse, by the mean. Call it from "
                    "the pipeline, or from a loop `for i, t in enumerate(timesteps)`.",
                    self.label, problem,
                )  # fmt: skip

    def warn_of_a_mean_set_in_a_run(self, ratio: float) -> None:
        """Say once that `set_top_k_ratio` in a callback of a run changes all of its steps' ratios together."""
        problem = "mean set in a run"
        if problem not in self._told and position_in_run() is not None:
            self._told.add(problem)
            logger.warning(
                "%s: set_top_k_ratio(%g) within a run sets the mean of its budget, which is spent at the front; to set "
                'the ratio of each step, call enable_vsa with schedule="constant".',
                self.label, ratio,
            )  # fmt: skip

    def _tell_dense_steps(self, position: Position) -> None:
        """Once a run: the first step that is not behind this thread's last one begins another."""
        processors = [processor for _, processor in self._processors.values()]
        state = processors[0].state
        last, state.position = state.position, position
        if last is not None and last.total == position.total and last.step <= position.step:
            return
        for steps in sorted({processor.config.dense_steps for processor in processors}):
            if position.is_among_first(steps):
                count = min(position.count(steps), position.total)
                logger.info(
                    "%s: %d of %d steps run dense, from the first on (dense_steps=%s).",
                    self.label, count, position.total, steps,
                )  # fmt: skip

    def _carry_facts_into_checkpointing(self) -> None:
        """What gradient checkpointing runs again, in whatever thread, shall know what forward it is from."""
        if not getattr(self.transformer, "gradient_checkpointing", False):
            return
        function = getattr(self.transformer, CHECKPOINTING, None)
        if callable(function) and not isinstance(function, Checkpointing):
            setattr(self.transformer, CHECKPOINTING, Checkpointing(function, self))

    def run_again(self, facts: ByPlace, block: Callable[..., Any], *args: Any) -> Any:
        """Call a block; in a backward pass, with the facts of the forward that it is from."""
        if not in_backward():
            return block(*args)
        self._tell(facts)
        try:
            return block(*args)
        finally:
            self._tell(None)


class Checkpointing:
    """A transformer's gradient checkpointing, which hands the facts of the running forward to what it runs again.

    Args:
        function: the transformer's own, as diffusers or the user set it.
        hooks: of the transformer.
    """

    def __init__(self, function: Callable[..., Any], hooks: ForwardHooks):
        self.function = function
        self.hooks = hooks

    def __call__(self, block: Callable[..., Any], *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.function(block, *args)
        return self.function(functools.partial(self.hooks.run_again, self.hooks.told(), block), *args)


def hooks_by_hand(transformer: torch.nn.Module) -> ForwardHooks | None:
    """Those of processors that were set by hand, if there are any."""
    return vars(transformer).get(_BY_HAND)


def in_backward() -> bool:
    """Whether this thread runs a backward pass, as gradient checkpointing does when it runs a block again."""
    return torch._C._current_graph_task_id() >= 0


def calling_transformer(
    wanted: Callable[[torch.nn.Module], bool],
) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]] | None:
    """The innermost module among the callers that is `wanted`, and the arguments that it was called with."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is torch.nn.Module._wrapped_call_impl.__code__:
            call = frame.f_locals
            if wanted(call["self"]):
                return call["self"], call["args"], call["kwargs"]
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _tokens(facts: ByPlace) -> int:
    return math.prod(next(iter(facts.values())).grid or (0,))
