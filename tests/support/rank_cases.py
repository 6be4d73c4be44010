"""What two ranks have to do as one does, by name."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import types

import diffusers
import pytest
import torch
from diffusers import ContextParallelConfig
from torch.distributed.device_mesh import init_device_mesh

import scaling_cases
from oracle import relative_error
from ranks import averaged, spread
from tiny_models import RECIPES, Recipe, call, run
from tiny_pipelines_video import PipelineRecipe, embeddings, ltx, masked_embeddings, wan
from vsa_diffusers import (
    VSAAttnProcessor,
    add_gate_compress,
    cp_plan,
    disable_guidance_parallel,
    disable_vsa,
    enable_guidance_parallel,
    enable_vsa,
    register_transformer,
)
from vsa_diffusers.parallel import RING, Exchange

GRID = (8, 12, 8)
UNEVEN_GRID = (5, 6, 6)  # patches of 1 x 2 x 2 make 45 tokens of it
BY_NAME = {recipe.name: recipe for recipe in RECIPES}
# Their tokens beside the video make numbers that two do not divide.
ODD = {"cosmos3", "cosmos3-nemotron", "ltx2-references", "ltx2-coordinates"}
REFUSED = {"cosmos-controlnet"}
SPREAD = [name for name in BY_NAME if name not in REFUSED]
OF_ISSUE = [
    "wan", "wan-ti2v-5b", "wan-vace", "ltx", "ltx2-split-rope", "hunyuan-video", "hunyuan-video-1.5", "cogvideox-2b",
    "mochi", "minimax-h3",
]  # fmt: skip
DENSE_BY_NAME = ["cogvideox-5b", "easyanimate", "cosmos-predict2", "hunyuan-video", "mochi", "motif-video", "ltx"]


def built(recipe: Recipe, gates: bool = False, **config) -> torch.nn.Module:
    """The recipe's model, perhaps with gates that are not zero."""
    if config:
        recipe = Recipe(**vars(recipe) | {"config": recipe.config | config})
    model = recipe.build()
    if gates:
        torch.manual_seed(2)
        add_gate_compress(model)
        for name, parameter in model.named_parameters():
            if "to_gate_compress" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def sparse(model: torch.nn.Module, **options) -> torch.nn.Module:
    return enable_vsa(model, **{"top_k_ratio": 0.3, "block_size": (2, 2, 2)} | options)


def gradients(model: torch.nn.Module, recipe: Recipe, grid=GRID) -> dict[str, torch.Tensor]:
    model.train()
    call(model, recipe, grid).square().mean().backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


