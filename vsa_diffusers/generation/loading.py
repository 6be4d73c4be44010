"""A pipeline ready to be called: loaded, with what was trained, on its device, compiled."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from ..attention import check_choice
from ..extras import check_installed
from ..files import MissingDirectoryError, PathLike, read_json
from ..gates import load_gates
from ..pipeline import supported_parts

OFFLOADS = ("none", "model", "sequential", "group")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
RECOMMENDED = "recommended.json"


def default_device() -> str:
    """The GPU, if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_pipeline(
    model: PathLike,
    *,
    dtype: str | None = None,
    device: str | torch.device | None = None,
    lora: PathLike | None = None,
    gates: PathLike | None = None,
) -> DiffusionPipeline:
    """Load a video pipeline, and what was trained for it; it stays in main memory until `place` is called.

    Args:
        model: a folder with `model_index.json`, or a repository on the Hugging Face Hub.
        dtype: one of `DTYPES`; `None` takes bfloat16 for a GPU and float32 for the CPU.
        device: what `dtype` is chosen for; `None` takes the GPU if there is one.
        lora: of diffusers' form: a directory, a `.safetensors` file, or a repository.
        gates: a directory or repository that `save_gates` wrote.

    Raises:
        ValueError: the model is not a video pipeline with a supported transformer, or what was trained does not fit.
        ImportError: `lora` is given, and peft is not installed.
        OSError: there is no such model.
    """
    dtype = dtype or ("float32" if torch.device(device or default_device()).type == "cpu" else "bfloat16")
    check_choice("dtype", dtype, tuple(DTYPES))
    if Path(model).is_dir() and not (Path(model) / "model_index.json").exists():
        modular = (Path(model) / "modular_model_index.json").exists()
        kind = "is a modular pipeline, which is not supported" if modular else "has no model_index.json"
        raise ValueError(f"{model} {kind}; pass the folder of a pipeline, as its save_pretrained writes it.")
    if not Path(model).exists() and str(model).startswith((".", "/", "~")):
        raise MissingDirectoryError(f"{model}: no such directory; check the path.")
    if lora is not None:
        check_installed("peft", extra="train")
    try:
        pipe = DiffusionPipeline.from_pretrained(model, dtype=DTYPES[dtype])
    except OSError as error:
        if Path(model).exists():
            raise
        raise MissingDirectoryError(
            f"model={str(model)!r}: no such directory, and the Hugging Face Hub did not give a pipeline of that name "
            f"({error.__cause__ or error}); check the path, or the name and the connection."
        ) from error
    pipe.set_progress_bar_config(disable=True)
    supported_parts(pipe)
    if lora is not None:
        if not hasattr(pipe, "load_lora_weights"):
            raise ValueError(f"{type(pipe).__name__} takes no LoRA; leave lora={str(lora)!r} out.")
        single = {"weight_name": Path(lora).name} if Path(lora).is_file() else {}
        pipe.load_lora_weights(str(Path(lora).parent if single else lora), **single)
    if gates is not None:
        parts = supported_parts(pipe)
        if len(parts) > 1:
            raise ValueError(
                f"gates={str(gates)!r} are of one transformer, but {type(pipe).__name__} has {', '.join(parts)}; put "
                "them on each with load_gates and save all with save_vsa."
            )
        load_gates(next(iter(parts.values())), gates)
    return pipe


def pipeline_class(model: PathLike) -> type | None:
    """The class of a model folder's pipeline, known without loading it; `None` where only loading would tell."""
    index = Path(model) / "model_index.json"
    return getattr(diffusers, str(read_json(index).get("_class_name")), None) if index.exists() else None


def recommended_call(model: PathLike) -> tuple[dict[str, Any], int]:
    """Arguments and seed that a model folder itself recommends for its pipeline's call, in `recommended.json`.

    Where there is no such file, none, and 0.
    """
    path = Path(model) / RECOMMENDED
    arguments = read_json(path) if path.exists() else {}
    return arguments, arguments.pop("seed", 0)


def place(pipe: DiffusionPipeline, device: str | torch.device | None = None, offload: str = "none") -> None:
    """Put the pipeline onto its device, or let it move there piece by piece; call it after `enable_vsa`.

    Args:
        pipe: the pipeline.
        device: `None` takes the GPU if there is one.
        offload: `"none"`; or, from fast to frugal, `"model"`: one component at a time is on the GPU; `"group"`: one
            leaf at a time, loaded ahead of its use; `"sequential"`: one leaf at a time.

    Raises:
        ValueError: as `check_place`.
    """
    target = check_place(device, offload)
    if offload == "none":
        pipe.to(target)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=target)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=target)
    else:
        pipe.enable_group_offload(target, offload_type="leaf_level", use_stream=target.type == "cuda")


def check_place(device: str | torch.device | None = None, offload: str = "none") -> torch.device:
    """The device that `place` will use, refused before anything is loaded for it.

    Raises:
        ValueError: `device` is none that this PyTorch can use on this machine, or there is nothing to offload from,
            since it is the CPU.
    """
    check_choice("offload", offload, OFFLOADS)
    try:
        target = torch.device(device or default_device())
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:  # the latter of a PyTorch that was built without CUDA
        raise ValueError(
            f"device={str(device)!r} cannot be used by PyTorch {torch.__version__} here "
            f"({_first_sentence(error)}); leave it out, and the GPU is taken if there is one."
        ) from error
    if offload != "none" and target.type == "cpu":
        raise ValueError(f"offload={offload!r} moves weights between a GPU and main memory; use 'none' on the CPU.")
    return target


def _first_sentence(error: BaseException) -> str:
    return str(error).splitlines()[0].split(". ")[0].rstrip(".")


def compile_blocks(pipe: DiffusionPipeline) -> None:
    """Compile the blocks of every video transformer; call it last, after `enable_vsa` and `place`."""
    for transformer in supported_parts(pipe).values():
        compile_repeated(transformer)


def compile_repeated(transformer: torch.nn.Module, **options: Any) -> None:
    """Compile a transformer's repeated blocks, also where diffusers does not say which they are (CogVideoX, Mochi).

    Args:
        transformer: of diffusers.
        options: of `torch.compile`.
    """
    if getattr(transformer, "_repeated_blocks", None):
        transformer.compile_repeated_blocks(**options)
        return
    for stack in transformer.children():
        for block in stack if isinstance(stack, torch.nn.ModuleList) else ():
            block.compile(**options)


def is_compiled(pipe: DiffusionPipeline) -> bool:
    """Whether something in the pipeline's transformers runs compiled."""
    return any(
        getattr(module, "_compiled_call_impl", None) is not None
        for transformer in supported_parts(pipe).values()
        for module in transformer.modules()
    )


def with_own_transformers(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """A pipeline of the same components, but for copies of its video transformers, for other weights."""
    parts = {name: copy.deepcopy(part) for name, part in supported_parts(pipe).items()}
    other = type(pipe)(**pipe.components | parts)
    other.set_progress_bar_config(disable=True)
    return other
