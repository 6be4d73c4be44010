"""Runs many cases on several processes that are started once, with gloo instead of GPUs unless NCCL is asked for."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import diffusers.hooks.context_parallel as hooks
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from torch import multiprocessing

from leaving import leave
from vsa_diffusers import cp_plan

Cases = Mapping[str, Callable[[], None]]


def outcomes(
    module: str, table: str, ranks: int, folder: Path, timeout: float = 400, backend: str = "gloo"
) -> dict[str, str]:
    """What every case of a module's table ended with on the first rank on which it failed; empty where it passed."""
    context = multiprocessing.spawn(_work, (ranks, module, table, str(folder), backend), nprocs=ranks, join=False)
    until = time.monotonic() + timeout
    try:
        while not context.join(timeout=1):
            if time.monotonic() > until:
                raise TimeoutError(f"{ranks} processes did not end within {timeout} seconds.")
    finally:
        for process in context.processes:
            process.kill()
    told = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    return {name: next((each[name] for each in told if each[name]), "") for name in told[0]}


def _work(rank: int, ranks: int, module: str, table: str, folder: str, backend: str) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    else:
        # diffusers counts accelerators, and gathers parts of different sizes as NCCL can and gloo cannot.
        torch.accelerator.device_count = lambda: 1
        hooks._all_gather_anything = all_gather_anything
    store = dist.FileStore(os.path.join(folder, "store"), ranks)
    dist.init_process_group(backend, rank=rank, world_size=ranks, store=store, timeout=timedelta(seconds=30))
    cases: Cases = getattr(importlib.import_module(module), table)
    told = {}
    for place, (name, case) in enumerate(cases.items()):
        torch.manual_seed(0)
        begin = time.perf_counter()
        try:
            case()
            told[name] = ""
        except Exception:
            told[name] = f"rank {rank}: {traceback.format_exc()}"
        if rank == 0 and "-v" in sys.argv:
            print(f"{name}: {time.perf_counter() - begin:.1f} s", told[name], flush=True)
        store.add(f"done {place}", 1)
        while store.add(f"done {place}", 0) < ranks:
            time.sleep(0.002)
    Path(folder, f"{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()
    leave()


def all_gather_anything(tensor, dim, group):
    sizes = [None] * dist.get_world_size(group)
    dist.all_gather_object(sizes, tensor.shape[dim], group)
    rows = tensor.movedim(dim, 0)
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).movedim(0, dim)


def spread(model: torch.nn.Module, plan=None, **config) -> torch.nn.Module:
    """The model with its tokens over all ranks."""
    degree = dist.get_world_size() // config.get("ring_degree", 1)
    config = ContextParallelConfig(**{"ulysses_degree": degree} | config)
    model.enable_parallelism(config=config, cp_plan=cp_plan(model) if plan is None else plan)
    return model


def averaged(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Their mean over the ranks, as DDP takes it; what a rank has no gradient for is zero there."""
    for gradient in gradients.values():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return gradients
