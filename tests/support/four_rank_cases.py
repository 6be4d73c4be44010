"""What four ranks have to do as one does, by name."""

from __future__ import annotations

import functools

from diffusers import ContextParallelConfig
from torch.distributed.device_mesh import init_device_mesh

from rank_cases import (
    BY_NAME,
    GRID,
    GUIDED,
    assert_equal,
    assert_same_gradients,
    built,
    equals_one,
    gradients,
    sparse,
    trains_as_one,
)
from ranks import averaged
from tiny_models import run
from vsa_diffusers import cp_plan, enable_guidance_parallel

FOUR = {"num_attention_heads": 4}


def ring_times_ulysses() -> None:
    recipe = BY_NAME["wan"]
    expected = gradients(sparse(built(recipe, **FOUR)), recipe)
    model = sparse(built(recipe, **FOUR))
    output = run(model, recipe, GRID)
    model.enable_parallelism(config=ContextParallelConfig(ring_degree=2, ulysses_degree=2), cp_plan=cp_plan(model))
    assert_equal(run(model, recipe, GRID), output)
    assert_same_gradients(averaged(gradients(model, recipe)), expected)


def guidance_with_ulysses_inside() -> None:
    recipe = GUIDED["two calls"]
    pipe = recipe.build()
    sparse(pipe)
    expected = recipe.run(pipe)
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("guidance", "ring", "ulysses"))
    enable_guidance_parallel(pipe, mesh)
    config = ContextParallelConfig(ulysses_degree=2, mesh=mesh["ring", "ulysses"])
    pipe.transformer.enable_parallelism(config=config, cp_plan=cp_plan(pipe.transformer))
    assert_equal(recipe.run(pipe), expected)


CASES = {
    "wan equals one process": functools.partial(equals_one, "wan", config=FOUR),
    "wan with gates equals one process": functools.partial(equals_one, "wan", gates=True, config=FOUR),
    "wan-ti2v-5b equals one process": functools.partial(equals_one, "wan-ti2v-5b", config=FOUR),
    "wan-vace equals one process": functools.partial(equals_one, "wan-vace", config=FOUR),
    "wan trains as one process": functools.partial(trains_as_one, "wan", **FOUR),
    "3 heads and 45 tokens": functools.partial(
        equals_one, "wan", grid=(5, 6, 6), config={"num_attention_heads": 3}, uneven=True
    ),
    "2 heads leave two ranks idle": functools.partial(equals_one, "wan"),
    "ring times Ulysses": ring_times_ulysses,
    "guidance with Ulysses inside": guidance_with_ulysses_inside,
}
