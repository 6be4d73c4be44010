"""Distil the measurements that `vsa-diffusers plan` estimates from: `python docs/make_planning.py --write`.

Without `--write` it prints the distilled file. What it is made of stands in `docs/measurements`.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from vsa_diffusers.bench.full_size import FULL_SIZES
from vsa_diffusers.bench.shapes import SHAPES
from vsa_diffusers.planning.costs import count
from vsa_diffusers.tiles import fitting_block_size

MEASUREMENTS = Path(__file__).parent / "measurements"
DISTILLED = Path(__file__).parents[1] / "vsa_diffusers" / "planning" / "measured.json"
TRITON = "3.6"
FIXED = (4, 4, 4)
# By file: GPU, date and commit of the measurement, whether the block fitted the video, what tiles were selected by.
LAYERS = {
    "h100-quarters": ("H100", "2026-11-25", "2765f74", False, "quarters"),
    "h100-quarters-auto": ("H100", "2026-11-25", "2765f74", True, "quarters"),
    "h100-output-box": ("H100", "2026-11-25", "12cad22", False, "mean"),
    "h100-forward": ("H100", "2026-11-25", "2765f74", False, "mean"),
    "h200-quarters": ("H200", "2026-11-30", "cf63129", False, "quarters"),
    "h200-quarters-auto": ("H200", "2026-11-30", "cf63129", True, "quarters"),
    "h200-forward": ("H200", "2026-11-30", "cf63129", False, "mean"),
}
# By file: GPU, date and commit; the files whose layers these models have, the best last; what was measured.
MODELS = {
    "h100-transformers": ("H100", "2026-11-25", "8027e27", ("h100-forward", "h100-output-box"),
                          "merge 0.2 by means, blocks of (4, 4, 4)"),
    "h200-transformers": ("H200", "2026-11-30", "cf63129", ("h200-quarters", "h200-quarters-auto"),
                          "merge 0.2 by quarters, the block that fits"),
}  # fmt: skip
LAYER_OF_MODEL = {"cogvideox5b-480p": "cogvideox-480p"}
TEXT_TOKENS = {"wan1.3b-480p": 512, "wan14b-720p": 512, "ltx2-512p": 1024, "ltx2-1080p": 1024, "hunyuan-720p": 256,
               "cogvideox5b-480p": 226}  # fmt: skip


def distilled() -> dict:
    """What is written."""
    layers = [row for name in LAYERS for row in layer_rows(name)]
    # Where a shape was measured again with the present kernels, the older row goes.
    kept = {}
    for row in layers:
        kept.setdefault((row["gpu"], row["shape"], row["combine"], row["selection"], row["fitted"]), row)
    models = {gpu: list(model_rows(name)) for name, (gpu, *_) in MODELS.items()}
    return {
        "layers": list(kept.values()),
        "models": [row for rows in models.values() for row in rows],
        "rest": {gpu: rest(rows) for gpu, rows in models.items()},
    }


def layer_rows(name: str):
    """One row for each shape and combine of a file: dense time, and times as fast by ratio."""
    gpu, date, commit, fitted, selection = LAYERS[name]
    content = json.loads((MEASUREMENTS / f"{name}.json").read_text())
    for shape in SHAPES.values():
        mine = [row for row in content["rows"] if row["shape"] == shape.name]
        dense = min((row["ms"] for row in mine if row["ratio"] is None), default=None)
        block = fitting_block_size(shape.video_shape) if fitted else FIXED
        for combine in ("merge", "gate"):
            sparse = [row for row in mine if row["what"] == f"triton {combine}"]
            if not sparse:
                continue
            yield {
                "gpu": gpu,
                "device": content["machine"]["device"],
                "torch": content["machine"]["torch"],
                "triton": content["machine"].get("triton", TRITON),
                "file": f"docs/measurements/{name}.json",
                "date": content["machine"].get("date", date),
                "commit": commit,
                "shape": shape.name,
                "video_shape": shape.video_shape,
                "batch": shape.batch,
                "heads": shape.heads,
                "head_dim": shape.head_dim,
                "block": block,
                "fitted": fitted,
                "selection": selection,
                "combine": combine,
                "dense_ms": round(dense, 4),
                "host_ms": round(min(row["cpu_us"] for row in sparse) / 1e3, 3),  # the same work at every ratio
                "speedups": {f"{row['ratio']:g}": round(row["speedup"], 3) for row in sparse},
            }


def model_rows(name: str):
    """One row for each whole transformer of a file, with its counted costs."""
    gpu, date, commit, files, what = MODELS[name]
    rows = json.loads((MEASUREMENTS / f"{name}.json").read_text())["rows"]
    layers = {row["shape"]: row for file in files for row in layer_rows(file) if row["combine"] == "merge"}
    for size in FULL_SIZES.values():
        costs = count(size.build("meta", torch.bfloat16))
        grid, text = size.video_shape(), TEXT_TOKENS[size.name]
        dense, sparse = (
            next(row["seconds"] for row in rows if row["model"] == size.name and row["what"].startswith(what))
            for what in ("dense", "merge 0.2")
        )
        layer = layers[LAYER_OF_MODEL.get(size.name, size.name)]
        attention = len(costs.layers) * layer["dense_ms"] / 1e3
        yield {
            "gpu": gpu,
            "file": f"docs/measurements/{name}.json",
            "date": date,
            "commit": commit,
            "model": size.name,
            "checkpoint": size.checkpoint,
            "video": size.video,
            "video_shape": grid,
            "batch": size.batch,
            "what": what,
            "dense_s": round(dense, 4),
            "sparse_s": round(sparse, 4),
            "attention_dense_s": round(attention, 4),
            "attention_sparse_s": round(attention / layer["speedups"]["0.2"], 4),
            "other_flops": costs.other_flops(grid, size.batch, text),
            "elements": costs.elements(grid, size.batch),
            "attention_share_of_flops": round(costs.attention_share(grid, size.batch, text), 3),
        }


def rest(models: list[dict]) -> dict:
    """What everything but video self-attention takes: so much a FLOP, and so much a number in the hidden states.

    Fitted by least squares of relative errors to what the sparse forwards take beside their attention: dense ones may
    be slowed down by masks. `left_out` tells how far off each whole model's speed-up is when it takes no part in this.
    """
    counted = np.array([[row["other_flops"], row["elements"]] for row in models])
    seconds = np.array([row["sparse_s"] - row["attention_sparse_s"] for row in models])

    def fit(which):
        scaled = counted[which] / seconds[which, None]
        return np.linalg.lstsq(scaled, np.ones(len(scaled)), rcond=None)[0]

    errors = {}
    for position, row in enumerate(models):
        others = np.arange(len(models)) != position
        other = float(counted[position] @ fit(others))
        predicted = (other + row["attention_dense_s"]) / (other + row["attention_sparse_s"])
        errors[row["model"]] = round(predicted / (row["dense_s"] / row["sparse_s"]) - 1, 3)
    per_flop, per_element = fit(np.arange(len(models)))
    return {"seconds_per_flop": float(f"{per_flop:.4g}"), "seconds_per_element": float(f"{per_element:.4g}"),
            "left_out": errors}  # fmt: skip


def text() -> str:
    """As it stands in the package, a line for each row."""
    content = distilled()
    lists = [f'"{name}": [\n' + ",\n".join(map(json.dumps, content[name])) + "\n]" for name in ("layers", "models")]
    return "{\n" + ",\n".join([*lists, f'"rest": {json.dumps(content["rest"])}']) + "\n}\n"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        DISTILLED.write_text(text())
    else:
        print(text(), end="")
