import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)


def pytest_configure():
    # Small shapes: more threads only wait for each other.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    # They take minutes; begun first, they do not end last.
    items.sort(key=lambda item: not item.path.name.startswith("interpreted_"))