def assert_equal(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    error = relative_error(found, expected)
    assert error < tolerance, error


def assert_same_gradients(found: dict, expected: dict, tolerance: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    size = max(float(gradient.abs().max()) for gradient in expected.values())
    assert size > 1e-6
    wrong = {
        name: error
        for name, gradient in expected.items()
        if (error := float((found[name] - gradient).abs().max()))
        > tolerance * float(gradient.abs().max()) + tolerance / 100 * size
    }
    assert not wrong, wrong


def equals_one(name: str, grid=GRID, gates: bool = False, config=types.MappingProxyType({}), uneven=False, **options):
    recipe = BY_NAME[name]
    model = sparse(built(recipe, gates, **config), **options)
    expected = run(model, recipe, grid)
    output = run(spread(model, ulysses_anything=uneven or name in ODD), recipe, grid)
    assert_equal(output, expected)


def dense_equals_one(name: str) -> None:
    recipe = BY_NAME[name]
    model = built(recipe)
    expected = run(model, recipe, GRID)
    assert_equal(run(spread(model, ulysses_anything=name in ODD), recipe, GRID), expected)


def trains_as_one(name: str, grid=GRID, gates: bool = False, uneven=False, checkpointing=False, **config) -> None:
    recipe = BY_NAME[name]
    expected = gradients(sparse(built(recipe, gates, **config)), recipe, grid)
    model = spread(sparse(built(recipe, gates, **config)), ulysses_anything=uneven or name in ODD)
    if checkpointing:
        model.enable_gradient_checkpointing()
    # Kandinsky 5 rounds the gradients of rotated queries and keys to bfloat16.
    assert_same_gradients(averaged(gradients(model, recipe, grid)), expected, 2e-2 if "kandinsky5" in name else 1e-4)


def enabled_after_it_was_spread() -> None:
    recipe = BY_NAME["hunyuan-video"]
    expected = run(sparse(built(recipe)), recipe, GRID)
    assert_equal(run(sparse(spread(built(recipe))), recipe, GRID), expected)


def by_one_processor(after: bool) -> None:
    recipe = BY_NAME["wan"]
    expected = run(sparse(built(recipe)), recipe, GRID)
    model, processor = built(recipe), VSAAttnProcessor(top_k_ratio=0.3, block_size=(2, 2, 2))
    if after:
        spread(model)
    model.set_attn_processor(processor)
    if not after:
        spread(model)
    for _ in range(2):
        assert_equal(run(model, recipe, GRID), expected)


def for_transformer() -> None:
    recipe = BY_NAME["hunyuan-video-1.5"]
    expected = run(sparse(built(recipe)), recipe, GRID)
    model = spread(built(recipe))
    model.set_attn_processor(VSAAttnProcessor.for_transformer(model, top_k_ratio=0.3, block_size=(2, 2, 2)))
    assert_equal(run(model, recipe, GRID), expected)


def disabled_again() -> None:
    recipe = BY_NAME["cogvideox-5b"]
    expected = run(built(recipe), recipe, GRID)
    model = sparse(spread(built(recipe)))
    assert relative_error(run(model, recipe, GRID), expected) > 1e-4
    assert_equal(run(disable_vsa(model), recipe, GRID), expected)
    assert_equal(run(sparse(model, dense_layers=(0,)), recipe, GRID), run(sparse_alone(recipe), recipe, GRID))


def sparse_alone(recipe: Recipe) -> torch.nn.Module:
    return sparse(built(recipe), dense_layers=(0,))


def gates_of_dense_layers() -> None:
    recipe = BY_NAME["hunyuan-video"]
    expected = run(sparse(built(recipe, gates=True), dense_layers=(0, 1)), recipe, GRID)
    assert relative_error(run(built(recipe), recipe, GRID), expected) > 1e-4
    assert_equal(run(spread(sparse(built(recipe, gates=True), dense_layers=(0, 1))), recipe, GRID), expected)


def with_a_dense_step() -> None:
    recipe = BY_NAME["mochi"]

    def steps(model):
        timesteps, outputs = torch.tensor([900.0, 100.0]), []
        for i, t in enumerate(timesteps):
            outputs.append(run(model, recipe, GRID) + 0 * i * t)
        return torch.stack(outputs)

    expected = steps(sparse(built(recipe), dense_steps=1))
    assert relative_error(expected[0], expected[1]) > 1e-4
    assert_equal(steps(spread(sparse(built(recipe), dense_steps=1))), expected)


def compiled_by_blocks(name: str, *grids, uneven=False) -> None:
    torch._dynamo.reset()
    recipe = BY_NAME[name]
    model = spread(sparse(built(recipe)), ulysses_anything=uneven)
    for block in [*getattr(model, "blocks", ()), *getattr(model, "transformer_blocks", ())]:
        block.compile(backend="eager")
    for grid in grids:
        expected = gradients(sparse(built(recipe)), recipe, grid)
        model.zero_grad()
        assert_same_gradients(averaged(gradients(model, recipe, grid)), expected)


def two_transformers_on_one_mesh() -> None:
    recipe = BY_NAME["wan"]
    config = ContextParallelConfig(
        ulysses_degree=2, mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("ring", "ulysses"))
    )
    for seed in (0, 1):
        model = sparse(built(recipe))
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.blocks[0].attn1.to_v.weight)
        expected = run(model, recipe, GRID)
        model.enable_parallelism(config=config, cp_plan=cp_plan(model))
        assert_equal(run(model, recipe, GRID), expected)


def trained_by(wrapper: str) -> None:
    recipe = BY_NAME["wan-vace"]
    expected = gradients(sparse(built(recipe)), recipe)
    model = spread(sparse(built(recipe)))
    if wrapper == "DDP":
        outer = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        found = {name.removeprefix("module."): value for name, value in gradients(outer, recipe).items()}
    else:
        for block in [*model.blocks, *model.vace_blocks]:
            torch.distributed.fsdp.fully_shard(block)
        torch.distributed.fsdp.fully_shard(model)
        found = {name: value.full_tensor() for name, value in gradients(model, recipe).items()}
    assert_same_gradients(found, expected)


