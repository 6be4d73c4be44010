import subprocess
import sys

import pytest

from vsa_diffusers.cli import app
from vsa_diffusers.cli.progress import progress_bars
from vsa_diffusers.cli.script import REFUSED
from vsa_diffusers.version import __version__


def run(capsys, *argv):
    with pytest.raises(SystemExit) as ended:
        app.main(list(argv))
    return ended.value.code, capsys.readouterr()


def test_without_a_command_it_teaches(capsys):
    _, printed = run(capsys)
    assert "bench" in printed.out + printed.err


def test_it_tells_its_version(capsys):
    assert run(capsys, "--version") == (0, (f"{__version__}\n", ""))


def test_what_is_refused_is_one_sentence_and_no_traceback(capsys):
    code, printed = run(capsys, "bench", "--shapes", "wan")
    assert code == REFUSED
    assert "shape 'wan' is neither one of" in printed.err
    assert "Traceback" not in printed.err


def test_a_traceback_can_be_asked_for(capsys):
    code, printed = run(capsys, "--traceback", "bench", "--shapes", "wan")
    assert code == REFUSED
    assert "Traceback" in printed.err


def test_help_needs_no_torch():
    code = "import sys, vsa_diffusers.cli.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_where_there_is_no_terminal_progress_is_told_in_lines(capsys):
    with progress_bars() as progress:
        progress.begin("dense, prompt 1 of 2", 4)
        progress.step()
        progress.begin("0.2 [bold], prompt 1 of 2", None)
    assert capsys.readouterr().err == "0:00:00 dense, prompt 1 of 2\n0:00:00 0.2 [bold], prompt 1 of 2\n"
    with progress_bars(show=False) as progress:
        progress.begin("dense", 4)
    assert capsys.readouterr().err == ""
