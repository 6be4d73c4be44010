"""The tables of measurements in performance.md, in the README and in the lab notes, from `docs/measurements`.

python docs/make_performance.py          # prints those that are no longer what was measured, and what the text tells
python docs/make_performance.py --write  # and puts them into the pages
"""

import json
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from make_tables import Table, line, main, spaced
from vsa_diffusers.bench.full_size import FULL_SIZES
from vsa_diffusers.bench.shapes import SHAPES

MEASUREMENTS = Path(__file__).parent / "measurements"
VIDEOS = {
    "ltx2-512p": "LTX-2, 512x768, 121 frames",
    "cogvideox-480p": "CogVideoX-5B, 480x720, 49 frames, batch 2",
    "wan1.3b-480p": "Wan 2.1 1.3B, 480x832, 81 frames",
    "wan5b-720p": "Wan 2.2 5B, 704x1280, 121 frames",
    "ltx2-1080p": "LTX-2, 1088x1920, 121 frames",
    "wan14b-720p": "Wan 2.1 14B, 720x1280, 81 frames",
    "hunyuan-720p": "HunyuanVideo, 720x1280, 129 frames",
}
IN_README = ("ltx2-512p", "ltx2-1080p", "wan1.3b-480p", "wan14b-720p", "hunyuan-720p")
MODELS = {
    "ltx2-512p": ("LTX-2", "512x768, 121 frames"),
    "wan1.3b-480p": ("Wan 2.1 1.3B", "480x832, 81 frames"),
    "cogvideox5b-480p": ("CogVideoX-5B, batch 2", "480x720, 49 frames"),
    "ltx2-1080p": ("LTX-2", "1088x1920, 121 frames"),
    "wan14b-720p": ("Wan 2.1 14B", "720x1280, 81 frames"),
    "hunyuan-720p": ("HunyuanVideo", "720x1280, 129 frames"),
}
PEERS = {
    "triton gate": "vsa_diffusers, gate",
    "triton merge": "vsa_diffusers, merge",
    "attn-gym": "attn-gym 0.0.17, VSA on FlexAttention",
    "attn-gym-compiled": "the same, all of it compiled",
    "comfy-kitchen-sol": "comfy-kitchen 0.2.40, Sol (int8)",
    "comfy-kitchen-vsa": "comfy-kitchen 0.2.40, VSA by its kernels",
    "fastvideo-kernel": "fastvideo-kernel 0.3.5, VSA of its authors",
    "sageattention": "sageattention 1.0.6, dense in int8",
}
RATIOS = (0.5, 0.2, 0.1)
ALL_RATIOS = (0.5, 0.3, 0.2, 0.1)
COMBINES = ("gate", "merge")
Row = dict[str, Any]


def tables() -> list[Table]:
    """All of them."""
    page, lab = "docs/performance.md", "docs/lab"
    return [
        Table(page, "One attention layer", list(layers())),
        Table(page, "Selected by quarters, and blocks that fit", list(quarters())),
        Table(page, "Whole transformers", list(models("h200-compiled", "default"))),
        Table(page, "Whole transformers", list(models("h200-transformers")), 1),
        Table(page, "Beside other packages", list(beside_peers())),
        Table(page, "Training", list(training())),
        Table("README.md", "How much faster", list(layers_in_readme())),
        Table(f"{lab}/forward.md", "An H200", list(layers_in_lab())),
        Table(f"{lab}/forward.md", "An H200", list(costs_in_lab()), 1),
        Table(f"{lab}/forward.md", "An H200", list(quarters_in_lab()), 2),
        Table(f"{lab}/backward.md", "Measured", list(training_in_lab())),
        Table(f"{lab}/whole-models.md", "Compiled blocks", list(compiled_in_lab())),
        Table(f"{lab}/whole-models.md", "Compiled blocks", list(captured_in_lab()), 1),
        Table(f"{lab}/whole-models.md", "Not compiled", list(models_in_lab())),
    ]


def layers() -> Iterator[str]:
    """One layer, by means: dense milliseconds, and times as fast with a gate and in merge."""
    for shape, video in VIDEOS.items():
        faster = speedups("h200-forward", shape)
        yield line([video, spaced(SHAPES[shape].tokens), dense("h200-forward", shape), *faster])


def layers_in_readme() -> Iterator[str]:
    """Some of these, in merge."""
    for shape in IN_README:
        faster = [f"{cell}x" for cell in speedups("h200-forward", shape, ("merge",))]
        yield line([VIDEOS[shape], spaced(SHAPES[shape].tokens), f"{dense('h200-forward', shape)} ms", *faster])


def layers_in_lab() -> Iterator[str]:
    """Both dense backends, and all ratios."""
    for shape in SHAPES:
        backends = " / ".join(f"{each['ms']:.2f}" for each in dense_rows("h200-forward", shape))
        yield line([shape, backends, *speedups("h200-forward", shape, ratios=ALL_RATIOS)])


