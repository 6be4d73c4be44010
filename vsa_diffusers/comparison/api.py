"""`compare`: dense and sparse videos of the same noise, measured and shown beside each other."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from ..config import VSAConfig
from ..extras import REPORTS, check_installed
from ..files import PathLike, check_destination, replaced_file
from ..generation.calling import calls_by_prompt, number_of_steps, tells_steps
from ..generation.loading import is_compiled
from ..generation.progress import Progress
from ..version import __version__
from ..video_files import write_video
from .measure import Measurement, attending, measure, warm_up
from .pictures import write_contact_sheet
from .quality import Closeness, closeness, learned_distance
from .settings import DENSE, Setting, as_setting, check_names
from .store import Store, fingerprint, folder_of, scheduler_of, told

if TYPE_CHECKING:
    from rich.table import Table

RESULTS, SHEET, REPORT = "results.json", "contact_sheet.png", "report.html"


@dataclass(frozen=True)
class Result:
    """What one setting made of all prompts.

    Args:
        setting: how.
        made: a measurement per prompt.
        close: how close each video is to the dense one; empty for dense itself.
        files: names of the videos.
        reused: whether a video comes from an earlier comparison, and was timed then.
    """

    setting: Setting
    made: tuple[Measurement, ...]
    close: tuple[Closeness, ...]
    files: tuple[str, ...]
    reused: tuple[bool, ...]

    def mean(self, name: str) -> float | None:
        """The mean over prompts of a number of `Measurement` or `Closeness`; `None` where it is not known."""
        values = self._values(name)
        return statistics.fmean(values) if values else None

    def spread(self, name: str) -> float | None:
        """The standard deviation over prompts; `None` with fewer than two."""
        values = self._values(name)
        return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None

    def _values(self, name: str) -> list[float]:
        source = self.made if hasattr(self.made[0], name) else self.close
        values = [getattr(each, name) for each in source]
        return [] if any(value is None for value in values) else values


@dataclass(frozen=True)
class Comparison:
    """The results of `compare`, dense first; a notebook shows them as a table.

    Args:
        results: one per setting.
        prompts: what was shown.
        arguments: of all calls of the pipeline.
        seed: of the noise.
        facts: model, versions and hardware.
        no_distance: why there is no learned distance; `None` if there is one.
        directory: where everything was written.
        command: what started it, if it was told.
    """

    results: tuple[Result, ...]
    prompts: tuple[str, ...]
    arguments: Mapping[str, Any]
    seed: int
    facts: Mapping[str, Any]
    no_distance: str | None
    directory: Path
    command: str | None = None

    def speedup(self, result: Result) -> float:
        """How many times as fast as dense a setting denoised."""
        return (self.results[0].mean("denoising") or math.nan) / (result.mean("denoising") or math.nan)

    @property
    def hint(self) -> str | None:
        """What to do if no setting denoised faster than dense; `None` if one did."""
        if any(not self.speedup(result) <= 1 for result in self.results[1:]):
            return None
        return (
            "Nothing is faster than dense here: where attention is short, choosing tiles takes longer than it saves. "
            "vsa-diffusers plan says what to expect of a model and a size."
        )

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        shown = {name: _plain(value) for name, value in self.arguments.items()}
        results = [self._result(result) for result in self.results]
        return {
            **self.facts, "prompts": list(self.prompts), "arguments": shown, "seed": self.seed, "command": self.command,
            "no_learned_distance": self.no_distance, "results": results,
        }  # fmt: skip

    def table(self) -> Table:
        """The numbers for a terminal."""
        from .report import table

        return table(self)

    def _repr_html_(self) -> str:
        from .report import html_table

        return html_table(self)

    def _result(self, result: Result) -> dict[str, Any]:
        videos = []
        for index, made in enumerate(result.made):
            numbers: dict[str, Any] = {"file": result.files[index], "reused": result.reused[index]}
            numbers |= {"seconds": made.seconds, "denoising": made.denoising, "peak_memory": made.peak_memory}
            if result.close:
                numbers |= asdict(result.close[index])
                numbers["identical"] = math.isinf(numbers["psnr"])
            videos.append({name: _plain(value) for name, value in numbers.items()})
        means = {name: _plain(result.mean(name)) for name in ("seconds", "denoising", "psnr", "ssim", "distance")}
        spread = {name: _plain(result.spread(name)) for name in means}
        return {
            "name": result.setting.name, "config": result.setting.to_dict(), "speedup": _plain(self.speedup(result)),
            "mean": means, "spread": spread, "videos": videos,
        }  # fmt: skip


def compare(
    pipe: DiffusionPipeline,
    prompts: str | Sequence[str],
    settings: Sequence[Setting | VSAConfig | float],
    directory: PathLike = "comparison",
    *,
    arguments: Mapping[str, Any] | None = None,
    seed: int = 0,
    fps: float | None = None,
    reuse: bool = True,
    progress: Progress | None = None,
    command: str | None = None,
) -> Comparison:
    """Make the same videos dense and with each setting, measure time, memory and closeness, and write a report.

        compare(pipe, "A cat walks on the grass.", [0.5, 0.2], arguments={"num_frames": 49}).table()

    Every setting is warmed up first. Into `directory` go `report.html`, which holds everything it shows,
    `results.json`, `contact_sheet.png`, and the videos. After it the pipeline attends as it did before.

    Args:
        pipe: a pipeline with a supported transformer, where it is to run.
        prompts: one or several.
        settings: what to compare with dense: a `Setting`, a `VSAConfig`, or a `top_k_ratio`.
        directory: is made if need be.
        arguments: of the pipeline's call, such as `height`, `num_frames` and `num_inference_steps`.
        seed: of the noise, the same for all.
        fps: frames per second; `None` takes the pipeline's.
        reuse: keep every video without loss in `directory/frames`, and make none again of which nothing has changed.
        progress: told of each video and its denoising steps.
        command: shown in the report.

    Raises:
        ValueError, TypeError: an argument is wrong, or a video is none.
        ImportError: a package of the extra `report` is missing; nothing was made then.
    """
    comparison = measure_settings(
        pipe, prompts, settings, directory, Store(folder_of(directory) if reuse else None), arguments=arguments,
        seed=seed, fps=fps, progress=progress, command=command,
    )  # fmt: skip
    _write(comparison)
    return comparison


def measure_settings(
    pipe: DiffusionPipeline,
    prompts: str | Sequence[str],
    settings: Sequence[Setting | VSAConfig | float],
    directory: PathLike,
    store: Store,
    *,
    arguments: Mapping[str, Any] | None = None,
    seed: int = 0,
    fps: float | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> Comparison:
    """What `compare` finds, with videos in a store of one's own and nothing in the directory.

    Other arguments and errors are those of `compare`.
    """
    check_installed(*REPORTS)
    prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    everything = [DENSE, *map(as_setting, settings)]
    if not prompts or len(everything) < 2:
        raise ValueError(f"prompts={list(prompts)} and settings={list(settings)} must both name something to compare.")
    check_names(everything)
    shared = dict(arguments or {})
    calls = calls_by_prompt(pipe, prompts, shared, fps)
    directory = check_destination(directory, directory=True)
    work = _Work(store, facts_of(pipe), calls, seed, fps, progress or Progress())
    device = work.facts["device"]
    distance, no_distance = learned_distance(device)
    results: list[Result] = []
    for setting in everything:
        made, reused = work.videos(pipe if setting.pipe is None else setting.pipe, setting)
        files = tuple(_file(setting, index, len(prompts)) for index in range(len(prompts)))
        pairs = zip(made, results[0].made, strict=True) if results else ()
        close = [closeness(one.video.frames, dense.video.frames, distance, device) for one, dense in pairs]
        results.append(Result(setting, tuple(made), tuple(close), files, tuple(reused)))
    return Comparison(tuple(results), prompts, shared, seed, work.facts, no_distance, directory, command)


@dataclass(frozen=True)
class _Work:
    """All that the videos of one comparison share."""

    store: Store
    facts: Mapping[str, Any]
    calls: Sequence[Mapping[str, Any]]
    seed: int
    fps: float | None
    progress: Progress

    def videos(self, pipe: DiffusionPipeline, setting: Setting) -> tuple[list[Measurement], list[bool]]:
        """Those of one setting, kept ones where there are some, and which were kept."""
        keys = [self._key(pipe, setting, call) for call in self.calls]
        kept = [self.store.find(key) for key in keys]
        made: list[Measurement] = []
        if is_compiled(pipe) and not all(kept):
            torch._dynamo.reset()  # each setting compiles anew, and there is a limit to how often
        with attending(pipe, setting.config):
            if not all(kept):
                self.progress.begin(f"{setting.name}, warming up", None)
                warm_up(pipe, self.calls[0], self.seed, setting.config)
            for index, (key, call, found) in enumerate(zip(keys, self.calls, kept, strict=True), start=1):
                one = found or self._make(pipe, setting, call, index)
                if found is None:
                    self.store.keep(key, one)
                made.append(one)
        return made, [each is not None for each in kept]

    def _make(self, pipe: DiffusionPipeline, setting: Setting, call: Mapping[str, Any], index: int) -> Measurement:
        what = setting.name if len(self.calls) == 1 else f"{setting.name}, prompt {index} of {len(self.calls)}"
        self.progress.begin(what, number_of_steps(pipe, call) if tells_steps(pipe) else None)
        return measure(pipe, call, self.seed, fps=self.fps, on_step=self.progress.step)

    def _key(self, pipe: DiffusionPipeline, setting: Setting, call: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "facts": self.facts, "weights": fingerprint(pipe), "scheduler": scheduler_of(pipe),
            "compiled": is_compiled(pipe), "config": setting.to_dict(), "arguments": told(call), "seed": self.seed,
            "fps": self.fps,
        }  # fmt: skip


def facts_of(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Model, versions and hardware."""
    device = torch.device(getattr(pipe, "_execution_device", pipe.device))
    threads = torch.get_num_threads()
    processor = f"{_processor()}, {threads} thread{'s' if threads != 1 else ''}"
    return {
        "model": str(pipe.config.get("_name_or_path") or type(pipe).__name__),
        "pipeline": type(pipe).__name__,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": device.type,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "versions": {
            "vsa_diffusers": __version__, "diffusers": diffusers.__version__, "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }  # fmt: skip


def _processor() -> str:
    """The CPU's name where the system tells it, else its architecture."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _file(setting: Setting, index: int, prompts: int) -> str:
    return f"{setting.slug}.mp4" if prompts == 1 else f"{setting.slug}-{index + 1}.mp4"


def _plain(value: Any) -> Any:
    """For JSON, which has neither infinity nor NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, bool, list, dict, type(None))) else str(value)


def _write(comparison: Comparison) -> None:
    from .report import write_report

    comparison.directory.mkdir(parents=True, exist_ok=True)
    for result in comparison.results:
        for file, made in zip(result.files, result.made, strict=True):
            video = made.video
            write_video(comparison.directory / file, video.frames, video.fps, video.audio, video.sample_rate)
    first = [(result.setting.name, result.made[0].video.frames) for result in comparison.results]
    write_contact_sheet(comparison.directory / SHEET, first, comparison.prompts[0])
    with replaced_file(comparison.directory / RESULTS) as partial:
        partial.write_text(json.dumps(comparison.to_dict(), indent=2) + "\n")
    write_report(comparison.directory / REPORT, comparison)
