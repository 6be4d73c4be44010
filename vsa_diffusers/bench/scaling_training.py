"""A step of training over several GPUs: weights sharded over all of them, each video over some of them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from .full_size import FullSize
from .parts import between, mark
from .spreading import add_random_gates, enable_ulysses, from_all, make_mesh, number_of_layers, set_attention
from .transformers import _free

COLUMNS = ("model", "what", "GPUs", "a video", "loss", "error", "step", "forward", "backward", "AdamW", "peak GB")
LEARNING_RATE = 1e-5


def measure_steps(size: FullSize, device: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each attention: the loss of a forward alone, then training steps of the same batch.

    The first step's loss is compared, and the fastest step is what is reported; the JSON has all of them.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ranks, together = dist.get_world_size(), args.context_parallel
    mesh = make_mesh(device, together)
    for what in args.what:
        model = build(size, device, dtype, args.tiny, gates=what == "gate")
        words = set_attention(model, what, args.ratio, args.block_size)
        if together > 1:
            enable_ulysses(model, mesh, args.uneven)
        batch = make_batch(size, model.config, device, dtype, args.tiny, seed=mesh.get_local_rank("forward"))
        found = alone(model, batch, device)
        shard(model, device, dtype)
        found |= train(model, batch, device, args.runs)
        found["error"] = abs(found["steps"][0]["loss"] - found["forward_loss"]) / abs(found["forward_loss"])
        told = from_all(found)
        yield {
            "model": size.name,
            "layers": number_of_layers(model),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "video_shape": size.video_shape(args.tiny),
            "what": words,
            "gpus": ranks,
            "context_parallel": together,
            "error": max(each["error"] for each in told),
            "ranks": told,
        }
        del model
        _free(device)


def build(size: FullSize, device: str, dtype: torch.dtype, tiny: bool, gates: bool) -> torch.nn.Module:
    """The whole model in one dtype, which FSDP asks for, ready to be trained with its blocks recomputed."""
    torch.manual_seed(0)
    model = size.build(device, dtype, tiny)
    if gates:
        add_random_gates(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.requires_grad_(True).train()
    model.enable_gradient_checkpointing()
    return model


def make_batch(
    size: FullSize, config: Any, device: str, dtype: torch.dtype, tiny: bool, seed: int
) -> tuple[dict[str, Any], torch.Tensor]:
    """One video's inputs, and what is to be predicted; all ranks that share the video get the same."""
    torch.manual_seed(seed)
    inputs = size.make_inputs(config, device, dtype, tiny)
    return inputs, torch.randn_like(inputs["hidden_states"], dtype=torch.float32)


def loss_of(model: torch.nn.Module, batch: tuple[dict[str, Any], torch.Tensor]) -> torch.Tensor:
    """Mean squared error, in fp32."""
    inputs, target = batch
    return torch.nn.functional.mse_loss(model(**inputs, return_dict=False)[0].float(), target)


def alone(model: torch.nn.Module, batch: tuple[dict[str, Any], torch.Tensor], device: str) -> dict[str, Any]:
    """The loss and the peak memory of a forward without gradients, each rank of the video holding all weights."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        loss = float(loss_of(model, batch))
    return {"forward_loss": loss} | ({"forward_peak_bytes": _peak()} if device == "cuda" else {})


def shard(model: torch.nn.Module, device: str, dtype: torch.dtype) -> None:
    """Keep a part of the weights on each rank, in fp32, and gather one block at a time, in the dtype they had."""
    # By itself FSDP would take the GPUs, where there are some.
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    for module in (*blocks, model):
        for parameter in module.parameters():
            if parameter.dtype != torch.float32:  # those of blocks are sharded by now
                parameter.data = parameter.data.float()
        fully_shard(module, mesh=mesh, mp_policy=policy)


def train(
    model: torch.nn.Module, batch: tuple[dict[str, Any], torch.Tensor], device: str, steps: int
) -> dict[str, Any]:
    """Steps of AdamW: seconds of each one's parts, its loss and its gradient's norm; the peak memory of all."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=device == "cuda")
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = []
    for _ in range(steps):
        dist.barrier()
        marks = [mark(device)]
        loss = loss_of(model, batch)
        marks.append(mark(device))
        loss.backward()
        marks.append(mark(device))
        norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
        optimizer.step()
        optimizer.zero_grad()
        marks.append(mark(device))
        parts = zip(("forward", "backward", "optimizer"), marks, marks[1:], strict=False)
        found.append(
            {
                "seconds": between(marks[0], marks[-1]),
                "loss": float(loss.detach()),
                "gradient_norm": float(norm.full_tensor()),
            }
            | {name: between(start, end) for name, start, end in parts}
        )
    return {"steps": found} | ({"peak_bytes": _peak()} if device == "cuda" else {})


def _peak() -> int:
    return torch.cuda.max_memory_allocated()


def cells(row: dict[str, Any]) -> list[str]:
    """One result as the table shows it, in seconds, of the step whose slowest rank is fastest."""
    of_steps = zip(*(each["steps"] for each in row["ranks"]), strict=True)
    steps = [max(of_ranks, key=lambda each: each["seconds"]) for of_ranks in of_steps]
    best = min(steps, key=lambda each: each["seconds"])
    peaks = [each["peak_bytes"] for each in row["ranks"] if "peak_bytes" in each]
    return [
        row["model"],
        f"{row['what']}, {row['layers']} layers",
        str(row["gpus"]),
        f"{row['context_parallel']} GPUs",
        f"{row['ranks'][0]['steps'][0]['loss']:.6f}",
        f"{row['error']:.1e}",
        *(f"{best[name]:.2f}" for name in ("seconds", "forward", "backward", "optimizer")),
        f"{max(peaks) / 1e9:.1f}" if peaks else "",
    ]
