"""What users run stands on its own, helps, and refuses in one sentence."""

import ast
import dataclasses
import importlib
import runpy
import sys
from pathlib import Path

import precompute_latents
import pytest
import torch
import train_vsa
from typer.main import get_command

from vsa_diffusers.cli.script import REFUSED, script_app

EXAMPLES = Path(__file__).parents[2] / "examples"
RESEARCH = {path.stem for path in (EXAMPLES / "research").glob("*.py")}
# Notebooks are read, and show what research has.
FILES = [path for path in EXAMPLES.rglob("*.py") if not {"research", "notebooks"} & set(path.parts)]
RUN = [path for path in sorted(EXAMPLES.rglob("*.py")) if '__name__ == "__main__"' in path.read_text()]
DATACLASSES = {"train_vsa": train_vsa.Options, "precompute_latents": precompute_latents.Options}
# Words that lead to a path that is not there.
NOWHERE = {
    "demo": ["--model=./nowhere"],
    "fasth3": ["--checkpoint=./nowhere", "--device=cpu"],
    "fastwan": ["--checkpoint=./nowhere", "--device=cpu"],
    "hunyuan_vsa": ["--model=./nowhere", "--device=cpu"],
    "ltx2_vsa": ["--checkpoint=./nowhere", "--device=cpu"],
    "multi_gpu": ["--model=./nowhere"],
    "wan22_two_experts": ["--model=./nowhere", "--device=cpu"],
    "wan_vsa": ["--model=./nowhere", "--device=cpu"],
    "precompute_latents": ["--pretrained_model_name_or_path=./nowhere", "--data_dir=./nowhere", "--output_dir=latents"],
    "train_vsa": ["--pretrained_model_name_or_path=./nowhere", "--data_dir=./nowhere", "--output_dir=training"],
    "auto_block": ["--model=./nowhere"],
    "distill_evidence": ["--model=./nowhere"],
    "schedule_evidence": ["--model=./nowhere"],
    "train_clips_wan": ["./nowhere"],
    "train_tiny_wan": ["evaluate", "--model=./nowhere"],
    "tune_evidence": ["--model=./nowhere", "--output=runs"],
    "vsa_evidence": ["--model=./nowhere"],
    "vsa_selection": ["--model=./nowhere"],
}


def run(script, words, monkeypatch):
    """What the process would end with; in a wide terminal."""
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)  # of this process, for good
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    return ended.value.code


def options_of(script):
    """Options by name, with their help; those of all commands, where a script has several."""
    if script.stem in DATACLASSES:
        return {f"--{field.name}": field.metadata["help"] for field in dataclasses.fields(DATACLASSES[script.stem])}
    module = importlib.import_module(script.stem)
    command = get_command(module.app if script.stem == "train_tiny_wan" else script_app(module.main))
    several = getattr(command, "commands", {})
    parameters = [each for one in (several.values() if several else [command]) for each in one.params]
    return {each.opts[0]: each.help for each in parameters}


@pytest.mark.parametrize("script", FILES, ids=lambda path: path.name)
def test_what_users_run_imports_nothing_from_research(script):
    imported = set()
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.split(".")[0])
    assert not imported & (RESEARCH | {"research"})


def test_there_is_research_to_keep_out():
    assert {"procedural_video", "tiny_evidence", "vsa_evidence"} <= RESEARCH


def test_beside_scripts_there_are_no_modules_of_theirs():
    for folder in (EXAMPLES, EXAMPLES / "training"):
        assert set(folder.glob("*.py")) <= set(RUN)


@pytest.mark.parametrize("script", RUN, ids=lambda path: path.stem)
def test_help_has_every_option_and_what_it_means(script, monkeypatch, capsys):
    assert run(script, ["--help"], monkeypatch) == 0
    told = capsys.readouterr().out
    options = options_of(script)
    assert len(options) >= 1
    assert [name for name, meaning in options.items() if not (meaning or "").endswith(".")] == []
    if script.stem == "train_tiny_wan":  # has commands, which have options
        assert "evaluate" in told
    else:
        assert [name for name in options if name not in told] == []


@pytest.mark.parametrize("script", [script for script in RUN if script.stem in NOWHERE], ids=lambda path: path.stem)
def test_a_wrong_path_ends_with_one_sentence_and_status_2(script, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(script, NOWHERE[script.stem], monkeypatch) == REFUSED
    told = capsys.readouterr().err
    assert "nowhere" in told
    assert "Traceback" not in told
    assert "error: " in told or "─ Error ─" in told
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_every_script_was_given_a_wrong_path():
    assert {script.stem for script in RUN} - NOWHERE.keys() == {"caption_detector"}  # which takes none


def test_the_readme_names_every_script():
    told = (EXAMPLES / "README.md").read_text()
    scripts = [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("training/*.py")]
    assert [path.name for path in scripts if f"`{path.relative_to(EXAMPLES)}`" not in told] == []
