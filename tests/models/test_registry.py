"""The registry of families agrees with itself and with the installed diffusers."""

import diffusers
import pytest

from tiny_models import ALL_RECIPES
from vsa_diffusers.models import REFUSED, known_families, supported_transformers

has_every_class = pytest.mark.skipif(
    not all(hasattr(diffusers, recipe.cls) for recipe in ALL_RECIPES),
    reason="runs with a diffusers that has every family; constraints.txt names one",
)


@has_every_class
def test_every_built_in_class_belongs_to_one_family_and_has_a_recipe():
    classes = [name for family in known_families() for name in family.transformers]
    assert len(classes) == len(set(classes))
    assert set(classes) <= set(supported_transformers())
    assert not set(classes) & set(REFUSED)
    assert {recipe.cls for recipe in ALL_RECIPES} == set(classes)
