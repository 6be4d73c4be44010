import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)


def pytest_configure():
    # Small shapes: more threads only wait for each other.
    torch.set_num_threads(1)
