"""Two GPUs do together what one does."""

import pytest
import torch

from gpu_rank_cases import CASES
from ranks import outcomes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("two GPUs"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="runs on a machine with two GPUs"),
]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """All cases, by two processes that are started once."""
    return outcomes("gpu_rank_cases", "CASES", 2, tmp_path_factory.mktemp("gpus"), timeout=550, backend="nccl")


@pytest.mark.parametrize("case", CASES)
def test_two_gpus_do_what_one_does(told, case):
    assert told[case] == "", told[case]
