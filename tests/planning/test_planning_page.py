"""The pages and the file that planning is made of are current."""

import importlib.util
from pathlib import Path

import pytest

from vsa_diffusers.planning import speed

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "choosing.md"


def script(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def choosing():
    return script("make_choosing")


@pytest.mark.parametrize(("table", "rows"), [("videos", 9), ("shares", 6), ("recipes", 12), ("gains", 21)])
def test_a_table_of_the_page_is_current(choosing, table, rows):
    found = list(getattr(choosing, table)())
    assert len(found) == rows
    assert not [row for row in found if row not in PAGE.read_text()]


def test_the_example_on_the_page_is_what_is_printed(choosing):
    assert choosing.example() in PAGE.read_text()


def test_what_ships_is_what_was_measured():
    assert Path(speed.__file__).with_name("measured.json").read_text() == script("make_planning").text()
