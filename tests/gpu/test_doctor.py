"""`doctor`, and plans that are measured, on a GPU."""

import pytest
import torch

from vsa_diffusers import doctor
from vsa_diffusers.kernels import support
from vsa_diffusers.planning import plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a machine with a CUDA GPU"),
]


def test_nothing_is_broken_and_the_kernels_run():
    checks = {check.name: check for check in doctor.examine().checks}
    assert {check.status for name, check in checks.items() if name.startswith("self-test")} == {doctor.FINE}
    assert checks["kernel"].found.startswith("Triton")
    if not support.device_of(0).processors:
        assert "portable" in checks["kernel"].found
    assert torch.cuda.get_device_name(0) in checks["GPU 0"].found


def test_a_measured_plan_times_all_heads_on_this_gpu():
    result = plan("ltx2", ratios=[0.2], measure=True)
    assert result.device == torch.cuda.get_device_name(0)
    assert result.origin == "timed here on random inputs"
    assert result.speeds[0].layer > 1