def with_a_lora() -> None:
    from peft import LoraConfig

    recipe, config = BY_NAME["wan"], LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    models = [sparse(built(recipe)) for _ in range(2)]
    for model in models:
        torch.manual_seed(3)
        model.add_adapter(config)
    spread(models[1])
    expected, found = (gradients(model, recipe) for model in models)
    assert any("lora" in name and gradient.any() for name, gradient in expected.items())
    assert_same_gradients(averaged(found), expected)


def with_a_cache(config) -> None:
    recipe = BY_NAME["wan"]

    def steps(model):
        outputs = []
        for step in range(4):
            with torch.no_grad(), model.cache_context("cond"):
                torch.manual_seed(1)
                inputs = recipe.inputs(GRID) | {"timestep": torch.tensor([700 - 2 * step] * 2)}
                outputs.append(model(**inputs, return_dict=False)[0])
        return torch.stack(outputs)

    models = [sparse(built(recipe)) for _ in range(2)]
    for model in models:
        model.enable_cache(config())
    full = steps(sparse(built(recipe)))
    expected = steps(models[0])
    assert relative_error(full, expected) > 1e-6
    assert_equal(steps(spread(models[1])), expected)


def sends_what_the_formula_says(gates: bool) -> None:
    recipe = BY_NAME["wan"]
    model = spread(sparse(built(recipe, gates)))
    sent = []
    original = Exchange._swap

    def counting(self, to_others, *more):
        sent.append(sum(rows.nbytes for rows in to_others.values()))
        return original(self, to_others, *more)

    Exchange._swap = counting
    try:
        run(model, recipe, GRID)
    finally:
        Exchange._swap = original
    layers, tensors, ranks = 2, 4 + gates, 2
    tokens = 8 * 6 * 4
    assert len(sent) == 2 * layers
    assert sum(sent) == layers * tensors * 2 * tokens * 64 * 4 * (ranks - 1) // ranks**2


def a_ring_is_named() -> None:
    recipe, model = BY_NAME["wan"], sparse(built(BY_NAME["wan"]))
    model.enable_parallelism(config=ContextParallelConfig(ring_degree=2), cp_plan=cp_plan(model))
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("vsa_diffusers").addHandler(handler)
    try:
        # PyTorch's attention on a CPU does not return what diffusers' ring needs.
        with contextlib.suppress(Exception):
            run(model, recipe, GRID)
    finally:
        logging.getLogger("vsa_diffusers").removeHandler(handler)
    assert f"blocks.0.attn1 runs dense: {RING}." in records, records


def raises(what: str, action, error=ValueError) -> None:
    with pytest.raises(error, match=re.escape(what)):
        action()


def refuses_a_ring() -> None:
    model = built(BY_NAME["cogvideox-2b"])
    model.enable_parallelism(config=ContextParallelConfig(ring_degree=2), cp_plan=cp_plan(model))
    raises(
        "CogVideoXTransformer3DModel cannot run under ring attention, which its own processors ignore",
        lambda: run(model, BY_NAME["cogvideox-2b"], GRID),
    )


def refuses_another_plan() -> None:
    recipe = BY_NAME["ltx"]
    model = spread(sparse(built(recipe)), plan=type(built(recipe))._cp_plan)
    raises("was split over ranks by another plan", lambda: run(model, recipe, GRID))


def refuses_masks() -> None:
    recipe = BY_NAME["skyreels-v2"]
    model = spread(sparse(built(recipe, num_frame_per_block=2)))
    raises("since the call has an attention mask", lambda: run(model, recipe, GRID))


def refuses_nabla() -> None:
    recipe = BY_NAME["kandinsky5"]
    model = spread(sparse(built(recipe)))
    inputs = recipe.inputs(GRID) | {"sparse_params": {"to_fractal": False}}
    raises("the model's own nabla attention", lambda: model(**inputs, return_dict=False))


