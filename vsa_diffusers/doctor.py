"""`examine`: what is installed, which kernel runs and why, and whether the operation computes what it should."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F

from .attention import video_sparse_attention
from .problem import Problem
from .tiles import TileGrid, num_selected_tiles
from .version import __version__

FINE, NOTE, WARNING, BROKEN = "fine", "note", "warning", "broken"
# (package, least release, what it is for, a class of it, since some import the rest of themselves only when asked)
REQUIRED = (
    ("torch", (2, 6), "everything", "Tensor"),
    ("diffusers", (0, 40), "the pipelines", "DiffusionPipeline"),
    ("transformers", (5, 0), "text encoders", "PreTrainedModel"),
    ("accelerate", (1, 0), "loading and offloading", "Accelerator"),
    ("safetensors", (0, 4, 3), "weights", "safe_open"),
    ("imageio", (2, 34), "videos", "v3"),
)
LEAST_PYTHON = (3, 10)
INSTALL = "pip install --upgrade"
# A grid with partial tiles, whose selection is far from any tie; see `_inputs`.
SHAPE, BLOCK, HEADS, HEAD_DIM, RATIO = (6, 10, 14), (4, 4, 4), 2, 128, 0.25
SEED = 0
# Largest relative errors against fp64, by dtype.
LIMITS = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Args:
        name: of it.
        status: "fine", "note", "warning" or "broken".
        found: what it is.
        advice: what to do about it, or "".
    """

    name: str
    status: str
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Examination:
    """All that was looked at. Prints as a table with rich."""

    checks: tuple[Check, ...]

    @property
    def is_broken(self) -> bool:
        """Whether something that is needed does not work."""
        return any(check.status == BROKEN for check in self.checks)

    @property
    def advice(self) -> list[str]:
        """What to do, the most pressing first."""
        order = (BROKEN, WARNING, NOTE)
        found = sorted((check for check in self.checks if check.advice), key=lambda check: order.index(check.status))
        return [f"{check.name}: {check.advice}" for check in found]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and booleans, ready for JSON."""
        return {"broken": self.is_broken, "checks": [asdict(check) for check in self.checks], "advice": self.advice}

    def __rich__(self) -> Any:
        """What rich prints for it."""
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        colours = {FINE: "green", NOTE: "cyan", WARNING: "yellow", BROKEN: "red"}
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("what", no_wrap=True)
        table.add_column("", no_wrap=True)
        table.add_column("found")
        for check in self.checks:
            table.add_row(check.name, Text(check.status, style=colours[check.status]), Text(check.found))
        advice = [Text(f"- {sentence}") for sentence in self.advice]
        end = "Something is broken." if self.is_broken else "Everything that is needed works."
        heading = [Text("What to do:", style="bold")] if advice else []
        return Group(table, *heading, *advice, Text(end, style="bold red" if self.is_broken else "bold green"))


def examine() -> Examination:
    """Look at versions, GPUs and kernels, and compare the operation with fp64; takes seconds.

    On a GPU it first compiles the kernels, if it has not yet.
    """
    return Examination(tuple(_checks()))


def _checks() -> Iterator[Check]:
    yield Check("vsa_diffusers", FINE, __version__)
    yield _python()
    yield from _torchvision()
    yield from (_package(*row) for row in REQUIRED)
    yield _triton()
    yield from _gpus()
    yield _kernel()
    yield from _self_tests()


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} ({platform.machine()})"
    if sys.version_info[:2] < LEAST_PYTHON:
        least = ".".join(map(str, LEAST_PYTHON))
        return Check("python", BROKEN, found, f"use Python {least} or later.")
    return Check("python", FINE, found)


def _torchvision() -> Iterator[Check]:
    """If it is broken: nothing here needs it, but transformers and diffusers import it wherever it is installed."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        yield Check(
            "torchvision", BROKEN, f"it does not import: {_cause(error)}",
            f"install the one that belongs to torch {torch.__version__}, from where that came, or uninstall it; "
            "diffusers does not import beside a broken one.",
        )  # fmt: skip


