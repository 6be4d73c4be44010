"""`enable_vsa(recipe=)`: settings in place of the arguments that are left out."""

import pytest

from tiny_models import RECIPES
from vsa_diffusers import VSAConfig, enable_vsa
from vsa_diffusers.pipeline import enabled_config
from vsa_diffusers.recipes import NAMES, recipe_of


@pytest.fixture(scope="module")
def wan():
    return next(recipe for recipe in RECIPES if recipe.name == "wan").build()


def settings(model, *args, **kwargs):
    config = enabled_config(enable_vsa(model, *args, **kwargs))
    return config.top_k_ratio, config.dense_steps, config.dense_layers


def test_a_recipe_sets_what_is_left_out(wan):
    assert settings(wan, recipe="balanced") == (0.2, 0.2, (0,))
    assert settings(wan, recipe="fast") == (0.1, 0.2, (0,))
    assert settings(wan) == (0.5, 0, ())


def test_a_small_video_shape_has_higher_ratios(wan):
    assert settings(wan, recipe="balanced", video_shape=(5, 16, 16)) == (0.25, 0.2, (0,))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (dict(top_k_ratio=0.5), (0.5, 0.2, (0,))),
        (dict(dense_steps=0), (0.2, 0, (0,))),
        (dict(dense_layers=()), (0.2, 0.2, ())),
        (dict(dense_layers=(1,), dense_steps=3), (0.2, 3, (1,))),
    ],
)
def test_explicit_arguments_override_it_also_at_their_defaults(wan, arguments, expected):
    assert settings(wan, **arguments, recipe="balanced") == expected


def test_a_ratio_by_position_overrides_it(wan):
    assert settings(wan, 0.7, recipe="quality") == (0.7, 0.2, (0,))


def test_a_number_of_tiles_takes_the_place_of_its_ratio(wan):
    config = enabled_config(enable_vsa(wan, top_k=8, recipe="balanced"))
    assert (config.top_k, config.dense_layers) == (8, (0,))


@pytest.mark.parametrize("config", [VSAConfig(0.3), {"*.attn1": {"top_k_ratio": 0.3}}])
def test_a_recipe_and_a_config_are_an_error_that_changes_nothing(wan, config):
    enable_vsa(wan, 0.4)
    with pytest.raises(ValueError, match="recipe='fast' was given together with config=, which holds all settings"):
        enable_vsa(wan, recipe="fast", config=config)
    assert enabled_config(wan).top_k_ratio == 0.4


def test_an_unknown_recipe_is_an_error_that_names_those_there_are(wan):
    with pytest.raises(ValueError, match="recipe='best' must be one of 'quality', 'balanced', 'fast'"):
        enable_vsa(wan, recipe="best")


def test_a_wrong_argument_beside_a_recipe_is_refused_as_without_one(wan):
    with pytest.raises(TypeError, match="unexpected keyword argument 'ratio'"):
        enable_vsa(wan, ratio=0.2, recipe="fast")
    with pytest.raises(TypeError, match="neither a diffusers pipeline nor a transformer"):
        enable_vsa("wan", recipe="fast")


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("family", ["Wan", "AnyFlow"])
def test_each_recipe_is_faster_than_the_one_before(family, size):
    ratios = [recipe_of(family, size, name).top_k_ratio for name in NAMES]
    assert ratios == sorted(ratios, reverse=True)
    assert len(set(ratios)) == len(NAMES)
    assert all(recipe_of(family, size, name).source.startswith(("measured", "advice")) for name in NAMES)


def test_few_steps_are_not_made_with_very_few_tiles():
    assert min(recipe_of("AnyFlow", size, name).top_k_ratio for size in ("small", "large") for name in NAMES) >= 0.15
