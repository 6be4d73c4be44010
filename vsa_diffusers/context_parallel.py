"""`cp_plan`: what `enable_parallelism` has to know of a video transformer."""

from __future__ import annotations

from typing import Any

import torch

from .models import require_family
from .pipeline import unwrap
from .plans import prepare_when_called


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