def refuses_processors_of_others() -> None:
    class Theirs(diffusers.models.transformers.transformer_wan.WanAttnProcessor):
        pass

    recipe, model = BY_NAME["wan"], sparse(built(BY_NAME["wan"]), dense_layers=(0,))
    model.blocks[0].attn1.processor = Theirs()
    spread(model)
    raises(
        "blocks.0.attn1 of WanTransformer3DModel has a processor that is not diffusers' own, Theirs",
        lambda: run(model, recipe, GRID),
    )


def refuses_a_wrong_grid() -> None:
    recipe = BY_NAME["wan"]
    model = spread(sparse(built(recipe), video_shape=(5, 5, 5)), ulysses_anything=True)
    raises("video_shape=(5, 5, 5) has 125 tokens, of which rank", lambda: run(model, recipe, GRID))


def refuses_uneven_tokens() -> None:
    recipe = BY_NAME["wan"]
    raises("divisible", lambda: run(spread(sparse(built(recipe))), recipe, UNEVEN_GRID), AssertionError)
    recipe = BY_NAME["cosmos3"]
    raises(
        "197 tokens cannot be split evenly over 2 ranks; pass ContextParallelConfig(ulysses_anything=True)",
        lambda: run(spread(sparse(built(recipe))), recipe, GRID),
    )


def refuses_plans_that_it_does_not_know() -> None:
    raises("its residuals enter the transformer whole", lambda: cp_plan(built(BY_NAME["cosmos-controlnet"])))
    raises("is not a supported video transformer", lambda: cp_plan(torch.nn.Linear(1, 1)))

    class Own(torch.nn.Module):
        pass

    register_transformer(Own, "attn")
    raises("Own was taught with register_transformer, which knows no plan", lambda: cp_plan(Own()))


def uses_diffusers_plans_where_they_are_right() -> None:
    for name in ("wan", "chronoedit", "minimax-h3"):
        model = built(BY_NAME[name])
        assert cp_plan(model) == model._cp_plan


def guidance(recipe: PipelineRecipe) -> None:
    """Over two groups of one: the same video, by half of the work."""
    pipe = recipe.build()
    sparse(pipe)
    inner = next(
        module for module in pipe.transformer.modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv3d))
    )
    predictions: list[int] = []
    inner.register_forward_pre_hook(lambda module, args: predictions.append(len(args[0])))
    expected = recipe.run(pipe)
    alone = sum(predictions)
    predictions.clear()
    enable_guidance_parallel(pipe)
    assert_equal(recipe.run(pipe), expected)
    assert sum(predictions) == alone / 2
    assert_equal(recipe.run(disable_guidance_parallel(pipe)), expected)


def refuses_guidance_that_it_does_not_know() -> None:
    pipe = GUIDED["two calls"].build()
    pipe.__class__ = type("TheirPipeline", (type(pipe),), {})
    enable_guidance_parallel(pipe)
    raises("TheirPipeline is not among the pipelines whose two calls of a step are known", lambda: pipe(**guided()))


def guided() -> dict:
    sizes = dict(height=32, width=32, num_frames=5, num_inference_steps=2, guidance_scale=3.0, output_type="latent")
    return embeddings() | sizes


GUIDED = {
    "two calls": PipelineRecipe("WanPipeline", wan(), guided),
    "a batch of two": PipelineRecipe("LTXPipeline", ltx, lambda: guided() | masked_embeddings() | dict(num_frames=9)),
}
CASES = {}
for name in SPREAD:
    CASES[f"{name} equals one process"] = functools.partial(equals_one, name)
for name in DENSE_BY_NAME:
    CASES[f"{name} dense equals one process"] = functools.partial(dense_equals_one, name)
for name in OF_ISSUE:
    CASES[f"{name} trains as one process"] = functools.partial(trains_as_one, name)
