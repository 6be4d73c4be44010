"""The kernel in Gluon, on the CPU; in a process of its own (`conftest.py`)."""

from dataclasses import replace

import pytest
import torch

from checks import Case, check, check_chunk_sync, check_rows_far_below_their_bound, some
from vsa_diffusers.kernels.recording import Launcher

gluon_on_cpu = pytest.importorskip("gluon_on_cpu", reason="runs with Triton's Gluon: pip install 'triton>=3.6'")
from vsa_diffusers.kernels.hopper.forward import hopper_forward_kernel  # noqa: E402 - needs Gluon, too

# Of 2 x 3 x 3 tiles most are partial, down to two tokens.
BASE = Case((5, 9, 10), top_k=7, combine="gate", head_dim=128, dtype=torch.bfloat16, programs=3, layout="tiled")
WHOLE = replace(BASE, video_shape=(8, 8, 12), layout="direct")
CASES = [
    BASE,
    replace(BASE, combine="merge", batch=2, sync_chunks=2),
    replace(BASE, combine="sum", head_dim=64, programs=5, sync_chunks=3),
    replace(BASE, combine="gate", before=65, transposed=True, heads=2, spread=4.0),
    replace(BASE, combine="merge", head_dim=64, block_size=(3, 5, 4)),
    replace(BASE, combine="merge", layout="direct", spread=16.0),
    replace(BASE, combine="sparse", before=3, after=70, masked=True),
    replace(WHOLE, combine="merge", batch=2, spread=4.0, programs=100),
    replace(WHOLE, heads=2, sync_chunks=2),
]


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """Launches of the Hopper kernel go to `gluon_on_cpu`; there must have been some."""
    launches = []

    def launch(self, kernel, grid, *arguments, **options):
        if kernel is hopper_forward_kernel:
            launches.append(grid)
            gluon_on_cpu.run(kernel, grid[0], arguments, options)
        else:
            kernel[grid](*arguments, **options)

    monkeypatch.setattr(Launcher, "launch", launch)
    yield
    assert launches


@pytest.mark.parametrize("case", some(CASES, every=6), ids=str)
def test_the_hopper_kernel_matches_fp64(case):
    check(case)


@pytest.mark.parametrize("combine", ["gate", "sparse"])
def test_it_finds_rows_far_below_their_bound(combine):
    check_rows_far_below_their_bound(combine, head_dim=128, programs=2, layout="tiled")


@pytest.mark.slow
def test_keeping_in_step_changes_no_bit():
    check_chunk_sync(replace(BASE, head_dim=64, programs=4), (3, 7))


@pytest.mark.parametrize(
    ("where", "what", "mistake"),
    [
        (gluon_on_cpu.MBARRIER, "wait", lambda barrier, phase: None),
        (gluon_on_cpu.MBARRIER, "arrive", lambda barrier: None),
        (gluon_on_cpu.MBARRIER, "expect", lambda barrier, size: barrier.change(1)),
        (gluon_on_cpu.MBARRIER, "expect", lambda barrier, size: barrier.change(1, 2 * size)),
        (gluon_on_cpu.TMA, "store_wait", lambda pending: None),
    ],
    ids=["no waits", "no arrivals", "no bytes expected", "too many bytes expected", "output read too late"],
)
def test_a_kernel_that_waits_wrongly_is_found_out(where, what, mistake, monkeypatch):
    monkeypatch.setattr(gluon_on_cpu, "DEADLOCK_SECONDS", 2.0)
    monkeypatch.setattr(where, what, mistake)
    with pytest.raises(AssertionError):
        check(WHOLE)
