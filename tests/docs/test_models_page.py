"""The page of models: what each family's lines do, on a tiny transformer in place of the published one."""

import dataclasses
import inspect
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch

import make_models_table
from tiny_models import ALL_RECIPES
from vsa_diffusers import vsa_status
from vsa_diffusers.models import known_families

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
SECTIONS = dict(re.findall(r"^## ([^\n]*)\n\n```python\n(.*?)```", PAGE.read_text(), re.MULTILINE | re.DOTALL))


def test_every_family_has_a_section():
    assert set(SECTIONS) == {family.name for family in known_families()} == set(make_models_table.CALLS)


class StandIn:
    """A pipeline without weights: takes what the real one's call takes, and returns what that returns."""

    def __init__(self, cls, transformer):
        self.cls, self.components = cls, {"transformer": transformer}

    def to(self, device):
        assert device == "cuda"
        return self

    def load_components(self, dtype):
        assert dtype == torch.bfloat16

    def __call__(self, **arguments):
        if self.cls is diffusers.ModularPipeline:
            blocks = diffusers.MiniMaxH3Blocks()
            assert set(arguments) <= set(blocks.input_names)
            return {name: ["a video"] for name in blocks.output_names}
        inspect.signature(self.cls.__call__).bind(self, **arguments)
        module = vars(sys.modules[self.cls.__module__])
        outputs = [each for name, each in module.items() if name.endswith("PipelineOutput")]
        return SimpleNamespace(**{field.name: ["a video"] for each in outputs for field in dataclasses.fields(each)})


@pytest.mark.parametrize("family", SECTIONS)
def test_the_lines_of_a_family_run(family, monkeypatch):
    [found] = [each for each in known_families() if each.name == family]
    recipe = next(each for each in ALL_RECIPES if each.cls == found.transformers[0])
    if not recipe.is_available():
        pytest.skip(f"runs with a diffusers that has {recipe.cls}; constraints.txt names one")
    cls = getattr(diffusers, make_models_table.CALLS[family].pipeline)
    pipe = StandIn(cls, recipe.build())
    monkeypatch.setattr(cls, "from_pretrained", lambda name, **options: pipe)
    monkeypatch.setattr("diffusers.utils.load_image", lambda path: path)
    monkeypatch.setattr("diffusers.utils.load_video", lambda path: path)
    names = {}
    exec(compile(SECTIONS[family], "models.md", "exec"), names)
    assert names["video"]
    assert vsa_status(pipe)
