"""`tune`: probe, search, confirm; and how budgets are tried until the target is met."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from diffusers import DiffusionPipeline

from ..attention import check_choice
from ..comparison import Comparison, Setting, compare
from ..comparison.api import facts_of, measure_settings
from ..comparison.measure import attending
from ..comparison.store import MemoryStore, Store, fingerprint, folder_of, scheduler_of, told
from ..config import VSAConfig
from ..extras import REPORTS, check_installed
from ..files import PathLike, replaced_file
from ..generation.calling import calls_by_prompt, number_of_steps, tells_steps
from ..generation.loading import compile_blocks, is_compiled
from ..generation.progress import Progress
from ..logs import warnings_only
from ..pipeline import supported_parts
from ..selection import SELECTIONS
from ..tiles import whole
from .probe import STEPS, Block, Probe, check_without_gates, probe
from .replay import Call, error_of, record
from .result import DEFAULT, Point, Tuning, best_of, is_beyond_chance
from .search import SHAPES, Allocation, Cost, Search, default_at
from .state import State
from .target import TOLERANCES, Target

CONFIG, RESULTS, REPORT, STATE, VIDEOS = "config.json", "results.json", "report.html", "state.json", "videos"
BLOCKS: tuple[Block, ...] = ("auto", (4, 4, 4))
FIRST_BUDGET = 0.35
PIVOT = "front"
"""The schedule by which the budget is found, at which all of them are compared."""
NEAR = 5
"""How many times its tolerance the target may be away there."""
LEAST_BUDGET, MOST_BUDGET = 0.03, 0.95
FACTOR = 1.6
"""Between two budgets while the target lies beyond all that were tried."""
MOST_PSNR = 100.0
"""Of videos that are the same, so that differences are numbers."""
ALIKE = 1.1
"""Schedules are compared by points that cost at most so many times the budget."""
PROBED_PROMPTS = 2


def tune(
    pipe: DiffusionPipeline,
    prompts: str | Sequence[str],
    directory: PathLike = "tuning",
    *,
    psnr: float | None = None,
    ssim: float | None = None,
    error: float | None = None,
    speedup: float | None = None,
    arguments: Mapping[str, Any] | None = None,
    seed: int = 0,
    fps: float | None = None,
    blocks: Sequence[Block] = BLOCKS,
    selections: Sequence[str] = tuple(reversed(SELECTIONS)),
    schedules: Sequence[str] = tuple(SHAPES),
    rounds: int = 3,
    measure: bool = False,
    compile: bool = False,
    keep_videos: bool = True,
    anew: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> Tuning:
    """Find the settings that reach a quality at least cost, or a speed at best quality, by a few prompts.

        tune(pipe, ["A cat walks on the grass.", "Rain on a window."], psnr=30, arguments={"num_frames": 49})
        enable_vsa(pipe, config=json.loads(Path("tuning/config.json").read_text()))

    How it goes about it says `vsa_diffusers.tuning`. Into `directory` go `config.json`, unless the target was not
    reached, `report.html`, `results.json`, in `videos/` the comparison of all whole videos, and what is needed to go on
    after an interruption. After it the pipeline attends as it did before.

    Args:
        pipe: a pipeline with a supported transformer, where it is to run, not compiled.
        prompts: one or several; what they are judged by need not hold for others.
        directory: is made if need be. Another target with the same directory makes only what is new.
        psnr: least PSNR to the dense videos, dB, in the mean over the prompts. One of the four is needed.
        ssim: least SSIM, likewise.
        error: largest relative error of the transformer's output, on inputs of the dense run.
        speedup: least times as fast as dense, by the time of denoising whole videos.
        arguments: of the pipeline's call, such as `height`, `num_frames` and `num_inference_steps`.
        seed: of the noise.
        fps: frames per second; `None` takes the pipeline's.
        blocks: block sizes to choose from.
        selections: `"mean"`, `"quarters"`, or both, likewise.
        schedules: names from `vsa_diffusers.tuning.search.SHAPES`.
        rounds: how many more budgets make whole videos at most, before schedules are compared and after.
        measure: count times of layers as costs, where they are stable, instead of shares of tiles.
        compile: compile the transformers' blocks before whole videos are made; they stay so.
        keep_videos: keep whole videos in `directory/videos`, and show them on a page; else they are held in memory, and
            an interrupted tuning makes them again.
        anew: forget what an earlier tuning left in the directory, but for its videos.
        progress: told of what is done.
        command: shown in the report.

    Raises:
        ValueError, TypeError: an argument is wrong, the pipeline is compiled or has trained gates, or nothing in it can
            be sparse.
        ImportError: a package of the extra `report` is missing; nothing was made then.
    """
    target = Target.one_of({"psnr": psnr, "ssim": ssim, "error": error, "speedup": speedup})
    check_installed(*REPORTS)
    prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    check_choices(prompts, blocks, selections, schedules, rounds)
    blocks = [VSAConfig(block_size=block).block_size or "auto" for block in blocks]
    if is_compiled(pipe):
        raise ValueError(
            "pipe is compiled, and compiled code cannot be looked into while it runs; load it again, and pass compile."
        )
    check_without_gates(pipe)
    shared = dict(arguments or {})
    calls = calls_by_prompt(pipe, prompts, shared, fps)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = State(directory / STATE, _facts(pipe, calls, seed), anew)
    progress = progress or Progress()
    recorded = _Recorded(pipe, calls[:PROBED_PROMPTS], seed, progress)
    with warnings_only():  # of dozens of settings each would be told
        with attending(pipe, None):
            probed = probe(pipe, recorded.calls, blocks, selections, state, measure, progress)
        cost = Cost.of_probe(probed)

        store = Store(folder_of(directory / VIDEOS)) if keep_videos else MemoryStore()
        shown: dict[str, Any] = {"arguments": shared, "seed": seed, "fps": fps, "progress": progress}

        def videos(settings: Sequence[Setting]) -> Comparison:
            return measure_settings(pipe, prompts, settings, directory / VIDEOS, store, **shown)

        def error_by(setting: Setting) -> float | None:
            if target.name != "error":
                return None
            name = f"error {json.dumps(setting.to_dict(), sort_keys=True)}"
            return float(state.once(name, lambda: recorded.error(setting)))

        if compile:
            if target.name == "error":
                recorded.calls()  # what is compiled would be recorded wrongly
            compile_blocks(pipe)
        confirm = _Confirm(target, probed, cost, videos, error_by)
        confirm.settle([Search(probed, cost, SHAPES[name], even=True) for name in schedules], rounds)
        points = tuple(confirm.points.values())
        settings = confirm.settings()
        if keep_videos:
            comparison = compare(pipe, prompts, settings, directory / VIDEOS, command=command, **shown)
        else:
            comparison = videos(settings)
    tuning = Tuning(target, points, probed, cost, comparison, directory, command)
    _write(tuning, keep_videos)
    return tuning


def check_choices(
    prompts: Sequence[str], blocks: Sequence[Block], selections: Sequence[str], schedules: Sequence[str], rounds: int
) -> None:
    """Refuse what `tune` cannot use, whatever the pipeline."""
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompts={list(prompts)} must name something to tune by: one text or several.")
    for name, choices in {"blocks": blocks, "selections": selections, "schedules": schedules}.items():
        if isinstance(choices, str) or not choices:
            raise ValueError(f"{name}={choices!r} must be a list of something to choose from.")
    for block in blocks:
        VSAConfig(block_size=block)
    for selection in selections:
        check_choice("selections", selection, SELECTIONS)
    for name in schedules:
        check_choice("schedules", name, tuple(SHAPES))
    if (count := whole(rounds)) is None or count < 0:
        raise ValueError(f"rounds={rounds!r} must be a whole number, 0 or more.")


class _Recorded:
    """The calls of dense runs, made when they are first needed."""

    def __init__(self, pipe: DiffusionPipeline, calls: Sequence[Mapping[str, Any]], seed: int, progress: Progress):
        self.pipe, self.arguments, self.seed, self.progress = pipe, calls, seed, progress
        self.made: list[list[Call]] = []

    def calls(self) -> list[list[Call]]:
        """By prompt."""
        for index, arguments in enumerate(self.arguments[len(self.made) :], start=1 + len(self.made)):
            steps = number_of_steps(self.pipe, arguments) if tells_steps(self.pipe) else None
            self.progress.begin(f"dense run {index} of {len(self.arguments)}", steps)
            self.made.append(record(self.pipe, arguments, self.seed, STEPS, self.progress.step))
        return self.made

    def error(self, setting: Setting) -> float:
        """Of the transformers' outputs in these calls, the root of the mean square."""
        calls = self.calls()
        with attending(self.pipe, setting.config):
            parts = supported_parts(self.pipe)
            squares = [error_of(parts, of_prompt) ** 2 for of_prompt in calls]
        return math.sqrt(math.fsum(squares) / len(squares))