CASES |= {
    "dense layers keep their gates": gates_of_dense_layers,
    "gates over a packed sequence": functools.partial(equals_one, "minimax-h3", gates=True),
    "gates travel with the query": functools.partial(equals_one, "wan", gates=True),
    "gates of joint attention do, too": functools.partial(equals_one, "hunyuan-video", gates=True),
    "gates train as in one process": functools.partial(trains_as_one, "wan", gates=True),
    "45 tokens": functools.partial(equals_one, "wan", grid=UNEVEN_GRID, uneven=True),
    "45 tokens train": functools.partial(trains_as_one, "wan", grid=UNEVEN_GRID, uneven=True),
    "45 tokens beside text": functools.partial(equals_one, "hunyuan-video-replace", grid=UNEVEN_GRID, uneven=True),
    "45 tokens after text": functools.partial(equals_one, "easyanimate", grid=UNEVEN_GRID, uneven=True),
    "45 tokens of each of two videos": functools.partial(equals_one, "motif-video", grid=UNEVEN_GRID, uneven=True),
    "45 tokens after history": functools.partial(equals_one, "helios-amplified", grid=UNEVEN_GRID, uneven=True),
    "45 tokens in a packed sequence": functools.partial(equals_one, "minimax-h3", grid=UNEVEN_GRID, uneven=True),
    "3 heads": functools.partial(equals_one, "wan", config={"num_attention_heads": 3}),
    "3 heads train": functools.partial(trains_as_one, "wan", num_attention_heads=3),
    "tiles chosen by quarters": functools.partial(equals_one, "wan", selection="quarters"),
    "the sparse branch alone": functools.partial(equals_one, "wan", combine="sparse"),
    "ratio 1": functools.partial(equals_one, "hunyuan-video", top_k_ratio=1.0),
    "blocks that fit the grid": functools.partial(equals_one, "wan", block_size="auto"),
    "a dense layer of joint attention": functools.partial(equals_one, "hunyuan-video", dense_layers=(0,)),
    "a dense layer": functools.partial(equals_one, "wan", dense_layers=(-1,)),
    "a dense step": with_a_dense_step,
    "VSA enabled after enable_parallelism": enabled_after_it_was_spread,
    "one processor set after enable_parallelism": functools.partial(by_one_processor, True),
    "one processor set before enable_parallelism": functools.partial(by_one_processor, False),
    "processors made for a transformer": for_transformer,
    "VSA disabled again": disabled_again,
    "gradient checkpointing": functools.partial(trains_as_one, "wan", checkpointing=True),
    "gradient checkpointing of joint attention": functools.partial(trains_as_one, "hunyuan-video", checkpointing=True),
    "compiled blocks": functools.partial(compiled_by_blocks, "wan", GRID),
    "two transformers on one mesh": two_transformers_on_one_mesh,
    "DDP": functools.partial(trained_by, "DDP"),
    "FSDP2": functools.partial(trained_by, "FSDP2"),
    "a LoRA": with_a_lora,
    "first block cache": functools.partial(
        with_a_cache, lambda: diffusers.FirstBlockCacheConfig(threshold=0.1)
    ),
    "pyramid attention broadcast": functools.partial(
        with_a_cache,
        lambda: diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 950),
            current_timestep_callback=lambda: 700,
        ),
    ),
    "two exchanges a layer of the bytes expected": functools.partial(sends_what_the_formula_says, False),
    "a gate adds a quarter to the bytes": functools.partial(sends_what_the_formula_says, True),
    "a ring names why it is dense": a_ring_is_named,
    "a ring that diffusers ignores raises": refuses_a_ring,
    "a plan that is wrong raises": refuses_another_plan,
    "a masked call raises": refuses_masks,
    "nabla attention raises": refuses_nabla,
    "a stranger's processor raises": refuses_processors_of_others,
    "a wrong grid raises": refuses_a_wrong_grid,
    "tokens that do not divide raise": refuses_uneven_tokens,
    "no plan raises": refuses_plans_that_it_does_not_know,
    "diffusers' plans are used where they are right": uses_diffusers_plans_where_they_are_right,
    **scaling_cases.TWO,
    **{f"guidance of {what}": functools.partial(guidance, recipe) for what, recipe in GUIDED.items()},
    "guidance that is not known raises": refuses_guidance_that_it_does_not_know,
}  # fmt: skip
SLOW_CASES = {
    "compiled blocks of joint attention, and 45 tokens, then 90": functools.partial(
        compiled_by_blocks, "hunyuan-video", UNEVEN_GRID, (10, 6, 6), uneven=True
    ),
    **{f"{name} dense equals one process": functools.partial(dense_equals_one, name) for name in SPREAD},
    **{f"{name} trains as one process": functools.partial(trains_as_one, name) for name in SPREAD},
}
