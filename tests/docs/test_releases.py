"""What a release says of itself agrees, wherever it says it."""

import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import vsa_diffusers

ROOT = Path(__file__).parents[2]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()


def test_the_citation_is_of_this_version_and_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == vsa_diffusers.__version__
    [paper] = citation["references"]
    assert paper["url"] in (ROOT / "README.md").read_text()


def test_the_text_on_an_index_page_refers_to_nothing_that_is_not_there(monkeypatch):
    given = {}
    monkeypatch.setitem(sys.modules, "setuptools", SimpleNamespace(setup=lambda **metadata: given.update(metadata)))
    runpy.run_path(str(ROOT / "setup.py"))
    readme, text = (ROOT / "README.md").read_text(), given["long_description"]
    link = r"\]\(([^)]*)\)"
    assert "docs/index.md" in re.findall(link, readme)
    assert {target.partition(":")[0] for target in re.findall(link, text)} == {"https"}
    assert "[" not in re.sub(r"```.*?```|\[[^\]]*\]\(https:[^)]*\)", "", text, flags=re.DOTALL)
    prose = re.sub(r"\W+", " ", re.sub(r"!\[[^\]]*\]\([^)]*\)|(?<=\])\((?!https:)[^)]*\)", "", readme))
    assert re.sub(r"\W+", " ", text) == prose


def test_the_changelog_begins_with_what_is_not_released_and_goes_back_in_time():
    first, *released = re.findall(r"^## (.*)", CHANGELOG, re.MULTILINE)
    assert first == "[Unreleased]"
    versions = [re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - (\d{4}-\d\d-\d\d)", heading).groups() for heading in released]
    assert versions == sorted(versions, reverse=True, key=lambda found: tuple(map(int, found[:3])))
    assert {re.sub(r"[^\w ]", "", heading) for heading in re.findall(r"^### (.*)", CHANGELOG, re.MULTILINE)} <= {
        "Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"
    }  # fmt: skip


def test_the_workflow_and_the_hooks_call_make_targets_that_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    files = [*(ROOT / ".github" / "workflows").glob("*.yml"), ROOT / ".pre-commit-config.yaml"]
    called = [target for file in files for target in re.findall(r"(?:run|entry): make ([\w-]+)", file.read_text())]
    assert {"lint", "format", "test", "test-all", "docs", "package"} <= set(called) <= targets


@pytest.mark.skipif(sys.version_info < (3, 11), reason="runs with Python 3.11 or later, which can read TOML")
def test_the_workflow_tests_every_python_that_the_metadata_names():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {text.rpartition(" ")[2] for text in project["classifiers"] if re.search(r":: 3\.\d+$", text)}
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert set(workflow["jobs"]["test"]["strategy"]["matrix"]["python"]) == named
    assert project["requires-python"] == f">={min(named, key=lambda version: int(version[2:]))}"
