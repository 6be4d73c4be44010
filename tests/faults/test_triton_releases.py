"""Every kernel compiles with each release of Triton that is said to be served, and with the newest there is.

Each release is downloaded into a folder of its own, which goes before the installed one; nothing is installed.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
RELEASES = {"3.6": "triton==3.6.*", "3.7": "triton==3.7.*", "3.8": "triton==3.8.*", "newest": "triton>=3.9"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="runs where pip is installed: python -m ensurepip")
@pytest.mark.parametrize("release", RELEASES)
def test_every_kernel_compiles(release, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    download = subprocess.run([*pip, RELEASES[release]], capture_output=True, text=True, check=False)
    if download.returncode != 0:
        pytest.skip(f"runs where pip finds {RELEASES[release]} for this Python: {download.stderr.strip()[-300:]}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    environment.pop("PYTEST_XDIST_WORKER", None)
    found = "import triton, sys; sys.exit(not triton.__file__.startswith(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", found, str(tmp_path)], env=environment, check=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    suite = subprocess.run(
        [*command, str(TESTS / "kernels" / "test_kernel_compilation.py")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert suite.returncode == 0, suite.stdout[-6000:] + suite.stderr[-2000:]
