"""What runs dense in a model with trained gates keeps gate times coarse, in every family."""

import logging

import pytest
import torch

from oracle import coarse_scores, relative_error, tile_means, tile_numbers
from tiny_models import RECIPES, run
from vsa_diffusers import VSAAttnProcessor, VSAConfig, add_gate_compress, disable_vsa, enable_vsa, set_top_k_ratio
from vsa_diffusers.models import find_family
from vsa_diffusers.processor import FamilyAttnProcessor

GRID = (5, 10, 12)
BLOCK = (2, 2, 2)
WAN = RECIPES[0]


def gated(recipe):
    model = recipe.build()
    add_gate_compress(model)
    for attn in find_family(model).video_modules(model).values():
        torch.nn.init.normal_(attn.to_gate_compress.weight, std=0.3)
    return model


def steps(model, recipe, count=2):
    """The outputs of a denoising loop's steps."""
    timesteps, outputs = [float(step) for step in range(count)], []
    for i, t in enumerate(timesteps):
        outputs.append(run(model, recipe, GRID) + 0 * i * t)
    return outputs


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_dense_steps_and_layers_are_what_ratio_one_gives(recipe):
    model = gated(recipe)
    stock = run(model, recipe, GRID)
    whole = run(enable_vsa(model, 1.0, block_size=BLOCK), recipe, GRID)
    assert relative_error(whole, stock) > 1e-3
    first, second = steps(enable_vsa(model, 0.3, block_size=BLOCK, dense_steps=1), recipe)
    torch.testing.assert_close(first, whole, atol=1e-5, rtol=0)
    assert relative_error(second, whole) > 1e-4
    enable_vsa(model, 0.3, block_size=BLOCK, dense_layers=range(recipe.sparse))
    torch.testing.assert_close(run(model, recipe, GRID), whole, atol=1e-5, rtol=0)
    assert run(disable_vsa(model), recipe, GRID).equal(stock)


def test_a_dense_layer_is_stock_attention_plus_gate_times_coarse():
    attn = gated(WAN).blocks[0].attn1.double()
    hidden, shape = torch.randn(2, 150, 64, dtype=torch.float64), (5, 5, 6)
    query, key, value = (
        each.unflatten(2, (2, -1))
        for each in (attn.norm_q(attn.to_q(hidden)), attn.norm_k(attn.to_k(hidden)), attn.to_v(hidden))
    )
    coarse = coarse_scores(query, key, shape, BLOCK).softmax(-1) @ tile_means(value, shape, BLOCK)
    rows = coarse[:, :, tile_numbers(shape, BLOCK)].transpose(1, 2).flatten(2)
    term = (attn.to_gate_compress(hidden) * rows) @ attn.to_out[0].weight.T
    expected = attn(hidden) + term
    assert relative_error(attn(hidden), expected) > 1e-2
    model = gated(WAN)
    model.blocks[0].attn1 = attn
    enable_vsa(model, 0.3, block_size=BLOCK, dense_layers=(0,), video_shape=shape)
    torch.testing.assert_close(attn(hidden), expected, atol=1e-12, rtol=0)


def test_dense_layers_whose_gates_are_zero_stay_stock():
    model = gated(WAN)
    model.blocks[0].attn1.to_gate_compress.weight.data.zero_()
    found = model.blocks[0].attn1.processor
    enable_vsa(model, 0.3, dense_layers=(0, 1))
    assert model.blocks[0].attn1.processor is found
    assert isinstance(model.blocks[1].attn1.processor, FamilyAttnProcessor)


@pytest.mark.parametrize("combine", ["merge", "sparse"])
def test_gates_that_are_left_out_by_choice_are_left_out_of_dense_layers_too(combine):
    model = gated(WAN)
    stock = run(model, WAN, GRID)
    enable_vsa(model, 0.3, combine=combine, dense_layers=(0, 1))
    assert run(model, WAN, GRID).equal(stock)


def test_another_ratio_leaves_dense_layers_dense():
    model = gated(WAN)
    whole = run(enable_vsa(model, 1.0, block_size=BLOCK), WAN, GRID)
    enable_vsa(model, 1.0, block_size=BLOCK, dense_layers=(0, 1))
    set_top_k_ratio(model, 0.2)
    torch.testing.assert_close(run(model, WAN, GRID), whole, atol=1e-5, rtol=0)


def test_processors_that_are_set_by_hand_keep_the_gates_of_dense_layers():
    model = gated(WAN)
    expected = run(enable_vsa(model, 0.3, block_size=BLOCK, dense_layers=(1,)), WAN, GRID)
    disable_vsa(model)
    config = VSAConfig(0.3, block_size=BLOCK, dense_layers=(1,))
    model.set_attn_processor(VSAAttnProcessor.for_transformer(model, config))
    assert run(model, WAN, GRID).equal(expected)


def test_modules_that_patterns_leave_out_keep_their_gates():
    model = gated(WAN)
    whole = run(enable_vsa(model, 1.0), WAN, GRID)
    enable_vsa(model, config={"blocks.0.attn1": {"top_k_ratio": 1.0}, "default": {"enable": False}})
    torch.testing.assert_close(run(model, WAN, GRID), whole, atol=1e-5, rtol=0)


def test_gates_that_come_later_into_dense_layers_are_told(caplog):
    model = WAN.build()
    add_gate_compress(model)
    enable_vsa(model, 0.3, dense_layers=(1,))
    with caplog.at_level(logging.WARNING, "vsa_diffusers"):
        run(model, WAN, GRID)
        assert "call enable_vsa again" not in caplog.text
        torch.nn.init.ones_(model.blocks[1].attn1.to_gate_compress.weight)
        run(model, WAN, GRID)
    assert "1 modules that stay dense and leave them out, among them blocks.1.attn1; call enable_vsa" in caplog.text


def test_a_call_that_cannot_have_the_coarse_branch_is_refused_with_the_reason():
    model = gated(WAN)
    attn = model.blocks[0].attn1
    hidden, mask = torch.randn(1, 150, 64), torch.ones(1, 1, 150, 150, dtype=torch.bool).tril()
    stock = attn(hidden, None, mask)
    enable_vsa(model, 0.1, video_shape=(5, 5, 6))
    with pytest.raises(ValueError, match=r'blocks.0.attn1 cannot run dense .* combine="gate" .* has an attention mask'):
        attn(hidden, None, mask)
    enable_vsa(model, 0.1)
    with pytest.raises(ValueError, match="no hooks of the transformer ran that read the grid"):
        attn(hidden)
    enable_vsa(model, 0.1, combine="sparse", video_shape=(5, 5, 6))
    assert attn(hidden, None, mask).equal(stock)


def test_dense_and_sparse_steps_of_a_gated_model_are_one_compiled_graph():
    model = enable_vsa(gated(WAN), 0.3, block_size=BLOCK, dense_steps=1)
    expected = steps(model, WAN)
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for found, wanted in zip(steps(model, WAN), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    # One for each of the two blocks, or one that they share.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
