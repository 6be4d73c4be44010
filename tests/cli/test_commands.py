"""`plan`, `doctor` and `bench` as a user calls them."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

from vsa_diffusers import doctor
from vsa_diffusers.bench import layers
from vsa_diffusers.bench.shapes import SHAPES
from vsa_diffusers.cli import app, script
from vsa_diffusers.cli.bench import NAMES, Combine, Dtype, Implementation, Selection
from vsa_diffusers.cli.values import repeated

TINY_WAN = str(Path(__file__).parents[2] / "examples" / "tiny_wan")
SIZE = ("--height", "256", "--width", "256", "--frames", "61")


def run(capsys, *argv):
    with pytest.raises(SystemExit) as ended:
        app.main(list(argv))
    return ended.value.code, capsys.readouterr()


@pytest.mark.parametrize("command", ["plan", "doctor", "bench"])
def test_help_teaches_with_examples(capsys, command):
    code, printed = run(capsys, command, "--help")
    assert code == 0
    assert f"vsa-diffusers {command}" in printed.out
    assert "Examples" in printed.out


def test_plan_prints_a_grid_and_a_verdict(capsys):
    code, printed = run(capsys, "plan", TINY_WAN, *SIZE, "--ratios", "0.5", "0.25")
    assert code == 0
    assert "16x16x16 = 4 096" in printed.out
    assert "Marginal." in printed.out


def test_plan_as_json_is_one_document_and_nothing_else(capsys):
    code, printed = run(capsys, "plan", TINY_WAN, *SIZE, "--ratios", "0.25", "--block-size", "4", "4", "4", "--json")
    assert code == 0
    result = json.loads(printed.out)
    assert (result["tokens"], result["block"], len(result["speeds"])) == (4096, [4, 4, 4], 1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("plan", "wn"), "MODEL='wn' is neither a family"),
        (("plan", TINY_WAN, "--height", "250"), "height=250 is no multiple of 16"),
        (("plan", TINY_WAN, "--block-size", "4", "4"), "--block-size 4 4 must be three numbers"),
        (("bench", "--json", "nowhere/at/all.json"), "--json nowhere/at/all.json: there is no folder nowhere/at"),
    ],
)
def test_a_mistake_is_one_sentence_and_no_traceback(capsys, argv, message):
    code, printed = run(capsys, *argv)
    assert code == script.REFUSED
    assert message in " ".join(printed.err.split())
    assert "Traceback" not in printed.err
    assert not printed.out


def test_doctor_finds_nothing_broken_here(capsys):
    code, printed = run(capsys, "doctor", "--json")
    found = json.loads(printed.out)
    assert (code, found["broken"]) == (0, False)
    checks = {check["name"]: check for check in found["checks"]}
    assert {"python", "torch", "diffusers", "transformers", "triton", "kernel"} <= set(checks)
    tests = [check for name, check in checks.items() if name.startswith("self-test")]
    assert len(tests) == 3
    assert {check["status"] for check in tests} == {doctor.FINE}


def test_doctor_ends_with_status_one_where_results_are_wrong(capsys, monkeypatch):
    attention = doctor.video_sparse_attention

    def wrong(query, key, value, *args, **options):
        """Off by a hundredth in the precision that users have, right in fp64."""
        output = attention(query, key, value, *args, **options)
        return output if query.dtype == torch.float64 else output * 1.1

    monkeypatch.setattr(doctor, "video_sparse_attention", wrong)
    code, printed = run(capsys, "doctor")
    assert code == 1
    assert "Something is broken." in printed.out
    assert "results are wrong" in " ".join(printed.out.split())


def test_doctor_reports_an_operation_that_does_not_run(monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(doctor, "video_sparse_attention", fails)
    found = doctor.examine()
    assert found.is_broken
    assert any("no kernel image is available" in check.found for check in found.checks)
    assert any('implementation="torch"' in sentence for sentence in found.advice)


def test_doctor_says_what_to_install(monkeypatch):
    check = doctor._package("no-such-package", (1, 2), "nothing", "Part")
    assert (check.status, check.found) == (doctor.BROKEN, "not installed")
    assert "pip install --upgrade 'no-such-package>=1.2'" in check.advice
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "2.5.1+cu121")
    check = doctor._package("torch", (2, 6), "everything", "Tensor")
    assert (check.status, check.found) == (doctor.BROKEN, "2.5.1+cu121")
    assert "2.6 or later is needed" in check.advice


def test_doctor_finds_what_keeps_diffusers_from_importing(tmp_path):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")')
    (tmp_path / "torchvision-0.1.dist-info").mkdir()
    (tmp_path / "torchvision-0.1.dist-info" / "METADATA").write_text("Name: torchvision\nVersion: 0.1\n")
    # In a process of its own: others have imported diffusers.
    run = subprocess.run(
        [sys.executable, "-m", "vsa_diffusers", "doctor", "--json"], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"},
    )  # fmt: skip
    assert run.returncode == 1, run.stderr
    result = json.loads(run.stdout)
    broken = {check["name"]: check["found"] for check in result["checks"] if check["status"] == doctor.BROKEN}
    assert broken["torchvision"] == "it does not import: operator torchvision::nms does not exist"
    assert any("torchvision: install the one that belongs to torch" in sentence for sentence in result["advice"])


def test_doctor_says_what_an_error_began_with():
    first = RuntimeError("first\nmore")
    wrapped = ImportError("second")
    wrapped.__cause__ = first
    hidden = ImportError("third")
    hidden.__context__, hidden.__suppress_context__ = wrapped, True
    assert [doctor._cause(error) for error in (first, wrapped, hidden)] == ["first", "first", "third"]
    assert doctor._cause(KeyError()) == "KeyError"


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs where torch sees no GPU (CUDA_VISIBLE_DEVICES= pytest)")
def test_bench_prints_a_table_with_a_verdict_and_writes_json(capsys, tmp_path):
    path = tmp_path / "bench.json"
    argv = ("bench", "--shapes", "1x1x4x8x8x16", "--ratios", "0.5", "0.25", "--combines", "merge", "--json", str(path))
    code, printed = run(capsys, *argv)
    assert code == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(each["what"], each["ratio"]) for each in rows] == [
        ("dense flash", None), ("torch merge", 0.5), ("torch merge", 0.25)
    ]  # fmt: skip
    assert "torch merge" in printed.out
    assert "x dense: times as fast" in " ".join(printed.out.split())
    assert max(map(len, printed.out.splitlines())) <= 80
    code, printed = run(capsys, *argv[:-1], "-")
    assert len(json.loads(printed.out)["rows"]) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs where torch sees no GPU (CUDA_VISIBLE_DEVICES= pytest)")
def test_a_sweep_needs_a_gpu(capsys):
    code, printed = run(capsys, "bench", "--sweep", "here")
    assert code == script.REFUSED
    assert "--sweep here times launches of the kernels, which need a GPU" in " ".join(printed.err.split())


def documented_commands():
    """Every call of these commands that a page shows, by its words."""
    root = Path(__file__).parents[2]
    start = r"(?:python -m vsa_diffusers\.|python -m vsa_diffusers |vsa-diffusers )(bench|plan|doctor)(?![.\w])"
    for page in (root / "README.md", root / "docs", *(root / folder for folder in ("examples", "vsa_diffusers"))):
        for text in (each.read_text() for each in (sorted(page.rglob("*.md")) if page.is_dir() else [page])):
            blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
            lines = [line.partition("#")[0] for block in blocks for line in block.splitlines()]
            inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
            for each in (*lines, *inline):
                if match := re.match(rf"{start}(.*)", each.strip(), re.DOTALL):
                    yield match[1], *shlex.split(match[2])


def test_every_command_on_a_page_is_one_that_there_is():
    commands = set(documented_commands())
    assert {name for name, *_ in commands} == {"bench", "plan", "doctor"}
    assert len(commands) > 9
    found = typer.main.get_command(app.app).commands
    for name, *args in (command for command in commands if len(command) > 1):
        found[name].make_context(name, list(args))


def test_several_values_may_follow_an_option_or_repeat_it():
    names = {"--ratios", "--block-size"}
    spaced = ["wan", "--ratios", "0.5", "0.2", "--json", "--block-size", "4", "4", "4"]
    expected = ["wan", "--ratios", "0.5", "--ratios", "0.2", "--json", *(["--block-size", "4"] * 3)]
    assert list(repeated(spaced, names)) == expected
    assert list(repeated(expected, names)) == expected
    assert list(repeated(["--height", "480", "720"], names)) == ["--height", "480", "720"]


def test_the_options_of_bench_offer_what_there_is():
    assert ", ".join(SHAPES) == NAMES
    for choices, enumeration in (
        (layers.ALL_COMBINES, Combine),
        (layers.IMPLEMENTATIONS, Implementation),
        (layers.SELECTIONS, Selection),
        (layers.DTYPES, Dtype),
    ):
        assert list(choices) == [each.value for each in enumeration]


def test_doctor_asks_the_driver_itself_for_its_cuda(monkeypatch):
    class Library:
        def cuDriverGetVersion(self, version):
            version._obj.value = 13010
            return 0

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("ctypes.CDLL", lambda name: Library())
    assert doctor._driver() == "serves CUDA 13.1; PyTorch is built for 13.0"
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert doctor._driver() == "PyTorch is built for 13.0"
