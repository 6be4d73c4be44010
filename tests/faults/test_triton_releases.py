"""Every kernel compiles with each release of Triton that is served, and with the newest there is.

Each release is downloaded into a folder of its own, which goes before the installed one; nothing is installed. How many
registers a kernel spills is held to limits with the installed release alone (`tests/kernels`): here it may be more, but
in the Hopper kernel and the pool as long sequences take them.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

COMPILATION = Path(__file__).parents[1] / "kernels" / "compilation.py"
RELEASES = {"3.6": "triton==3.6.*", "3.7": "triton==3.7.*", "3.8": "triton==3.8.*", "newest": "triton>=3.9"}
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
HOPPER = {"128": ["--programs", "264"], "64": ["--programs", "396"]}
# Bytes, with Triton 3.6; more than that cost 5 to 10 % of the Hopper kernel's time, and a quarter of the pool's.
MOST_SPILLS = {"hopper forward": 24, "pool": 0}
CALLS = {
    "forward": ["--targets", *TARGETS],
    "quarters": ["--targets", *TARGETS, "--combines", "merge", "--selection", "quarters"],
    "backward": ["--targets", *TARGETS, "--backward"],
    "packed": ["--targets", *TARGETS, "--packed"],
} | {
    f"hopper, {layout}, {dim}": [
        "--targets",
        "sm_90",
        "--head-dims",
        dim,
        "--layout",
        layout,
        "--stages",
        "3",
        *programs,
    ]
    for layout in ("direct", "descriptor")
    for dim, programs in HOPPER.items()
}
KERNELS = {
    "forward": ["pool", "coarse", "top_k", "sparse forward"],
    "quarters": ["quarter scores"],
    "packed": ["tile means", "add gated"],
    "backward": ["coarse gradient", "backward preprocess", "rebuild lists", "transpose lists", "order lists", "dq",
                 "pooled dkdv", "dkdv"],
}  # fmt: skip


@pytest.fixture(scope="module", params=RELEASES)
def folder(request, tmp_path_factory):
    """Where a release lies."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("runs where pip is installed: python -m ensurepip")
    folder = tmp_path_factory.mktemp("triton")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    wanted = RELEASES[request.param]
    download = subprocess.run([*pip, wanted], capture_output=True, text=True, check=False)
    if download.returncode != 0:
        pytest.skip(f"runs where pip finds {wanted} for this Python: {download.stderr.strip()[-300:]}")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CALLS)
def test_every_kernel_compiles(folder, name):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    found = "import sys, triton; print(triton.__file__)"
    where = subprocess.run([sys.executable, "-c", found], env=environment, capture_output=True, text=True, check=True)
    assert where.stdout.startswith(str(folder))
    command = [sys.executable, str(COMPILATION), *CALLS[name]]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout[-2000:] + told.stderr[-4000:]
    assert "Warning" not in told.stderr, told.stderr
    for kernel in KERNELS.get(name, ["hopper forward"]):
        for target in CALLS[name][1 : 1 + len(TARGETS)] if name in KERNELS else ["sm_90"]:
            assert f"kernel='{kernel}', target='{target}'" in told.stdout, (kernel, target)
    if "descriptor" in name:
        for kernel, most in MOST_SPILLS.items():
            told_of = [line for line in told.stdout.splitlines() if f"kernel='{kernel}'" in line]
            assert all("serialized=False" in line for line in told_of), told_of
            assert max(int(re.search(r"\bspills=(\d+)", line).group(1)) for line in told_of) <= most, told_of
