"""The site holds the pages that are for users, loads nothing from elsewhere, and its commands can be given."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from nothing_foreign_in_site import Resources
from vsa_diffusers.cli import app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
USERS = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
EXPORTED = {
    "vsa_diffusers",
    "vsa_diffusers.inspection",
    "vsa_diffusers.planning",
    "vsa_diffusers.comparison",
    "vsa_diffusers.doctor",
    "vsa_diffusers.tuning",
}


def pages_of(entries):
    """The paths of a navigation, whatever its groups."""
    for entry in entries:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else pages_of(value)


def excluded(path):
    return any(path.match(pattern.rstrip("/")) for pattern in SITE["exclude_docs"].split())


def test_every_page_is_in_the_navigation_once_and_what_is_for_maintainers_is_left_out():
    pages = list(pages_of(SITE["nav"]))
    there = {path.name for path in DOCS.iterdir() if not excluded(path)} - {"images", "stylesheets"}
    assert len(pages) == len(set(pages))
    notebooks = {f"notebooks/{path.name}" for path in (ROOT / "examples" / "notebooks").glob("*.ipynb")}
    assert set(pages) == there | notebooks | {"changelog.md"}
    assert all(
        excluded(DOCS / name)
        for name in ("lab", "measurements", "make_choosing.py", "changelog_in_site.py", "__pycache__")
    )


def test_no_page_of_the_site_tells_how_it_is_made():
    prose = {page.name: re.sub(r"<!--.*?-->", "", page.read_text(), flags=re.DOTALL) for page in DOCS.glob("*.md")}
    assert not [
        name for name, text in prose.items() if re.search(r"make_\w+\.py|mkdocs|make (lint|docs|package)", text)
    ]


def test_a_page_that_loads_from_another_host_is_told_from_one_that_links_to_it():
    page = '<link rel="stylesheet" href="{0}"><script src="{0}"></script><img src="{0}"><a href="{0}"></a>'
    assert Resources(page.format("https://example.org/x")).addresses == ["https://example.org/x"] * 3
    imported = '<script type="module">import("https://example.org/x.mjs")</script>'
    assert Resources(imported).addresses == ["https://example.org/x.mjs"]
    assert Resources('<a href="https://example.org"></a><link rel="canonical" href="https://x">').addresses == []


def commands_of(page):
    """The lines of shell blocks, without comments, continued ones as one."""
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL):
        for written in block.replace("\\\n", " ").splitlines():
            if re.match(r"vsa-diffusers |make ", written):
                yield shlex.split(written, comments=True)


def parse(words):
    """Parse a command's line as `vsa-diffusers` would, without running it."""
    name, *rest = words
    return typer.main.get_command(app.app).commands[name].make_context(name, rest)


COMMANDS = [(page.name, words) for page in USERS for words in commands_of(page)]


@pytest.mark.parametrize(
    "words",
    [words[1:] for _, words in COMMANDS if words[0] == "vsa-diffusers"],
    ids=lambda words: " ".join(words)[:60],
)
def test_a_command_on_a_page_is_one_that_can_be_given(words):
    assert parse(words).params


def test_a_command_that_could_not_be_given_would_be_found():
    with pytest.raises(Exception, match="No such option"):
        parse(["plan", "wan", "--hight", "480"])


def test_every_target_of_make_on_a_page_is_there():
    called = {word for _, words in COMMANDS if words[0] == "make" for word in words[1:]}
    called |= {target for page in USERS for target in re.findall(r"`make ([\w-]+)`", page.read_text())}
    assert {"demo", "test"} <= called <= TARGETS


def test_every_public_name_is_in_the_reference():
    import vsa_diffusers

    shown = re.findall(r"^::: ([\w.]+)", (DOCS / "reference.md").read_text(), re.MULTILINE)
    assert {f"vsa_diffusers.{name}" for name in vsa_diffusers.__all__} - set(shown) == {"vsa_diffusers.__version__"}
    homes = [name.rpartition(".") for name in shown]
    assert {module for module, _, _ in homes} <= EXPORTED
    assert all(hasattr(importlib.import_module(module), name) for module, _, name in homes)


def test_the_argument_that_matters_is_among_the_parameters():
    from vsa_diffusers import enable_vsa

    parameters = enable_vsa.__doc__.partition("Args:")[2].partition("Returns:")[0]
    assert re.findall(r"^        (\w+):", parameters, re.MULTILINE)[:2] == ["pipe", "top_k_ratio"]