class _Confirm:
    """Whole videos of one setting after another."""

    def __init__(
        self,
        target: Target,
        probed: Probe,
        cost: Cost,
        videos: Callable[[Sequence[Setting]], Comparison],
        error: Callable[[Setting], float | None],
    ):
        self.target, self.probed, self.cost = target, probed, cost
        self.videos, self.error = videos, error
        self.points: dict[str, Point] = {}
        self.quality: dict[str, list[float]] = {}  # of a point, by prompt
        self.pending: dict[str, dict[str, Any]] = {}

    def settle(self, searches: Sequence[Search], rounds: int) -> None:
        """Find the budget with one schedule, compare all schedules there, and go on with the best of them.

        A schedule takes the first one's place only if it beats it by more than chance, since a few videos differ by
        more than schedules do. The layers keep alike until the last: their ratios are predicted, and where that goes
        wrong it costs more than schedules differ by.
        """
        pivot = next((each for each in searches if each.shape.name == PIVOT), searches[0])
        self._add(pivot.at(self._first_budget()))
        self._make()
        for _ in range(rounds):
            if self._nearest(pivot) <= NEAR * TOLERANCES[self.target.name] or not self._add_next(pivot):
                break
            self._make()
        budget = min(self._of(pivot), key=self._distance).cost
        for search in searches:
            self._add(search.at(budget))
        self._add_default(budget)
        self._make()
        best = alike = self._best_at(budget, pivot, searches)
        by_layer = best.by_layer()
        if self._add(by_layer.at(budget)):
            self._make()
            best = self._best_at(budget, best, [by_layer])
        for _ in range(rounds):
            if not self._add_next(best):
                break
            self._make()
        proven = {DEFAULT, pivot.name, alike.name, best.name}
        for name, each in self.points.items():
            self.points[name] = replace(each, proven=each.schedule in proven)
        found = best_of(list(self.points.values()), self.target)
        if found.allocation is not None and self._add_default(found.cost):
            self._make()

    def _of(self, search: Search) -> list[Point]:
        return [each for each in self.points.values() if each.schedule == search.name]

    def _distance(self, point: Point) -> float:
        return abs(self.target.beyond(point.value(self.target.name)))

    def _nearest(self, search: Search) -> float:
        """How far the search's nearest point is from the target."""
        return min(map(self._distance, self._of(search)))

    def _best_at(self, budget: float, first: Search, others: Sequence[Search]) -> Search:
        """Of the searches whose settings at this budget keep to it and beat the first's, the best; else the first."""
        chosen, most = first, 0.0
        base = self.quality[_name(first.at(budget))]
        for search in others:
            name = _name(search.at(budget))
            gains = [own - other for own, other in zip(self.quality[name], base, strict=True)]
            if self.points[name].cost <= budget * ALIKE and is_beyond_chance(gains) and fmean(gains) > most:
                chosen, most = search, fmean(gains)
        return chosen

    def _add_next(self, search: Search) -> bool:
        """Whether there is another budget that is worth a video."""
        budget = next_budget(self._of(search), self.target)
        return budget is not None and self._add(search.at(budget))

    def settings(self) -> list[Setting]:
        """All of which there are points."""
        return [Setting(name, point.config) for name, point in self.points.items()]

    def _first_budget(self) -> float:
        budget = None if self.target.is_quality else self.cost.budget_for(self.target.value)
        return FIRST_BUDGET if budget is None else min(MOST_BUDGET, max(LEAST_BUDGET, budget))

    def _add(self, allocation: Allocation) -> bool:
        """Whether it is new."""
        name = _name(allocation)
        if name in self.points or name in self.pending:
            return False
        self.pending[name] = {
            "schedule": allocation.name, "config": allocation.config(self.probed), "cost": allocation.cost,
            "kept": allocation.kept, "allocation": allocation,
        }  # fmt: skip
        return True

    def _add_default(self, budget: float) -> bool:
        """Whether it is new."""
        ratio, cost = default_at(self.probed, self.cost, budget)
        name = f"default {ratio:.3f}"
        if name in self.points:
            return False
        config = {"default": {"enable": True, "top_k_ratio": ratio}}
        self.pending[name] = {"schedule": DEFAULT, "config": config, "cost": cost, "kept": ratio}
        return True

    def _make(self) -> None:
        """Whole videos of what is pending."""
        settings = [Setting(name, numbers["config"]) for name, numbers in self.pending.items()]
        comparison = self.videos(settings)
        for setting, result in zip(settings, comparison.results[1:], strict=True):
            seen = {name: result.mean(name) for name in ("psnr", "ssim")} | {"speedup": comparison.speedup(result)}
            by_prompt = [getattr(each, self.target.chooses_by) for each in result.close]
            self.quality[setting.name] = [min(each, MOST_PSNR) for each in by_prompt]
            numbers = self.pending[setting.name] | seen | {"error": self.error(setting)}
            self.points[setting.name] = Point(setting.name, **numbers)
        self.pending.clear()


