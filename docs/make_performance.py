"""Print the rows of performance.md that `docs/measurements` holds as JSON, so that the page says what was measured.

python docs/make_performance.py
"""

import json
from collections.abc import Iterator
from pathlib import Path

MEASUREMENTS = Path(__file__).parent / "measurements"
VIDEOS = {
    "ltx2-512p": ("LTX-2, 512x768, 121 frames", 6_144),
    "cogvideox-480p": ("CogVideoX-5B, 480x720, 49 frames, batch 2", 17_550),
    "wan1.3b-480p": ("Wan 2.1 1.3B, 480x832, 81 frames", 32_760),
    "wan5b-720p": ("Wan 2.2 5B, 704x1280, 121 frames", 27_280),
    "ltx2-1080p": ("LTX-2, 1088x1920, 121 frames", 32_640),
    "wan14b-720p": ("Wan 2.1 14B, 720x1280, 81 frames", 75_600),
    "hunyuan-720p": ("HunyuanVideo, 720x1280, 129 frames", 118_800),
}
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
}
# Files of the present kernels, or of those before changes that the page names; a star marks the rows of the others.
PRESENT = ("h200-forward", "h200-quarters", "h200-quarters-auto", "h200-backward")
RATIOS = (0.5, 0.2, 0.1)


def layer() -> Iterator[str]:
    """One layer, by means: dense milliseconds, and times as fast with a gate and in merge."""
    for shape, (video, tokens) in VIDEOS.items():
        speedups = [
            speedup("h200-forward", shape, f"triton {combine}", ratio)
            for combine in ("gate", "merge")
            for ratio in RATIOS
        ]
        tokens_cell = f"{tokens:,}".replace(",", " ")
        yield line(starred("h200-forward", video), tokens_cell, dense("h200-forward", shape), *speedups)


def quarters() -> Iterator[str]:
    """One layer in merge, by quarters: times as fast with blocks of (4, 4, 4) and with the automatic block."""
    for shape, (video, _) in VIDEOS.items():
        if rows("h200-quarters", shape):
            fixed = [speedup("h200-quarters", shape, "triton merge", ratio) for ratio in RATIOS]
            automatic = ["the same block", "", ""]
            if rows("h200-quarters-auto", shape):
                automatic = [speedup("h200-quarters-auto", shape, "triton merge", ratio) for ratio in RATIOS]
            yield line(starred("h200-quarters", video), *fixed, *automatic)


def training() -> Iterator[str]:
    """One layer forward and backward: dense milliseconds, and times as fast with a gate and in merge."""
    for shape, (video, _) in VIDEOS.items():
        if rows("h200-backward", shape):
            speedups = [
                speedup("h200-backward", shape, f"triton {combine}", ratio)
                for combine in ("gate", "merge")
                for ratio in RATIOS
            ]
            yield line(starred("h200-backward", video), dense("h200-backward", shape), *speedups)


def models(name: str, mode: str | None = None) -> Iterator[str]:
    """Whole transformers: seconds dense and at 0.2 as `enable_vsa` gives it, and times as fast."""
    content = json.loads((MEASUREMENTS / f"{name}.json").read_text())["rows"]
    found = {(row["model"], row["what"].split()[0]): row for row in content if row["compile"] == mode}
    for model, (title, video) in MODELS.items():
        if (model, "dense") in found:
            before, after = (found[model, what] for what in ("dense", "merge"))
            yield line(title, video, *(seconds(row) for row in (before, after)), f"{after['speedup']:.2f}")


def beside_peers() -> Iterator[str]:
    """Two videos, other packages in the same run: times as fast as dense."""
    for what, title in PEERS.items():
        first = "h200-peers" if has("h200-peers", "ltx2-512p", what) else "h200-peers-wan"
        cells = [
            speedup(name, shape, what, ratio) if has(name, shape, what) else ""
            for name, shape in ((first, "ltx2-512p"), ("h200-peers-wan", "wan1.3b-480p"))
            for ratio in RATIOS
        ]
        yield line(title, *cells)


def has(name: str, shape: str, what: str) -> bool:
    """Whether one file has a row of this."""
    return any(row["what"] == what for row in rows(name, shape))


def rows(name: str, shape: str) -> list[dict]:
    """What one file has of one shape."""
    return [row for row in json.loads((MEASUREMENTS / f"{name}.json").read_text())["rows"] if row["shape"] == shape]


def dense(name: str, shape: str) -> str:
    """Milliseconds of the faster dense backend."""
    fastest = min(row["ms"] for row in rows(name, shape) if row["what"].startswith("dense"))
    return f"{fastest:.3g}" if fastest < 1000 else f"{fastest:.0f}"


def seconds(row: dict) -> str:
    """To three figures."""
    return f"{row['seconds']:.3f}" if row["seconds"] < 1 else f"{row['seconds']:.3g}"


def speedup(name: str, shape: str, what: str, ratio: float) -> str:
    """Times as fast as dense."""
    [row] = [row for row in rows(name, shape) if (row["what"], row["ratio"]) == (what, ratio)]
    return f"{row['speedup']:.2f}"


def starred(name: str, video: str) -> str:
    """The video, with a star if the kernels have changed since."""
    return video if name in PRESENT else f"* {video}"


def line(*cells: str) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |".replace("  ", " ")


if __name__ == "__main__":
    compiled, eager = models("h200-compiled", "default"), models("h200-transformers")
    print(*layer(), "", *quarters(), "", *compiled, "", *eager, "", *beside_peers(), "", *training(), sep="\n")
