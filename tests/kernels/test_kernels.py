"""What the op says where the kernels cannot run; `conftest.py` runs them in Triton's interpreter."""

import subprocess
import sys

import pytest
import torch

from vsa_diffusers import video_sparse_attention


def test_an_explicit_choice_that_cannot_run_names_the_reason_and_the_mend():
    query = torch.randn(1, 64, 1, 32)
    with pytest.raises(
        RuntimeError, match=r'query is on cpu; move it, or choose "torch"|pip install triton|need Triton 3.6'
    ):
        video_sparse_attention(query, query, query, (4, 4, 4), implementation="triton")


def test_the_package_is_imported_without_triton():
    code = "import sys; sys.modules['triton'] = None; import vsa_diffusers; print('fine')"
    assert "fine" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
