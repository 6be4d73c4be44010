"""The pages and the file that planning is made of are current."""

from pathlib import Path

import diffusers
import pytest

import make_choosing
import make_models_table
import make_planning
from tiny_models import ALL_RECIPES
from vsa_diffusers.models import REFUSED, known_families
from vsa_diffusers.planning import speed

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "choosing.md"


def test_the_tables_of_the_page_are_current():
    tables = make_choosing.tables()
    assert [len(table.rows) for table in tables] == [9, 12, 21, 12]
    assert [table for table in tables if table.in_page() != table.rows] == []


def test_the_example_on_the_page_is_what_is_printed():
    assert make_choosing.example() in PAGE.read_text()


def test_what_ships_is_what_was_measured():
    assert Path(speed.__file__).with_name("measured.json").read_text() == make_planning.text()


@pytest.mark.skipif(
    not all(hasattr(diffusers, recipe.cls) for recipe in ALL_RECIPES),
    reason="runs with a diffusers that has every family; constraints.txt names one",
)
def test_the_page_of_models_is_current():
    written = (DOCS / "models.md").read_text()
    assert make_models_table.page() == written, "run python docs/make_models_table.py --write"
    built_in = [name for family in known_families() for name in family.transformers]
    assert all(f"`{name}`" in written for name in (*built_in, *REFUSED))