def costs_in_lab() -> Iterator[str]:
    """With a gate: milliseconds, rate, memory beyond inputs and output, launches; and the host's time of all calls."""
    for name, shape in SHAPES.items():
        [at] = found("h200-forward", shape=name, what="triton gate", ratio=0.2)
        moved = 2 * 2 * shape.batch * shape.heads * shape.head_dim * shape.tokens
        rows = [found("h200-forward", shape=name, what="triton gate", ratio=each)[0] for each in ALL_RATIOS]
        host = [row["cpu_us"] for row in found("h200-forward", shape=name) if row["ratio"] is not None]
        memory = f"{at['extra_bytes'] / moved:.2f}"
        yield line(
            [
                name,
                *(three(row["ms"]) for row in rows),
                f"{at['tflops']:.0f}",
                memory,
                str(at["launches"]),
                f"{min(host):.0f} to {max(host):.0f}",
            ]
        )


def quarters() -> Iterator[str]:
    """One layer in merge, by quarters: times as fast with blocks of (4, 4, 4) and with the automatic block."""
    for shape, video in VIDEOS.items():
        if found("h200-quarters", shape=shape):
            automatic = ["the same block", "", ""]
            if found("h200-quarters-auto", shape=shape):
                automatic = speedups("h200-quarters-auto", shape, ("merge",))
            yield line([video, *speedups("h200-quarters", shape, ("merge",)), *automatic])


def quarters_in_lab() -> Iterator[str]:
    """The same with milliseconds, and how much the block gains."""
    for shape in SHAPES:
        fixed = merged("h200-quarters", shape)
        if not fixed:
            continue
        cells = ["the same block", "", "", ""]  # as (4, 4, 4), so that it was not measured twice
        if automatic := merged("h200-quarters-auto", shape):
            gains = ", ".join(f"{one['ms'] / other['ms']:.2f}" for one, other in zip(fixed, automatic, strict=True))
            cells = [*map(ms_and_speedup, automatic), gains]
        yield line([shape, *map(ms_and_speedup, fixed), *cells])


def training() -> Iterator[str]:
    """One layer forward and backward: dense milliseconds, and times as fast with a gate and in merge."""
    for shape, video in VIDEOS.items():
        if found("h200-backward", shape=shape):
            yield line([video, dense("h200-backward", shape), *speedups("h200-backward", shape)])


def training_in_lab() -> Iterator[str]:
    """The same with both dense backends, milliseconds, and memory of dense flash attention and with a gate at 0.5."""
    for shape in VIDEOS:
        backends = dense_rows("h200-backward", shape)
        if backends:
            gates = [found("h200-backward", shape=shape, what="triton gate", ratio=ratio)[0] for ratio in RATIOS]
            memory = " / ".join(f"{row['extra_bytes'] / 1e6:.0f}" for row in (backends[0], gates[0]))
            both = [*gates, *merged("h200-backward", shape)]
            cells = [" / ".join(three(row["ms"]) for row in backends), *map(ms_and_speedup, both)]
            yield line([shape, *cells, memory])


def models(name: str, mode: str | None = None) -> Iterator[str]:
    """Whole transformers: seconds dense and at 0.2 as `enable_vsa` gives it, and times as fast."""
    for model, dense_row, sparse in pairs(name, mode):
        title, video = MODELS[model]
        yield line([title, video, seconds(dense_row), seconds(sparse), f"{sparse['speedup']:.2f}"])


def compiled_in_lab() -> Iterator[str]:
    """The same with what the first forward took."""
    for model, *both in pairs("h200-compiled", "default"):
        yield line([*named(model), *map(seconds, both), f"{both[1]['speedup']:.2f}", first(both)])


def captured_in_lab() -> Iterator[str]:
    """In CUDA graphs."""
    for model, *both in pairs("h200-captured", "reduce-overhead"):
        yield line([", ".join(MODELS[model]), *map(seconds, both), f"{both[1]['speedup']:.2f}", first(both)])


def models_in_lab() -> Iterator[str]:
    """Not compiled, with peak memory."""
    for model, *both in pairs("h200-transformers", None):
        memory = " / ".join(f"{row['peak_bytes'] / 1e9:.1f}" for row in both)
        yield line([*named(model), *map(seconds, both), f"{both[1]['speedup']:.2f}", memory])


def beside_peers() -> Iterator[str]:
    """Two videos, other packages in the same run: times as fast as dense."""
    for what, title in PEERS.items():
        first_run = "h200-peers" if found("h200-peers", what=what) else "h200-peers-wan"
        cells = []
        for name, shape in ((first_run, "ltx2-512p"), ("h200-peers-wan", "wan1.3b-480p")):
            by_ratio = {row["ratio"]: f"{row['speedup']:.2f}" for row in found(name, shape=shape, what=what)}
            cells += [by_ratio.get(ratio, "") for ratio in RATIOS] if None not in by_ratio else [by_ratio[None], "", ""]
        yield line([title, *cells])


