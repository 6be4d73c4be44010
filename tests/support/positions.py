"""What position in the run each forward of a pipeline's transformers has, as the hooks of VSA see it."""

import contextlib

from vsa_diffusers.pipeline import supported_parts
from vsa_diffusers.steps import position_in_run


@contextlib.contextmanager
def recorded_positions(pipe):
    """Collects a `Position`, or `None`, for every forward inside the block."""
    seen = []
    handles = [
        part.register_forward_pre_hook(lambda *_: seen.append(position_in_run()))
        for part in supported_parts(pipe).values()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def assert_all_steps_are_known(seen, left_out=0):
    """Every forward belongs to a step, all agree on how many there are, and all but the `left_out` last had one."""
    assert seen
    assert None not in seen
    [total] = {position.total for position in seen}
    assert {position.step for position in seen} == set(range(total - left_out))
