"""Every supported transformer class, built by the installed diffusers: exact at ratio 1, sparse below, undone after."""

import logging

import pytest
import torch

from oracle import relative_error
from tiny_models import RECIPES, call, run
from vsa_diffusers import add_gate_compress, disable_vsa, enable_vsa, video_sparse_attention
from vsa_diffusers.models import attention_modules, find_family
from vsa_diffusers.processor import FamilyAttnProcessor

GRID = (5, 10, 12)
OTHER_GRID = (3, 12, 8)
pytestmark = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)


def sparse_modules(model):
    return {
        name: module
        for name, module in attention_modules(model).items()
        if isinstance(module.processor, FamilyAttnProcessor)
    }


def test_video_self_attention_is_found_and_nothing_else(recipe):
    model = recipe.build()
    modules = find_family(model).video_modules(model)
    assert len(modules) == recipe.sparse
    assert len(attention_modules(model)) == recipe.sparse + recipe.dense
    enable_vsa(model)
    assert list(sparse_modules(model)) == list(modules)


def test_ratio_one_equals_dense(recipe):
    model = recipe.build()
    dense = run(model, recipe, GRID)
    enable_vsa(model, 1.0)
    torch.testing.assert_close(run(model, recipe, GRID), dense, atol=1e-4, rtol=0)


def test_a_lower_ratio_is_sparse_and_finite(recipe, caplog):
    model = recipe.build()
    dense = run(model, recipe, GRID)
    enable_vsa(model, 0.3, block_size=(2, 2, 2))
    with caplog.at_level(logging.INFO, "vsa_diffusers"):
        sparse = run(model, recipe, GRID)
    assert torch.isfinite(sparse).all()
    assert relative_error(sparse, dense) > 1e-4
    assert "runs dense" not in caplog.text


def test_every_sparse_module_calls_the_op_with_the_grid_of_this_forward(recipe, monkeypatch):
    model = recipe.build()
    enable_vsa(model, 0.3)
    calls = []

    def spy(query, key, value, video_shape, **kwargs):
        calls.append((query.shape[1], video_shape, kwargs))
        return video_sparse_attention(query, key, value, video_shape, **kwargs)

    monkeypatch.setattr("vsa_diffusers.processor.video_sparse_attention", spy)
    for grid in (GRID, OTHER_GRID, GRID):
        calls.clear()
        run(model, recipe, grid)
        assert len(calls) == recipe.sparse
        for tokens, shape, arguments in calls:
            frames, *rest = recipe.video_shape(grid)
            # Motif-Video's decoder sees the video twice.
            assert shape == (frames, *rest) or ("decoder" in recipe.tags and shape == (2 * frames, *rest))
            assert tokens == shape[0] * shape[1] * shape[2] + sum(arguments["context_tokens"])
            assert arguments["combine"] == "merge"


def test_disable_gives_back_identical_outputs_and_keys(recipe):
    model = recipe.build()
    processors = {name: module.processor for name, module in attention_modules(model).items()}
    keys, dense = list(model.state_dict()), run(model, recipe, GRID)
    enable_vsa(model, 0.3)
    first = run(model, recipe, GRID)
    enable_vsa(model, 0.3)
    assert run(model, recipe, GRID).equal(first)
    assert list(model.state_dict()) == keys
    disable_vsa(model)
    assert run(model, recipe, GRID).equal(dense)
    assert {name: module.processor for name, module in attention_modules(model).items()} == processors
    assert not model._forward_pre_hooks
    assert list(model.state_dict()) == keys


def test_zero_gates_add_nothing_and_trained_gates_are_used(recipe):
    model = recipe.build()
    enable_vsa(model, 0.3, combine="sparse")
    sparse = run(model, recipe, GRID)
    assert len(add_gate_compress(model)) == recipe.sparse
    enable_vsa(model, 0.3, combine="gate")
    torch.testing.assert_close(run(model, recipe, GRID), sparse, atol=1e-5, rtol=0)
    enable_vsa(model, 0.3)
    assert {each.processor.config.combine for each in sparse_modules(model).values()} == {"merge"}
    for module in find_family(model).video_modules(model).values():
        torch.nn.init.normal_(module.to_gate_compress.weight)
    enable_vsa(model, 0.3)
    assert {each.processor.config.combine for each in sparse_modules(model).values()} == {"gate"}
    assert relative_error(run(model, recipe, GRID), sparse) > 1e-4


def test_gradients_reach_projections_and_gates(recipe):
    model = recipe.build().train()
    add_gate_compress(model)
    enable_vsa(model, 0.3, combine="gate")
    call(model, recipe, GRID).square().sum().backward()
    for name, module in find_family(model).video_modules(model).items():
        for projection in (*recipe.projections, "to_gate_compress"):
            gradient = module.get_submodule(projection).weight.grad
            assert gradient is not None, name
            assert torch.isfinite(gradient).all()
            assert gradient.abs().max() > 0, name