def told() -> Iterator[str]:
    """What the text around the tables tells of them."""
    for name in ("h200-forward", "h200-backward"):
        spreads = sorted(row["spread"] for row in found(name) if len(row["rounds"]) > 1)
        wide = sum(spread > 0.1 for spread in spreads)
        middle = statistics.median(spreads)
        yield f"{name}: rounds differ by {middle:.1%} in the median row, above 10 % in {wide} of {len(spreads)} rows"
        yield f"{name}: rounds differ by at most {spreads[-1]:.1%}"
    memory = max(
        row["extra_bytes"] / (4 * shape.batch * shape.heads * shape.head_dim * shape.tokens)
        for name, shape in SHAPES.items()
        for row in found("h200-forward", shape=name, ratio=0.2)
    )
    yield f"extra memory at 0.2, of key and value: at most {memory:.2f}"
    firsts = sorted(row["first_ms"] / 1e3 for row in found("h200-forward") if row["ratio"] is not None)
    yield f"first calls, s: {', '.join(f'{each:.2g}' for each in firsts[::-1][:12])}"
    for combine in COMBINES:
        changes = [
            min(row["extra_bytes"] for row in sparse) / flash["extra_bytes"] - 1
            for shape in VIDEOS
            for flash in dense_rows("h200-backward", shape)[:1]
            for ratio in RATIOS
            for sparse in [found("h200-backward", shape=shape, what=f"triton {combine}", ratio=ratio)]
        ]
        yield f"backward's extra memory over dense flash, {combine}: {min(changes):+.0%} to {max(changes):+.0%}"
    for shape in SHAPES:
        shares = []
        for row, by_means in zip(merged("h200-quarters", shape), merged("h200-forward", shape), strict=False):
            more = selecting_us(row) - selecting_us(by_means)
            shares.append(f"{more / 1e3 / row['ms']:.1%}")
        yield f"selecting by quarters takes so much more of a call than by means, {shape}: {', '.join(shares)}"
    for model, dense_row, sparse in [*pairs("h200-compiled", "default"), *pairs("h200-captured", "reduce-overhead")]:
        yield f"{model}: {seconds(sparse)} s at 0.2 instead of {seconds(dense_row)} ({sparse['speedup']:.2f}x)"
    for shape in VIDEOS:
        for row in found("h200-dense-gate", shape=shape, what="triton gate", ratio=1.0):
            yield f"gated and dense, {shape}: {three(row['ms'])} ms instead of {dense('h200-dense-gate', shape)}"


def found(name: str, **values: Any) -> list[Row]:
    """The rows of one file with these values."""
    rows = json.loads((MEASUREMENTS / f"{name}.json").read_text())["rows"]
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def pairs(name: str, mode: str | None) -> Iterator[tuple[str, Row, Row]]:
    """Of each model that was measured, the dense row and that of merge."""
    for model in MODELS:
        rows = {row["what"].split()[0]: row for row in found(name, model=model, compile=mode)}
        if rows:
            yield model, rows["dense"], rows["merge"]


def merged(name: str, shape: str) -> list[Row]:
    """The rows of merge."""
    return [row for ratio in RATIOS for row in found(name, shape=shape, what="triton merge", ratio=ratio)]


def selecting_us(row: Row) -> float:
    """Microseconds of all kernels but the one that attends."""
    return sum(us for kernel, us in row["kernels"].items() if "forward" not in kernel)


def dense_rows(name: str, shape: str) -> list[Row]:
    """Flash attention, then cuDNN."""
    return [row for what in ("dense flash", "dense cudnn") for row in found(name, shape=shape, what=what)]


def dense(name: str, shape: str) -> str:
    """Milliseconds of the faster dense backend."""
    return three(min(row["ms"] for row in dense_rows(name, shape)))


def speedups(name: str, shape: str, combines: Iterable[str] = COMBINES, ratios: Iterable[float] = RATIOS) -> list[str]:
    """Times as fast as dense."""
    return [
        f"{row['speedup']:.2f}"
        for combine in combines
        for ratio in ratios
        for row in found(name, shape=shape, what=f"triton {combine}", ratio=ratio)
    ]


def ms_and_speedup(row: Row) -> str:
    """What a call took."""
    return f"{three(row['ms'])} ms, {row['speedup']:.2f} x"


def first(both: Iterable[Row]) -> str:
    """Seconds of the first forwards."""
    return " / ".join(f"{row['first_seconds']:.1f}" for row in both)


def named(model: str) -> tuple[str, str]:
    """Checkpoint and batch, and the video."""
    size = FULL_SIZES[model]
    frames, height, width = size.video
    return f"{size.checkpoint}, batch {size.batch}", f"{height}x{width}x{frames}"


def seconds(row: Row) -> str:
    """To three figures."""
    return three(row["seconds"])


def three(number: float) -> str:
    """To three figures, or in whole numbers."""
    digits = 0 if number >= 99.5 else 1 if number >= 9.95 else 2 if number >= 0.995 else 3
    return f"{number:.{digits}f}"


if __name__ == "__main__":
    main(tables())
    print(*told(), sep="\n")
