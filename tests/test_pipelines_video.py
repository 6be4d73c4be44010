"""Whole pipeline calls: dense, exact at ratio 1, sparse below."""

import logging

import diffusers
import pytest
import torch

from oracle import relative_error
from tiny_pipelines_video import PIPELINES
from vsa_diffusers import disable_vsa, enable_vsa


@pytest.mark.parametrize(
    "recipe",
    [recipe for recipe in PIPELINES if hasattr(diffusers, recipe.cls)],
    ids=lambda recipe: recipe.name or recipe.cls,
)
def test_a_whole_call_is_exact_at_ratio_one_and_sparse_below(recipe, caplog):
    pipe = recipe.build()
    dense = recipe.run(pipe)
    assert recipe.run(pipe).equal(dense)
    with caplog.at_level(logging.INFO, "vsa_diffusers"):
        exact = recipe.run(enable_vsa(pipe, 1.0))
        sparse = recipe.run(enable_vsa(pipe, 0.3))
    assert relative_error(exact, dense) < 1e-3
    assert torch.isfinite(sparse).all()
    assert relative_error(sparse, dense) > 10 * relative_error(exact, dense)
    assert "runs dense" not in caplog.text
    assert recipe.run(disable_vsa(pipe)).equal(dense)
