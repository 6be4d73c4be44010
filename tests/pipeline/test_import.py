import subprocess
import sys

import vsa_diffusers

SCRIPT = """
import sys, time
import torch
start = time.perf_counter()
import vsa_diffusers
seconds = time.perf_counter() - start
assert "diffusers" not in sys.modules
from vsa_diffusers import video_sparse_attention
sys.modules["triton"] = None
query, key, value = torch.randn(3, 1, 64, 2, 8)
video_sparse_attention(query, key, value, (4, 4, 4), block_size=(2, 2, 2), combine="merge")
assert "diffusers" not in sys.modules
print(seconds)
"""


def test_import_is_quick_and_needs_neither_diffusers_nor_triton():
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    seconds = [float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(3)]
    assert min(seconds) < 0.3  # the quickest of three: the others waited for the disk or for other work


def test_every_public_name_exists_and_is_documented():
    for name in vsa_diffusers.__all__:
        public = getattr(vsa_diffusers, name)
        assert name in dir(vsa_diffusers)
        assert not callable(public) or public.__doc__
