"""`fuse_qkv_projections`: the sparse processors project as the stock ones do."""

import pytest
import torch

from oracle import relative_error
from tiny_models import RECIPES, run
from vsa_diffusers import VSAAttnProcessor, disable_vsa, enable_vsa
from vsa_diffusers.models import find_family

GRID = (5, 10, 12)
# Their stock processors read the fused projection.
READS_FUSED = {"wan", "wan-vace", "wan-animate", "skyreels-v2", "chronoedit", "helios", "minimax-h3", "cogvideox-5b"}
# What they fuse stays unread, or nothing is fused.
IGNORES_FUSED = {"ltx", "hunyuan-video", "hunyuan-video-1.5", "consisid", "cosmos3"}
NAMES = READS_FUSED | IGNORES_FUSED
parametrized = pytest.mark.parametrize(
    "recipe", [recipe for recipe in RECIPES if recipe.name in NAMES], ids=lambda recipe: recipe.name
)


def fused(recipe):
    """A model that computes something else through its fused projections than through the single ones."""
    model = recipe.build()
    model.fuse_qkv_projections()
    for attn in find_family(model).video_modules(model).values():
        torch.nn.init.normal_(attn.get_submodule(recipe.projections[0]).weight)
    return model


@parametrized
def test_projections_fused_before_are_used_where_the_stock_processor_uses_them(recipe):
    single = run(recipe.build(), recipe, GRID)
    model = fused(recipe)
    dense = run(model, recipe, GRID)
    assert torch.allclose(dense, single, atol=1e-5) == (recipe.name in READS_FUSED)
    enable_vsa(model, 1.0)
    torch.testing.assert_close(run(model, recipe, GRID), dense, atol=1e-4, rtol=0)
    enable_vsa(model, 0.3)
    assert relative_error(run(model, recipe, GRID), dense) > 1e-4
    disable_vsa(model)
    assert run(model, recipe, GRID).equal(dense)
    model.unfuse_qkv_projections()
    assert not torch.allclose(run(model, recipe, GRID), single, atol=1e-5)


@pytest.mark.parametrize(
    "recipe",
    [recipe for recipe in RECIPES if recipe.name in NAMES - {"cogvideox-5b"}],
    ids=lambda recipe: recipe.name,
)
def test_projections_fused_and_unfused_afterwards_are_followed(recipe):
    model = recipe.build()
    dense = run(model, recipe, GRID)
    enable_vsa(model, 1.0)
    model.fuse_qkv_projections()
    torch.testing.assert_close(run(model, recipe, GRID), dense, atol=1e-4, rtol=0)
    model.unfuse_qkv_projections()
    torch.testing.assert_close(run(model, recipe, GRID), dense, atol=1e-4, rtol=0)


def test_processors_made_for_a_fused_transformer_use_its_fused_projections():
    recipe = next(recipe for recipe in RECIPES if recipe.name == "cogvideox-5b")
    model = fused(recipe)
    dense = run(model, recipe, GRID)
    shape = recipe.video_shape(GRID)
    model.set_attn_processor(VSAAttnProcessor.for_transformer(model, top_k_ratio=1.0, video_shape=shape))
    torch.testing.assert_close(run(model, recipe, GRID), dense, atol=1e-4, rtol=0)


def test_gradients_reach_a_fused_projection():
    recipe = next(recipe for recipe in RECIPES if recipe.name == "cogvideox-5b")
    model = fused(recipe)
    enable_vsa(model, 0.3)
    model(**recipe.inputs(GRID), return_dict=False)[0].square().sum().backward()
    for block in model.transformer_blocks:
        assert block.attn1.to_qkv.weight.grad.abs().max() > 0
        assert block.attn1.to_q.weight.grad is None
