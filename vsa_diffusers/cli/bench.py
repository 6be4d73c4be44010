"""`vsa-diffusers bench`: one attention layer, timed."""

from __future__ import annotations

import json as json_module
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..extras import check_installed
from .blocks import block_of
from .output import answers, errors, print_json

NAMES = "ltx2-512p, ltx2-1080p, wan1.3b-480p, wan5b-720p, wan14b-720p, hunyuan-720p, cogvideox-480p"
PEERS = "attn-gym, attn-gym-compiled, comfy-kitchen-sol, comfy-kitchen-vsa, sageattention, fastvideo-kernel"
STDOUT = Path("-")


class Combine(str, Enum):
    """How the two branches become one output."""

    gate = "gate"
    sum = "sum"
    sparse = "sparse"
    merge = "merge"


class Implementation(str, Enum):
    """What computes the operation."""

    auto = "auto"
    triton = "triton"
    torch = "torch"


class Selection(str, Enum):
    """What key tiles are scored by."""

    mean = "mean"
    quarters = "quarters"


class Peer(str, Enum):
    """Attention of other packages."""

    all = "all"
    none = "none"
    attn_gym = "attn-gym"
    attn_gym_compiled = "attn-gym-compiled"
    comfy_kitchen_sol = "comfy-kitchen-sol"
    comfy_kitchen_vsa = "comfy-kitchen-vsa"
    sageattention = "sageattention"
    fastvideo_kernel = "fastvideo-kernel"


class Dtype(str, Enum):
    """Of the inputs."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def bench(
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Of {NAMES}, or batch x heads x T x H x W x head_dim, such as 1x12x21x30x52x128. Left out: all, or "
            "without a GPU a small one of 4 096 tokens.",
            metavar="SHAPE...",
        ),
    ] = None,
    ratios: Annotated[
        list[float] | None, typer.Option(help="top_k_ratios; 0.5 0.3 0.2 0.1 if left out.", metavar="RATIO...")
    ] = None,
    combines: Annotated[
        list[Combine] | None,
        typer.Option(help="Of gate, sum, sparse, merge; gate merge if left out.", metavar="COMBINE..."),
    ] = None,
    implementations: Annotated[
        list[Implementation] | None,
        typer.Option(help="Of auto, triton, torch; triton on a GPU, else torch, if left out.", metavar="NAME..."),
    ] = None,
    block_size: Annotated[
        list[str] | None, typer.Option(help='Three numbers, or "auto"; 4 4 4 if left out.', metavar="T H W")
    ] = None,
    selection: Annotated[Selection, typer.Option(help="What key tiles are scored by.")] = Selection.mean,
    dtype: Annotated[Dtype, typer.Option(help="Of the inputs on a GPU.")] = Dtype.bfloat16,
    backward: Annotated[bool, typer.Option("--backward", help="Measure forward and backward together.")] = False,
    peers: Annotated[
        list[Peer] | None,
        typer.Option(
            help=f"Attention of other packages: all, none, or of {PEERS}. Left out: those installed, on a GPU.",
            metavar="PEER...",
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Write all rows to this file, or with - to stdout and nothing else there.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the speed-ups into this file (needs the extra report).")
    ] = None,
    sweep: Annotated[
        Path | None, typer.Option(help="Time every launch of the sparse kernel; results in this directory.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="End a sweep after so long.")] = 480,
) -> None:
    """Time one attention layer on this machine: dense, sparse at several ratios, and by other packages.

    Options that take several values take them one after the other. What cannot run is listed with the reason.

    **Examples**

    `vsa-diffusers bench`

    `vsa-diffusers bench --shapes wan1.3b-480p 1x12x21x30x52x128 --ratios 0.3 0.1 --json out.json`

    `vsa-diffusers bench --selection quarters --combines merge --block-size auto`

    `vsa-diffusers bench --sweep sweep/` times every launch of the sparse kernel, for the tuning table, and
    `vsa-diffusers bench --sweep sweep/ --backward --shapes wan1.3b-480p --ratios 0.2` those of its gradients.
    """
    from ..bench import layers

    settings = layers.Settings(
        ratios=ratios or layers.RATIOS,
        combines=[each.value for each in combines] if combines else layers.COMBINES,
        implementations=[each.value for each in implementations] if implementations else None,
        block_size=block_of(block_size) or (4, 4, 4),
        selection=selection.value,
        dtype=dtype.value,
        backward=backward,
        peers=[each.value for each in peers] if peers else None,
    )
    chosen = layers.chosen_shapes(shapes)
    for option, path in (("--json", json), ("--plot", plot)):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{option} {path}: there is no folder {path.parent}; make it first.")
    if plot is not None:
        check_installed("matplotlib")
    if sweep is not None:
        _sweep(chosen, settings, sweep, seconds)
        return
    rows = _measure(chosen, settings, json)
    if plot is not None:
        from ..bench import report

        report.plot(rows, plot)


def _measure(shapes: list[Any], settings: Any, json: Path | None) -> list[dict[str, Any]]:
    """Measure and print shape by shape, so that what was measured is there if something ends it."""
    from ..bench import layers, measure, report

    rows: list[dict[str, Any]] = []
    machine = measure.machine(measure.this_device())
    for shape in shapes:
        title = f"{shape.name}: {shape.tokens} tokens, {shape.batch} x {shape.heads} x {shape.head_dim}"
        mine = []
        with errors.status(f"{title} ...") as status:
            for row in layers.measure_shape(shape, settings):
                mine.append(row)
                status.update(f"{title}, {row['what']} ...")
        rows += mine
        if json != STDOUT:
            _print(mine, f"{title}, on {machine['device']}")
        if json not in (None, STDOUT):
            json.write_text(json_module.dumps({"machine": machine, "rows": rows}, indent=1))
    if json == STDOUT:
        print_json({"machine": machine, "rows": rows})
    else:
        answers.print(report.legend(rows) + ".", style="dim", highlight=False)
        if machine["device"] == "cpu":
            answers.print(
                "A CPU runs the PyTorch implementation, which says little of a GPU: `vsa-diffusers plan` does.",
                style="dim", highlight=False,
            )  # fmt: skip
    return rows


def _print(rows: list[dict[str, Any]], title: str) -> None:
    from ..bench import report

    answers.print(report.table(rows, title))
    if any("skipped" in row for row in rows):
        answers.print(report.skipped(rows))
    answers.print(report.verdict(rows), highlight=False)


def _sweep(shapes: list[Any], settings: Any, folder: Path, seconds: float) -> None:
    """Time launches, and print the best."""
    from ..bench import measure, sweep, sweep_backward

    if measure.this_device() == "cpu":
        raise ValueError(f"--sweep {folder} times launches of the kernels, which need a GPU, and there is none here.")
    run = sweep_backward.sweep if settings.backward else sweep.sweep
    rows = run(shapes, settings.ratios, settings.combines, folder, seconds)
    answers.print("\n".join(sweep.best(rows)), highlight=False, markup=False, soft_wrap=True)