def _name(allocation: Allocation) -> str:
    return f"{allocation.name} {allocation.cost:.3f}"


def next_budget(points: Sequence[Point], target: Target) -> float | None:
    """Where to look for the target next, by the points of one schedule; `None` where that is not worth a video.

    Between the two points that enclose the target: on a line in the logarithm of the cost. Beyond all points: by
    `FACTOR`.
    """
    slack = sorted((each.cost, target.beyond(each.value(target.name))) for each in points)
    close = TOLERANCES[target.name]
    if any(0 <= beyond <= close for _, beyond in slack):
        return None
    # More cost brings quality nearer, and a speed further away.
    sign = 1 if target.is_quality else -1
    short = [each for each in slack if sign * each[1] < 0]
    enough = [each for each in slack if sign * each[1] >= 0]
    if not enough:
        budget = max(cost for cost, _ in slack) * FACTOR
    elif not short:
        budget = min(cost for cost, _ in slack) / FACTOR
    else:
        (low, below), (high, above) = max(short), min(enough)
        below, above = max(-1e3, min(1e3, sign * below)), max(-1e3, min(1e3, sign * above))
        if high <= low * 1.02:
            return None
        aim = sign * close / 2
        part = min(0.9, max(0.1, (aim - below) / (above - below)))
        budget = math.exp(math.log(low) + part * (math.log(high) - math.log(low)))
    budget = min(MOST_BUDGET, max(LEAST_BUDGET, budget))
    return None if any(abs(cost - budget) < 1e-3 for cost, _ in slack) else budget


def _facts(pipe: DiffusionPipeline, calls: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    facts = facts_of(pipe)
    named = {"prompts": [call["prompt"] for call in calls]} | told(calls[0])
    del named["prompt"]
    return {
        **{name: facts[name] for name in ("model", "pipeline", "dtype", "device")}, **named, "seed": seed,
        "weights": fingerprint(pipe), "scheduler": scheduler_of(pipe), "version": facts["versions"]["vsa_diffusers"],
    }  # fmt: skip


def _write(tuning: Tuning, has_videos: bool) -> None:
    from .report import write_report

    config = tuning.directory / CONFIG
    config.unlink(missing_ok=True)  # perhaps one of another target, which must not stand beside this report
    write_report(tuning.directory / REPORT, tuning, has_videos=has_videos)
    with replaced_file(tuning.directory / RESULTS) as partial:
        partial.write_text(json.dumps(tuning.to_dict(), indent=2) + "\n")
    if tuning.is_met:
        with replaced_file(config) as partial:
            partial.write_text(json.dumps(tuning.best.config, indent=2) + "\n")
