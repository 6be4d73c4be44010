"""Four processes do together what one does: Wan."""

import pytest

from four_rank_cases import CASES
from ranks import outcomes

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("four ranks")]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """All cases, by four processes that are started once."""
    return outcomes("four_rank_cases", "CASES", 4, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("case", CASES)
def test_four_ranks_do_what_one_does(told, case):
    assert told[case] == "", told[case]
