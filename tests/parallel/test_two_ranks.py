"""Two processes do together what one does: plans, exchange, gradients, and what must raise."""

import pytest

from rank_cases import CASES, OF_ISSUE, SLOW_CASES
from ranks import outcomes


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """All cases, by two processes that are started once."""
    return outcomes("rank_cases", "CASES", 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def told_slowly(tmp_path_factory):
    return outcomes("rank_cases", "SLOW_CASES", 2, tmp_path_factory.mktemp("slow"))


@pytest.mark.xdist_group("two ranks")
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_do_what_one_does(told, case):
    assert told[case] == "", told[case]


@pytest.mark.slow
@pytest.mark.xdist_group("two ranks, every family")
@pytest.mark.parametrize("case", SLOW_CASES)
def test_two_ranks_run_dense_and_train_as_one_in_every_family(told_slowly, case):
    assert told_slowly[case] == "", told_slowly[case]


def test_the_families_that_are_trained_are_there():
    assert {f"{name} trains as one process" for name in OF_ISSUE} <= CASES.keys()
