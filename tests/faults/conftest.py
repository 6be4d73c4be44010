"""What the tests of this folder save, twice, and where."""

import tempfile
from pathlib import Path

import pytest

from tiny_fine_tuned import WAN, fine_tuned
from two_saves import KINDS


@pytest.fixture
def folder():
    """In memory where there is such a place, since waiting for a disk changes no order."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def generations():
    """For each kind two trained models that share nothing, and what of them comes back."""
    return {kind: [fine_tuned(WAN.build(), lora=kind == "lora", seed=seed) for seed in (1, 2)] for kind in KINDS}
