"""Every Python block of the README and the docs runs, on a tiny pipeline in place of the one that it names."""

import logging
import re
from pathlib import Path

import diffusers
import pytest
import torch
from published_checkpoints import Hub, write_wan

import make_floors
import make_performance
import make_scaling
import measure_performance
from make_tables import Table
from tiny_text_pipeline import tiny_pipeline

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [page for page in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))] if "```python" in page.read_text()]
PAGES.remove(DOCS / "models.md")  # which test_models_page.py runs, on each family's own transformer
FOLDERS = ("docs", "examples", "vsa_diffusers", ".github")
EVERY_PAGE = [*sorted(ROOT.glob("*.md")), *sorted(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))]
# Small sizes, and the CPU, for what the pages write for a GPU.
SMALLER = {'"cuda"': '"cpu"', "height=480": "height=64", "width=832": "width=96",
           "num_frames=81": "num_frames=17", "num_inference_steps=30": "num_inference_steps=2"}  # fmt: skip


@pytest.fixture
def _silenced_by_a_page_alone():
    logger = logging.getLogger("vsa_diffusers")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.usefixtures("_silenced_by_a_page_alone")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_blocks_of_a_page_run_in_order(page, monkeypatch, tmp_path):
    monkeypatch.setattr(diffusers.WanPipeline, "from_pretrained", tiny_pipeline)
    if page.name == "checkpoints.md":
        write_wan(tmp_path / "hub")
        monkeypatch.setattr("huggingface_hub.snapshot_download", Hub(tmp_path / "hub", tmp_path / "cache").download)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    names = {"torch": torch}
    for block in blocks:
        for written, smaller in SMALLER.items():
            block = block.replace(written, smaller)
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize(
    "tables",
    [make_floors.tables, make_performance.tables, make_scaling.tables],
    ids=["floors", "performance", "scaling"],
)
def test_tables_that_follow_from_code_and_measurements_are_current(tables):
    found = tables()
    assert all(table.rows for table in found)
    assert [table for table in found if table.in_page() != table.rows] == []


def test_a_table_is_replaced_in_its_page_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr("make_tables.ROOT", tmp_path)
    page = "# A\n\n| a |\n|---|\n| 1 |\n\ntext\n\n| b |\n|---|\n| 2 |\n| 3 |\n\n## B\n\n| c |\n|---|\n| 4 |"
    (tmp_path / "page.md").write_text(page)
    Table("page.md", "A", ["| 5 |"], 1).write()
    Table("page.md", "B", ["| 6 |", "| 7 |"]).write()
    assert (tmp_path / "page.md").read_text() == page.replace("| 2 |\n| 3 |", "| 5 |").replace("4 |", "6 |\n| 7 |")
    with pytest.raises(ValueError, match=r"section 'A' of page\.md has no table 2"):
        Table("page.md", "A", [], 2).in_page()


def test_every_table_of_measurements_has_its_command_beside_it():
    page = " ".join((DOCS / "performance.md").read_text().split())
    lab = " ".join(" ".join(file.read_text().split()) for file in (DOCS / "lab").glob("*.md"))
    for name, (command, _) in measure_performance.COMMANDS.items():
        text = f"python {command}".partition(" --block-size")[0]
        assert text in page or text in lab, name


def test_the_readme_tells_what_whole_models_were_measured_to_take():
    text = " ".join((ROOT / "README.md").read_text().split())
    found = {model: rows for model, *rows in make_performance.pairs("h200-compiled", "default")}
    for model in ("wan14b-720p", "hunyuan-720p"):
        before, after = map(make_performance.seconds, found[model])
        faster = re.escape(f"({found[model][1]['speedup']:.2f}x)")
        assert re.search(rf"\b{after} s( at 0.2)? instead of {before} {faster}", text)


def test_the_performance_page_stays_short_enough_to_be_read():
    assert len((DOCS / "performance.md").read_text().splitlines()) <= 150


def test_the_readme_stays_short_enough_to_be_read():
    assert len((ROOT / "README.md").read_text().split()) <= 700


def test_every_lab_note_is_in_the_index():
    index = (DOCS / "lab" / "README.md").read_text()
    assert not [page.name for page in DOCS.glob("lab/*.md") if f"]({page.name})" not in index and page.stem != "README"]


def test_the_map_of_the_kernels_names_every_file_of_them_and_no_other():
    folder = ROOT / "vsa_diffusers" / "kernels"
    there = {str(file.relative_to(folder)) for file in folder.rglob("*.py") if file.name != "__init__.py"}
    table = (folder / "README.md").read_text().split("## Map")[1].split("\n\n")[1]
    assert set(re.findall(r"^\| `(\S+\.py)`", table, re.MULTILINE)) == there


def anchors(page: Path) -> set[str]:
    """What a link may point to: headings as GitHub and MkDocs both make them, for plain ones."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_links_to_what_is_there(page):
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", prose):
        linked = page.parent / target if target else page
        assert linked.exists(), f"links to {target}"
        assert not anchor or anchor in anchors(linked), f"links to {target}#{anchor}"


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_scripts_tests_and_measurements_that_are_there(page):
    text = page.read_text()
    named = re.findall(r"\b(?:docs|examples|tests)/[\w/\-.]*\w", text)
    named += [f"docs/measurements/{name}" for name in re.findall(r"`(h[12]00-[\w.\-]+)`", text)]
    assert not [name for name in named if not (ROOT / name).exists()]


def test_research_is_run_with_the_examples_that_it_imports():
    texts = [path.read_text() for path in (*EVERY_PAGE, *(ROOT / "examples" / "research").glob("*.py"))]
    commands = [command for text in texts for command in re.findall(r"(\S+ )?python examples/research/", text)]
    assert commands
    assert {command.strip("`( ") for command in commands} == {"PYTHONPATH=examples/training"}
