"""Every Python block of the README and the docs runs, on a tiny pipeline in place of the one that it names."""

import re
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch

from tiny_text_pipeline import tiny_pipeline

ROOT = Path(__file__).parents[2]
PAGES = [
    page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if "```python" in page.read_text()
]
# Small sizes, and the CPU, for what the pages write for a GPU.
SMALLER = {'"cuda"': '"cpu"', "height=480": "height=64", "width=832": "width=96",
           "num_frames=81": "num_frames=17", "num_inference_steps=30": "num_inference_steps=2"}  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_blocks_of_a_page_run_in_order(page, monkeypatch, tmp_path):
    monkeypatch.setattr(diffusers.WanPipeline, "from_pretrained", tiny_pipeline)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    names = {"torch": torch}
    for block in blocks:
        for written, smaller in SMALLER.items():
            block = block.replace(written, smaller)
        exec(compile(block, page.name, "exec"), names)


def test_the_floors_in_the_performance_page_are_current():
    script = ROOT / "docs" / "make_floors.py"
    printed = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout.split("\n")
    rows = [line for line in printed if line]
    page = (ROOT / "docs" / "performance.md").read_text()
    assert len(rows) == 21
    assert not [row for row in rows if row not in page]


def test_pages_name_no_file_that_is_missing():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#:]+)\)", prose):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
