"""`cp_plan`: what `enable_parallelism` has to know of a video transformer; `spread_over_gpus` for whole pipelines."""

from __future__ import annotations

import logging
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from .guidance_parallel import enable_guidance_parallel
from .models import require_family
from .pipeline import supported_parts, unwrap
from .plans import prepare_when_called

logger = logging.getLogger(__name__)

Pipeline = TypeVar("Pipeline")


def cp_plan(transformer: torch.nn.Module) -> dict[str, Any]:
    """How a video transformer's tokens are spread over GPUs, for diffusers' `enable_parallelism`.

        config = ContextParallelConfig(ulysses_degree=2)
        pipe.transformer.enable_parallelism(config=config, cp_plan=cp_plan(pipe.transformer))

    The video stream is split; text and audio are whole on every rank, so that their lengths do not matter. Before each
    forward from now on, the transformer is made ready for that: all of its video self-attention attends over all ranks,
    dense or sparse, whether VSA is enabled or not. Gradients come out so that their mean over the ranks, which DDP and
    FSDP take, is that of one GPU.

    Args:
        transformer: a supported video transformer; a pipeline's others need a plan of their own.

    Returns:
        The plan. Where diffusers has the same one, it is that.

    Raises:
        ValueError: the transformer is not supported, or its tokens cannot be split; the message says why.
    """
    transformer = unwrap(transformer)
    family = require_family(transformer)
    name = type(transformer).__name__
    obstacle = family.why_not_parallel(transformer)
    if obstacle is not None:
        raise ValueError(f"{name} cannot run under context parallelism: {obstacle}.")
    plan = family.context_parallel_plan(transformer)
    if plan is None:
        raise ValueError(
            f"{name} was taught with register_transformer, which knows no plan; write one, as diffusers describes it "
            "for ContextParallelConfig, and pass it to enable_parallelism."
        )
    prepare_when_called(transformer, family)
    return dict(plan)


def spread_over_gpus(pipe: Pipeline, *, guidance_parallel: bool = False) -> Pipeline:
    """Let all processes of `torch.distributed` make one video together: by Ulysses, and perhaps guidance in two groups.

    Every process must have loaded the pipeline, must call it with the same arguments and generators of the same seed,
    and gets the whole video. `enable_vsa` may come before or after.

    Args:
        pipe: a pipeline with one or several supported transformers.
        guidance_parallel: two groups, one for each of guidance's two predictions, and Ulysses within them; see
            `enable_guidance_parallel`. It is worth more than Ulysses where a pipeline makes both.

    Returns:
        `pipe` itself.

    Raises:
        ValueError: the pipeline has no supported transformer, or processes are too few or odd in number.
    """
    from diffusers import ContextParallelConfig

    ranks = dist.get_world_size()
    groups = 2 if guidance_parallel else 1
    if ranks < 2 or ranks % groups:
        raise ValueError(
            f"{ranks} processes cannot be spread over in {groups} groups; start them with torchrun "
            f"--nproc-per-node {max(2, ranks + ranks % groups)}."
        )
    device = torch._C._get_accelerator().type
    names = ("guidance", "ring", "ulysses")
    mesh = init_device_mesh(device, (groups, 1, ranks // groups), mesh_dim_names=names)
    if ranks > groups:
        degree = ranks // groups
        config = ContextParallelConfig(ulysses_degree=degree, mesh=mesh["ring", "ulysses"], ulysses_anything=True)
        for name, transformer in supported_parts(pipe).items():
            obstacle = require_family(transformer).why_not_parallel(transformer)
            if obstacle is None:
                transformer.enable_parallelism(config=config, cp_plan=cp_plan(transformer))
            else:
                logger.warning("%s runs whole on every rank: %s.", name, obstacle)
    if guidance_parallel:
        enable_guidance_parallel(pipe, mesh)
    return pipe
