"""`VSAAttnProcessor`, set by hand, makes of every transformer class what `enable_vsa` makes of it."""

from types import SimpleNamespace

import pytest
import torch

from tiny_models import RECIPES, run
from vsa_diffusers import VSAAttnProcessor, disable_vsa, enable_vsa
from vsa_diffusers.models import attention_modules, find_family

GRID = (5, 10, 12)
# Left out: diffusers' class Attention ("legacy") serves many families, so that its processor cannot be chosen by class;
# and a fixed video shape cannot tell surplus tokens from audio. These need `for_transformer` or `enable_vsa`.
ONE_FOR_ALL = [recipe for recipe in RECIPES if not {"legacy", "surplus"} & set(recipe.tags)]


def of_recipes(recipes):
    return pytest.mark.parametrize("recipe", recipes, ids=lambda recipe: recipe.name)


def set_processors(model, processors):
    """`set_attn_processor` with a dict, for transformers that lack the method too."""
    for name, processor in processors.items():
        model.get_submodule(name.removesuffix(".processor")).processor = processor


@of_recipes(ONE_FOR_ALL)
def test_one_processor_instance_serves_all_attention_modules(recipe):
    model = recipe.build()
    dense = run(model, recipe, GRID)
    enable_vsa(model, 0.3)
    sparse = run(model, recipe, GRID)
    disable_vsa(model)
    for ratio, expected, tolerance in ((1.0, dense, 1e-4), (0.3, sparse, 1e-5)):
        processor = VSAAttnProcessor(top_k_ratio=ratio, video_shape=recipe.video_shape(GRID))
        set_processors(model, dict.fromkeys(attention_modules(model), processor))
        torch.testing.assert_close(run(model, recipe, GRID), expected, atol=tolerance, rtol=0)


@of_recipes(ONE_FOR_ALL)
def test_processors_set_module_by_module_are_what_enabling_makes(recipe):
    model = recipe.build()
    enable_vsa(model, 0.3)
    sparse = run(model, recipe, GRID)
    disable_vsa(model)
    shape = recipe.video_shape(GRID)
    for attn in find_family(model).video_modules(model).values():
        attn.processor = VSAAttnProcessor(top_k_ratio=0.3, video_shape=shape)
    torch.testing.assert_close(run(model, recipe, GRID), sparse, atol=1e-5, rtol=0)


@of_recipes(RECIPES)
def test_for_transformer_makes_processors_for_every_family(recipe):
    model = recipe.build()
    stock = {f"{name}.processor": module.processor for name, module in attention_modules(model).items()}
    dense = run(model, recipe, GRID)
    enable_vsa(model, 0.3)
    sparse = run(model, recipe, GRID)
    shape = recipe.video_shape(GRID)
    for ratio, expected, tolerance in ((0.3, sparse, 1e-5), (1.0, dense, 1e-4)):
        processors = VSAAttnProcessor.for_transformer(model, top_k_ratio=ratio, video_shape=shape)
        disable_vsa(model)
        assert processors.keys() == stock.keys()
        assert sum(processors[name] is not stock[name] for name in stock) == recipe.sparse
        set_processors(model, processors)
        torch.testing.assert_close(run(model, recipe, GRID), expected, atol=tolerance, rtol=0)
    if hasattr(model, "set_attn_processor"):
        model.set_attn_processor(VSAAttnProcessor.for_transformer(model, top_k_ratio=0.3, video_shape=shape))
        torch.testing.assert_close(run(model, recipe, GRID), sparse, atol=1e-5, rtol=0)


def test_the_exchange_is_that_of_the_original_s_config_whoever_set_it():
    model = enable_vsa(RECIPES[0].build(), 0.5)
    processor = model.blocks[0].attn1.processor
    assert processor.exchange is None
    exchange = object()
    processor.original._parallel_config = SimpleNamespace(
        _flattened_mesh=object(), ulysses_degree=2, _vsa_exchange=exchange
    )
    assert processor.exchange is exchange
    processor.original._parallel_config = None
    assert processor.exchange is None
