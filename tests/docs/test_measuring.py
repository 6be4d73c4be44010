"""The script that measures the tables of the pages: what it runs, skips and leaves."""

import subprocess
import sys
from pathlib import Path

import pytest

import measure_performance


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """What was run, on a GPU that is not there; a command with "fails" in it ends with an error."""
    found = []

    def run(command, check):
        found.append(" ".join(command[1:-2]))
        Path(command[-1]).write_text("half")
        if "fails" in found[-1]:
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (79.5e9, 80e9))
    return found


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["measure_performance.py", "measured", *arguments])
    measure_performance.main()


def test_everything_is_measured_once_under_the_name_of_the_gpu(commands, monkeypatch, tmp_path):
    call(monkeypatch)
    assert commands == [command for command, _ in measure_performance.COMMANDS.values()]
    names = sorted(file.name for file in (tmp_path / "measured").iterdir())
    assert names == sorted(f"h100-{name}.json" for name in measure_performance.COMMANDS)
    call(monkeypatch)
    assert len(commands) == len(names)


def test_what_would_end_too_late_is_left(commands, monkeypatch, capsys):
    call(monkeypatch, "--seconds", "100", "--only", "forward", "dense-gate")
    assert commands == [measure_performance.COMMANDS["dense-gate"][0]]
    assert "h100-forward.json is left: it takes about 131 s" in capsys.readouterr().out


def test_what_failed_is_not_taken_for_measured(commands, monkeypatch, tmp_path):
    monkeypatch.setitem(measure_performance.COMMANDS, "forward", ("-m fails", 1))
    with pytest.raises(subprocess.CalledProcessError):
        call(monkeypatch, "--only", "forward")
    assert not list((tmp_path / "measured").glob("*.json"))


def test_nothing_is_measured_beside_another_process(commands, monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (73.5e9, 80e9))
    with pytest.raises(SystemExit, match=r"6.5 GB of this GPU are held, so another process is on it"):
        call(monkeypatch)
    assert not commands


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"of a GPU, and there is none here"):
        call(monkeypatch)
