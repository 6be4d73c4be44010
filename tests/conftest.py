import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)


def pytest_configure():
    # Small shapes: more threads only wait for each other.
    torch.set_num_threads(1)


def pytest_collection_finish(session):
    # They take minutes and one core; started now, they are done when their turn comes.
    interpreted = [item for item in session.items if item.name.startswith("test_the_kernels_match_fp64_in")]
    if interpreted and not session.config.option.collectonly and interpreted[0].module.can_interpret():
        module = interpreted[0].module
        files = [item.callspec.params["file"] for item in interpreted]
        session.config.stash[module.INTERPRETED] = started = {file: module.start_interpreting(file) for file in files}
        session.config.add_cleanup(lambda: [process.kill() for process, _ in started.values()])
