"""Classifier-free guidance over two groups of GPUs: each computes one of the two predictions of a step."""

from __future__ import annotations

import logging
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from diffusers.hooks import HookRegistry, ModelHook

from .pipeline import supported_parts

logger = logging.getLogger(__name__)

Pipeline = TypeVar("Pipeline")
_HOOK = "vsa_guidance_parallel"
TWO_CALLS = (
    *("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline", "WanVACEPipeline"),
    *("SkyReelsV2Pipeline", "SkyReelsV2ImageToVideoPipeline", "ChronoEditPipeline", "LucyEditPipeline"),
)
"""Pipelines that call their transformer twice a step, with the prompt and without, and then combine."""


def enable_guidance_parallel(pipe: Pipeline, mesh: Any = None) -> Pipeline:
    """Let each of two GPUs, or groups of GPUs, make one of the two predictions that guidance needs in a step.

    Once a step the groups exchange their predictions, and go on alike. Where a pipeline calls its transformer with a
    batch of both, each group takes a half; where it calls it twice, one call.

        mesh = init_device_mesh("cuda", (2, 1, 4), mesh_dim_names=("guidance", "ring", "ulysses"))
        enable_guidance_parallel(pipe, mesh)
        config = ContextParallelConfig(ulysses_degree=4, mesh=mesh["ring", "ulysses"])
        pipe.transformer.enable_parallelism(config=config, cp_plan=cp_plan(pipe.transformer))

    All ranks must call the pipeline with the same arguments, and generators of the same seed.

    Args:
        pipe: a pipeline with one or several supported transformers.
        mesh: with a dimension "guidance" of size 2; `None` takes all ranks, of which there must be two.

    Returns:
        `pipe` itself.

    Raises:
        ValueError: there are not two groups, or the pipeline has no supported transformer.
    """
    if mesh is None:
        group, what = dist.group.WORLD, "the number of processes"
    elif "guidance" in (mesh.mesh_dim_names or ()):
        group, what = mesh["guidance"].get_group(), 'the size of mesh["guidance"]'
    else:
        raise ValueError(f'mesh={mesh} has no dimension "guidance"; name one of size 2 so.')
    if dist.get_world_size(group) != 2:
        raise ValueError(
            f"{what} is {dist.get_world_size(group)}, and guidance has two predictions; pass a mesh with a dimension "
            '"guidance" of size 2, the others for Ulysses.'
        )
    disable_guidance_parallel(pipe)
    for transformer in supported_parts(pipe).values():
        registry = HookRegistry.check_if_exists_or_initialize(transformer)
        registry.register_hook(_OneOfTwo(pipe, group), _HOOK)
    return pipe


def disable_guidance_parallel(pipe: Pipeline) -> Pipeline:
    """Let every GPU make both predictions again; a pipeline where it does is left as it is.

    Args:
        pipe: the pipeline.

    Returns:
        `pipe` itself.
    """
    for transformer in supported_parts(pipe).values():
        registry = HookRegistry.check_if_exists_or_initialize(transformer)
        if registry.get_hook(_HOOK) is not None:
            registry.remove_hook(_HOOK, recurse=False)
    return pipe


class _OneOfTwo(ModelHook):
    """In the place of a transformer's forward: this group's part of it, and the other's from the other group."""

    def __init__(self, pipe: Any, group: Any):
        super().__init__()
        self.pipe = pipe
        self.group = group
        self.rank = dist.get_rank(group)
        self.first: tuple[Any, list[torch.Tensor]] | None = None
        self.told = False

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if isinstance(latents, torch.Tensor) and latents.shape[0] % 2 == 0:
            return self._half_a_batch(latents.shape[0], args, kwargs)
        if not getattr(self.pipe, "do_classifier_free_guidance", False):
            if not self.told:
                self.told = True
                logger.warning("%s has guidance switched off: both groups compute the same.", type(self.pipe).__name__)
            return self.fn_ref.original_forward(*args, **kwargs)
        if type(self.pipe).__name__ not in TWO_CALLS:
            raise ValueError(
                f"{type(self.pipe).__name__} is not among the pipelines whose two calls of a step are known "
                f"({', '.join(TWO_CALLS)}), and its batch of {len(latents)} has no halves; call "
                "disable_guidance_parallel(pipe)."
            )
        return self._one_of_two_calls(latents, args, kwargs)

    def _half_a_batch(self, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def half(value: Any) -> Any:
            has_batch = isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == batch
            return value.chunk(2)[self.rank] if has_batch else value

        own = _outputs(
            self.fn_ref.original_forward(*map(half, args), **{name: half(value) for name, value in kwargs.items()})
        )
        return tuple(torch.cat(self._exchanged(each)) for each in own)

    def _one_of_two_calls(self, latents: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The first call returns at once on the second group, with tensors that its second call fills."""
        if self.first is None or self.first[0] is not latents:
            own = [torch.empty(0, device=latents.device)]
            if self.rank == 0:
                own = list(_outputs(self.fn_ref.original_forward(*args, **kwargs)))
            self.first = latents, own
            return tuple(own)
        _, first = self.first
        self.first = None
        own = first if self.rank == 0 else list(_outputs(self.fn_ref.original_forward(*args, **kwargs)))
        both = [self._exchanged(each) for each in own]
        if self.rank == 1:
            for empty, (theirs, _) in zip(first, both, strict=True):
                empty.data = theirs
        return tuple(second for _, second in both)

    def _exchanged(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(2)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return parts


def _outputs(output: Any) -> tuple[torch.Tensor, ...]:
    if isinstance(output, tuple) and all(isinstance(each, torch.Tensor) for each in output):
        return output
    raise ValueError(
        f"the transformer returned {type(output).__name__}, and guidance over two groups exchanges tuples of tensors; "
        "call it with return_dict=False."
    )
