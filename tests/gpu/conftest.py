import importlib.util

import pytest
import torch

collect_ignore_glob = ["*"] if importlib.util.find_spec("triton") is None else []


@pytest.fixture(autouse=True)
def nothing_is_kept():
    """Memory that a test is done with goes back to the GPU, which several workers may share."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
