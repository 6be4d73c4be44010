"""Eight processes measure forwards over two, four and all of them, and training; each equals one process."""

import pytest

from ranks import outcomes
from scaling_cases import EIGHT

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("eight ranks")]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """All cases, by eight processes that are started once."""
    return outcomes("scaling_cases", "EIGHT", 8, tmp_path_factory.mktemp("eight"))


@pytest.mark.parametrize("case", EIGHT)
def test_eight_ranks_do_what_one_does(told, case):
    assert told[case] == "", told[case]
