"""The Triton kernels on a machine without a GPU: Triton's interpreter against fp64, in a process of its own.

Triton reads TRITON_INTERPRET when a kernel is defined, so the other tests cannot share a process with these.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vsa_diffusers import video_sparse_attention

FILES = sorted(Path(__file__).parent.glob("interpreted_*.py"))


def can_interpret() -> bool:
    """Whether the installed Triton is one whose interpreter is right."""
    if importlib.util.find_spec("triton") is None:
        return False
    from vsa_diffusers.kernels.support import is_recent_triton

    return is_recent_triton()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_kernels_match_fp64_in_the_interpreter(file):
    if not can_interpret():
        pytest.skip("runs with Triton 3.6 or later; with an earlier one the kernels refuse to run")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout[-6000:]


def test_an_explicit_choice_that_cannot_run_names_the_reason_and_the_mend():
    query = torch.randn(1, 64, 1, 32)
    with pytest.raises(
        RuntimeError, match=r'query is on cpu; move it, or choose "torch"|pip install triton|need Triton 3.6'
    ):
        video_sparse_attention(query, query, query, (4, 4, 4), implementation="triton")


def test_the_package_is_imported_without_triton():
    code = "import sys; sys.modules['triton'] = None; import vsa_diffusers; print('fine')"
    assert "fine" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