def _cause(error: BaseException) -> str:
    """What an error began with, on one line: libraries that import late wrap the first one in others."""
    while (earlier := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = earlier
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _package(name: str, least: tuple[int, ...], purpose: str, part: str) -> Check:
    needed = ".".join(map(str, least))
    mend = f"{INSTALL} '{name}>={needed}'"
    try:
        found = metadata.version(name)
        getattr(importlib.import_module(name), part)
    except metadata.PackageNotFoundError:
        return Check(name, BROKEN, "not installed", f"it is needed for {purpose}; {mend}.")
    except Exception as error:  # whatever an import raises is what is wrong with it
        return Check(name, BROKEN, f"{found}, which does not import: {_cause(error)}", f"{mend}.")
    if _release(found) < least:
        return Check(name, BROKEN, found, f"{needed} or later is needed; {mend}.")
    return Check(name, FINE, found)


def _release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with."""
    numbers = []
    for part in version.split("+", maxsplit=1)[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _triton() -> Check:
    if importlib.util.find_spec("triton") is None:
        status = WARNING if torch.cuda.is_available() else NOTE
        return Check("triton", status, "not installed", f"GPUs run PyTorch without it; {INSTALL} triton.")
    from .kernels.support import MIN_TRITON, is_recent_triton

    found = metadata.version("triton")
    if is_recent_triton():
        return Check("triton", FINE, found)
    least = ".".join(map(str, MIN_TRITON))
    advice = f"the kernels need {least} or later, which PyTorch 2.11 brings; upgrade torch and triton together."
    return Check("triton", WARNING if torch.cuda.is_available() else NOTE, found, advice)


def _gpus() -> Iterator[Check]:
    if torch.cuda.is_available():
        yield Check("driver", FINE, _driver())
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield Check(
                f"GPU {index}", FINE,
                f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability "
                f"{properties.major}.{properties.minor}",
            )  # fmt: skip
        return
    built = torch.version.cuda or torch.version.hip
    if shutil.which("nvidia-smi") is None:
        yield Check("GPU", NOTE, "none", "the operation runs in PyTorch here; that is for trying things out.")
    elif built is None:
        yield Check("GPU", WARNING, "there is an NVIDIA driver, but this PyTorch is built for the CPU",
                    "install a PyTorch that is built for CUDA (pytorch.org, Get Started).")  # fmt: skip
    else:
        yield Check("GPU", WARNING, f"PyTorch, built for CUDA {built}, finds none that it can use",
                    "look at what nvidia-smi says: an old driver needs a PyTorch built for an older CUDA.")  # fmt: skip


def _driver() -> str:
    """The CUDA or ROCm that PyTorch was built for, and the CUDA that the driver serves."""
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    built = f"PyTorch is built for {torch.version.cuda}"
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))  # PyTorch tells it no longer
    except (OSError, AttributeError):
        failed = True
    if failed:
        return built
    return f"serves CUDA {version.value // 1000}.{version.value % 1000 // 10}; {built}"


def _kernel() -> Check:
    """Which kernel runs a layer of Wan 2.1 1.3B at 480p in bf16, and why."""
    if importlib.util.find_spec("triton") is None:
        return Check("kernel", WARNING if torch.cuda.is_available() else NOTE, "PyTorch, since Triton is not installed")
    from .kernels import support, tuning
    from .kernels.recording import TensorForm

    grid = TileGrid((21, 30, 52), BLOCK)
    if not torch.cuda.is_available():
        return Check("kernel", NOTE, "PyTorch, since there is no GPU for the Triton kernels")
    device = torch.device("cuda", torch.cuda.current_device())
    probe = torch.empty(1, 1, 1, HEAD_DIM, dtype=torch.bfloat16, device=device)
    obstacle = support.unsupported_reason(probe, grid.num_tiles)
    if obstacle is not None:
        # It ends with what to do for an explicit choice; here nothing was chosen.
        return Check("kernel", WARNING, f"PyTorch: the Triton kernels cannot run, since {obstacle[1].split(';')[0]}")
    shape = (1, grid.num_tokens, 12, HEAD_DIM)
    stride = (math.prod(shape[1:]), shape[2] * shape[3], shape[3], 1)
    form = TensorForm(torch.bfloat16, torch.Size(shape), stride, device, 0)
    problem = Problem(grid, num_selected_tiles(grid.num_tiles, RATIO), "merge", HEAD_DIM**-0.5)
    known = support.this_device(device)
    capability = ".".join(map(str, known.capability))
    portable = f"Triton, with the portable kernels (compute capability {capability})"
    if tuning.plan(form, form, form, problem, known).hopper is None:
        return Check("kernel", FINE, portable)
    if _hopper_works(device):
        return Check("kernel", FINE, "Triton, with the kernel that is made for Hopper: bf16, head_dim 64 or 128")
    return Check("kernel", WARNING, f"{portable}: the one that is made for Hopper does not work here",
                 "the first call warns why; another release of Triton mends it, 3.6 was measured.")  # fmt: skip


def _hopper_works(device: torch.device) -> bool:
    """Whether a call, which tries the Hopper kernel first, comes out with it."""
    from .kernels import trial

    query, key, value, _ = (x.to(device, torch.bfloat16) for x in _inputs())
    try:
        video_sparse_attention(query, key, value, SHAPE, top_k_ratio=RATIO, block_size=BLOCK, combine="merge")
    except Exception:  # the self-tests tell what it is
        return False
    found = [works for kind, works in trial.verdicts().items() if (kind.device, kind.head_dim) == (device, HEAD_DIM)]
    return bool(found) and all(found)


def _inputs() -> list[torch.Tensor]:
    """Query, key, value and gate in fp64, holding numbers of bf16.

    Tokens of a tile are alike, so that scores between tiles lie apart, and rounding does not change what is selected.
    """
    generator = torch.Generator().manual_seed(SEED)
    grid = TileGrid(SHAPE, BLOCK)
    index = grid.token_index()
    tile_of = torch.empty(grid.num_tokens, dtype=torch.long)
    for tile, tokens in enumerate(index):
        tile_of[tokens[tokens >= 0]] = tile
    tensors = []
    for like_tile in (1.5, 1.5, 0.0, 0.0):
        own = torch.randn(1, grid.num_tokens, HEADS, HEAD_DIM, generator=generator)
        shared = torch.randn(1, grid.num_tiles, HEADS, HEAD_DIM, generator=generator)
        tensors.append((own + like_tile * shared[:, tile_of]).bfloat16().double())
    return tensors


def _self_tests() -> Iterator[Check]:
    """Dense attention at ratio 1, and the sparse operation and its gradients, against fp64."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    limit = LIMITS[dtype]
    exact = _inputs()
    dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in exact[:3])).transpose(1, 2)
    cases = {
        "merge at ratio 1": (1.0, "merge", dense),
        f"merge at ratio {RATIO:g}": (RATIO, "merge", None),
        f"gate at ratio {RATIO:g}": (RATIO, "gate", None),
    }
    for name, (ratio, combine, expected) in cases.items():
        try:
            errors = _errors(exact, device, dtype, ratio, combine, expected)
        except Exception as error:  # a kernel that does not compile or launch is what this is to find
            text = " ".join(str(error).split())[:200]
            yield Check(f"self-test, {name}", BROKEN, f"{type(error).__name__}: {text}",
                        'pass implementation="torch" to enable_vsa meanwhile, and report this.')  # fmt: skip
            continue
        worst = max(errors.values())
        largest = max(errors, key=lambda name: errors[name])
        found = f"largest error {worst:.1e}, of {largest}; {limit:g} is allowed in {str(dtype).partition('.')[2]}"
        if math.isfinite(worst) and worst <= limit:
            yield Check(f"self-test, {name}", FINE, found)
        else:
            yield Check(f"self-test, {name}", BROKEN, found,
                        'results are wrong; pass implementation="torch" to enable_vsa, and report this.')  # fmt: skip


def _errors(
    exact: list[torch.Tensor],
    device: str,
    dtype: torch.dtype,
    ratio: float,
    combine: str,
    expected: torch.Tensor | None,
) -> dict[str, float]:
    """Relative errors of the output and of the query's, key's and value's gradients."""

    def run(tensors: list[torch.Tensor], implementation: str) -> tuple[torch.Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        gate = leaves[3] if combine == "gate" else None
        output = video_sparse_attention(
            leaves[0], leaves[1], leaves[2], SHAPE, top_k_ratio=ratio, block_size=BLOCK, combine=combine, gate=gate,
            implementation=implementation,
        )  # fmt: skip
        return output, *torch.autograd.grad(output, leaves[:3], tensors[3])

    right = run(exact, "torch")
    got = run([x.to(device, dtype) for x in exact], "auto")
    output = right[0] if expected is None else expected
    references = (output.detach(), *right[1:])
    names = ("the output", "query's gradient", "key's gradient", "value's gradient")
    return {
        name: float((mine.detach().cpu().double() - reference).norm() / reference.norm())
        for name, mine, reference in zip(names, got, references, strict=True)
    }
