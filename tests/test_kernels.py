"""The Triton kernels on a machine without a GPU: Triton's interpreter against fp64, in a process of its own.

Triton reads TRITON_INTERPRET when a kernel is defined, so the other tests cannot share a process with these.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import pytest
import torch

from vsa_diffusers import video_sparse_attention

FILES = sorted((Path(__file__).parent / "kernels").glob("interpreted_*.py"))
INTERPRETED = pytest.StashKey[dict]()  # file -> what `start_interpreting` returned


def can_interpret() -> bool:
    """Whether the installed Triton is one whose interpreter is right."""
    if importlib.util.find_spec("triton") is None:
        return False
    from vsa_diffusers.kernels.run import is_recent_triton

    return is_recent_triton()


def start_interpreting(file: Path) -> tuple[subprocess.Popen, IO[bytes]]:
    """The tests in `file` in a process that takes what time the other tests leave, and where its output goes."""
    output = tempfile.TemporaryFile()  # noqa: SIM115 (closed after the process)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["nice", "-n", "19", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT), output


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_kernels_match_fp64_in_the_interpreter(file, request):
    if not can_interpret():
        pytest.skip("runs with Triton 3.6 or later; with an earlier one the kernels refuse to run")
    process, output = request.config.stash[INTERPRETED][file]
    returned = process.wait()
    output.seek(0)
    assert returned == 0, output.read().decode()[-6000:]


def test_an_explicit_choice_that_cannot_run_names_the_reason_and_the_mend():
    query = torch.randn(1, 64, 1, 32)
    with pytest.raises(
        RuntimeError, match=r'query is on cpu; move it, or choose "torch"|pip install triton|need Triton 3.6'
    ):
        video_sparse_attention(query, query, query, (4, 4, 4), implementation="triton")


def test_the_package_is_imported_without_triton():
    code = "import sys; sys.modules['triton'] = None; import vsa_diffusers; print('fine')"
    assert "fine" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
