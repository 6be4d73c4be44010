"""LayerSkip of diffusers, and the guidance methods on it, change sparse models as they change dense ones."""

import logging

import pytest
import torch
from diffusers import LayerSkipConfig
from diffusers.hooks import apply_layer_skip
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.hooks.smoothed_energy_guidance_utils import (
    SmoothedEnergyGuidanceConfig,
    _apply_smoothed_energy_guidance_hook,
)

from oracle import relative_error
from tiny_models import RECIPES, run
from vsa_diffusers import VSAAttnProcessor, disable_vsa, enable_vsa
from vsa_diffusers.layer_skip import register_processor
from vsa_diffusers.models import find_family

GRID = (5, 10, 12)
# One for each processor whose modules diffusers can skip: the others' classes do not say whether they are
# cross-attention, which it asks for.
SKIPPABLE = {
    "wan", "wan-animate", "skyreels-v2", "chronoedit", "helios", "hunyuan-video", "hunyuan-video-1.5", "framepack",
    "cogvideox-5b", "consisid", "easyanimate", "cosmos-predict2", "allegro",
}  # fmt: skip
WITH_BLOCKS = {"wan", "hunyuan-video", "cogvideox-5b"}
skippable = pytest.mark.parametrize(
    "recipe", [recipe for recipe in RECIPES if recipe.name in SKIPPABLE], ids=lambda recipe: recipe.name
)
with_blocks = pytest.mark.parametrize(
    "recipe", [recipe for recipe in RECIPES if recipe.name in WITH_BLOCKS], ids=lambda recipe: recipe.name
)


@pytest.fixture(autouse=True)
def stock_processors_known(monkeypatch):
    """Diffusers knows none of its video models' processors; what is dense here has to be skipped, too."""
    AttentionProcessorRegistry._register()
    monkeypatch.setattr(AttentionProcessorRegistry, "_registry", dict(AttentionProcessorRegistry._registry))


def build(recipe):
    model = recipe.build()
    family = find_family(model)
    for attn in family.video_modules(model).values():
        register_processor(type(attn.processor), lambda attn: family.processor.streams)
    return model


def skip(model, **kind):
    stack = next(iter(find_family(model).video_modules(model))).split(".")[0]
    apply_layer_skip(model, LayerSkipConfig(indices=[0], fqn=stack, **kind))


def blur(model):
    stack = next(iter(find_family(model).video_modules(model))).split(".")[0]
    _apply_smoothed_energy_guidance_hook(model, SmoothedEnergyGuidanceConfig([0], fqn=stack), 1.0)


def assert_same_effect(recipe, change):
    """The change of the dense model is that of the sparse one at ratio 1, whichever of the two came first."""
    model = build(recipe)
    plain = run(model, recipe, GRID)
    change(model)
    changed = run(model, recipe, GRID)
    assert relative_error(changed, plain) > 1e-3
    enable_vsa(model, 1.0)
    torch.testing.assert_close(run(model, recipe, GRID), changed, atol=1e-4, rtol=0)
    disable_vsa(model)
    assert run(model, recipe, GRID).equal(changed)
    later = enable_vsa(build(recipe), 1.0)
    change(later)
    torch.testing.assert_close(run(later, recipe, GRID), changed, atol=1e-4, rtol=0)


@skippable
def test_skipped_attention_is_skipped(recipe):
    assert_same_effect(recipe, lambda model: skip(model, skip_ff=False))


@skippable
def test_perturbed_attention_takes_the_values(recipe):
    assert_same_effect(
        recipe, lambda model: skip(model, skip_attention=False, skip_attention_scores=True, skip_ff=False)
    )


@with_blocks
def test_skipped_blocks_and_feed_forwards_are_skipped(recipe):
    assert_same_effect(recipe, skip)
    assert_same_effect(recipe, lambda model: skip(model, skip_attention=False))


@with_blocks
def test_smoothed_energy_guidance_blurs_the_queries(recipe):
    assert_same_effect(recipe, blur)


@pytest.mark.parametrize("name", ["wan", "skyreels-v2", "helios"])
def test_one_processor_for_all_modules_is_skipped_like_the_stock_one(name):
    recipe = next(recipe for recipe in RECIPES if recipe.name == name)
    for kind in (dict(skip_ff=False), dict(skip_attention=False, skip_attention_scores=True, skip_ff=False)):
        model = build(recipe)
        skip(model, **kind)
        dense = run(model, recipe, GRID)
        later = recipe.build()
        later.set_attn_processor(VSAAttnProcessor(top_k_ratio=1.0))
        skip(later, **kind)
        torch.testing.assert_close(run(later, recipe, GRID), dense, atol=1e-4, rtol=0)


def test_only_the_perturbed_layer_is_dense_and_says_why(caplog):
    recipe = next(recipe for recipe in RECIPES if recipe.name == "wan")
    model = build(recipe)
    skip(model, skip_attention=False, skip_attention_scores=True, skip_ff=False)
    dense = run(model, recipe, GRID)
    enable_vsa(model, 0.3)
    with caplog.at_level(logging.INFO, "vsa_diffusers"):
        assert relative_error(run(model, recipe, GRID), dense) > 1e-4
    reason = "blocks.0.attn1 runs dense: perturbed attention guidance takes its values instead of attention"
    assert caplog.text.count("runs dense") == caplog.text.count(reason) == 1


def test_perturbed_attention_is_noticed_in_a_compiled_block():
    recipe = next(recipe for recipe in RECIPES if recipe.name == "wan")
    model = build(recipe)
    skip(model, skip_attention=False, skip_attention_scores=True, skip_ff=False)
    enable_vsa(model, 0.3)
    eager = run(model, recipe, GRID)
    model.blocks[0].attn1.compile(backend="eager")
    torch.testing.assert_close(run(model, recipe, GRID), eager, atol=1e-5, rtol=0)
