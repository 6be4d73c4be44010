"""`Family.grid`: the grid or the reason why there is none, whatever a class of a known name calls its arguments."""

import inspect

import numpy as np
import pytest
import torch
from torch import nn

from tiny_models import RECIPES, run
from vsa_diffusers import enable_vsa, register_transformer
from vsa_diffusers.facts import UNREADABLE
from vsa_diffusers.models import find_family

GRID = (5, 10, 12)
by_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)


def grid(model, **inputs):
    return find_family(model).grid(model, inputs)


def wan():
    recipe = next(recipe for recipe in RECIPES if recipe.name == "wan")
    return recipe, recipe.build()


@by_recipe
def test_the_inputs_of_every_family_tell_its_grid(recipe):
    assert grid(recipe.build(), **recipe.inputs(GRID)) == (recipe.video_shape(GRID), None)


@by_recipe
def test_inputs_under_other_names_are_a_reason(recipe):
    model = recipe.build()
    shape, reason = grid(model, x=torch.randn(2, 4, *GRID), t=torch.tensor([700]))
    assert shape is None
    assert "pass video_shape= (forward has no '" in reason
    assert reason.endswith(", but x, t)")
    assert grid(model)[1].endswith(", but no arguments)")


@by_recipe
def test_inputs_of_another_rank_or_type_are_a_reason(recipe):
    model = recipe.build()
    names = recipe.inputs(GRID)
    for value in (None, torch.randn(3), "latents", []):
        shape, reason = grid(model, **dict.fromkeys(names, value))
        assert shape is None
        assert reason


@by_recipe
def test_a_config_without_what_the_family_has_is_a_reason(recipe):
    model = recipe.build()
    inputs = recipe.inputs(GRID)
    expected = (recipe.video_shape(GRID), None)

    class Foreign(nn.Module):
        config = None

    other = find_family(model).grid(Foreign(), inputs)
    # Where the inputs alone tell the grid, the config does not matter.
    assert other == expected or (other[0] is None and "AttributeError: " in other[1])


def test_a_grid_that_is_none_is_a_reason():
    _, model = wan()
    for empty in ((0, 10, 12), (5, 1, 12), (5, 10, 1)):
        shape, reason = grid(model, hidden_states=torch.randn(2, 4, *empty))
        assert shape is None
        assert reason.endswith("is not a grid of tokens)")


@pytest.mark.parametrize("same_name", [False, True])
def test_a_forward_with_other_names_runs_dense_and_says_why(same_name, caplog):
    recipe, model = wan()

    class Renamed(type(model)):
        def forward(self, latents, time, text):
            return super().forward(latents, time, text, return_dict=False)

    if same_name:
        Renamed.__name__ = "WanTransformer3DModel"
    model.__class__ = Renamed
    inputs = recipe.inputs(GRID)
    call = (inputs["hidden_states"], inputs["timestep"], inputs["encoder_hidden_states"])
    with torch.no_grad():
        dense = model(*call)[0]
        enable_vsa(model, 0.3)
        assert model(*call)[0].equal(dense)
        reason = "pass video_shape= (forward has no 'hidden_states', but latents, time, text)."
        assert f"blocks.0-1.attn1 runs dense: {UNREADABLE.partition(';')[0]}; {reason}" in caplog.text
        enable_vsa(model, 0.3, video_shape=recipe.video_shape(GRID))
        assert not torch.allclose(model(*call)[0], dense, atol=1e-4)


class Tokens(nn.Module):
    """Its inputs are whatever a test registers for it."""


@pytest.mark.parametrize(
    "wrong", [(5, 5), (5, 5, 6, 1), (5, 5.5, 6), (5, -5, 6), (5, 5, 0), 150, "5x5x6", ("5", "5", "6")]
)
def test_what_a_function_returns_must_be_a_grid(wrong):
    register_transformer(Tokens, "layers.*", lambda transformer, inputs: wrong)
    assert grid(Tokens()) == (None, f"{UNREADABLE} ({wrong!r} is not a grid of tokens)")


def test_a_grid_is_three_plain_integers():
    register_transformer(Tokens, "layers.*", lambda transformer, inputs: np.array([5, 5, 6]))
    shape, reason = grid(Tokens())
    assert shape == (5, 5, 6)
    assert [type(extent) for extent in shape] == [int] * 3
    assert reason is None
    register_transformer(Tokens, "layers.*")
    assert grid(Tokens()) == (None, UNREADABLE)


def test_an_error_of_another_kind_is_not_hidden():
    def video_shape(transformer, inputs):
        raise RuntimeError("out of memory")

    register_transformer(Tokens, "layers.*", video_shape)
    with pytest.raises(RuntimeError, match="out of memory"):
        grid(Tokens())


def test_a_class_of_the_same_name_with_other_attention_is_refused():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

    class WanTransformer3DModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"attn1": Attention()})])

    message = (
        r"WanTransformer3DModel of test_grid is not served as Wan: blocks.0.attn1 \(Attention\) has no processor, "
        "heads, to_q, to_k, to_v, to_out, norm_q, norm_k, fused_projections; teach your own class with register_transf"
    )
    with pytest.raises(ValueError, match=message):
        enable_vsa(WanTransformer3DModel())


class Watched:
    """Stands in for an attention module, and notes what a processor asks it for."""

    def __init__(self, attn, seen):
        self._attn, self._seen = attn, seen

    def __getattr__(self, name):
        self._seen.add(name)
        return getattr(self._attn, name)


@by_recipe
def test_a_family_needs_what_its_processors_use(recipe):
    model = recipe.build()
    family = find_family(model)
    enable_vsa(model, 0.3)
    seen = set()

    def watched(processor):
        # diffusers looks at the parameters of a processor to see what it takes.
        def call(attn, *args, **kwargs):
            return processor(Watched(attn, seen), *args, **kwargs)

        call.__signature__ = inspect.signature(processor)
        return call

    modules = family.video_modules(model)
    for attn in modules.values():
        attn.processor = watched(attn.processor)
    run(model, recipe, GRID)
    # What single modules of the family have, and processors look for, beside what all of them must have.
    optional = {"to_added_qkv", "to_add_out", "to_out", "to_gate_logits", "add_k_proj", "add_v_proj", "norm_added_q",
                "norm_added_k", "history_key_scale", "max_scale", "to_qkv"}  # fmt: skip
    assert seen >= {"to_out", "out_layer"} & set(family.needs)
    assert seen <= {*family.needs, *optional}
    assert {"processor"} | (set(family.needs) & seen) == set(family.needs)
