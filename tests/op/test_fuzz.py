"""A few hundred of the random cases of `tests/fuzz.py`, and that they find what is wrong."""

import pytest
import torch

from fuzz_cases import LIMITS, make_case
from fuzz_checks import Report, Wrong, check
from vsa_diffusers import torch_backward, torch_impl


def run(cases, *, gradients):
    report = Report()
    for case in cases:
        check(case, "torch", "cpu", report, gradients=gradients)
    return report


def cases_of(seed, count, wanted=lambda case: True):
    cases = (make_case(seed, index, LIMITS["torch"]) for index in range(20 * count))
    return [case for case in cases if wanted(case)][:count]


@pytest.mark.parametrize(("gradients", "seed", "count"), [(False, 1000, 220), (True, 2000, 80)])
def test_random_calls_equal_the_oracle(gradients, seed, count):
    report = run(cases_of(seed, count), gradients=gradients)
    assert report.cases == count
    assert 0.1 < report.closest <= 1
    assert report.rows > 60 * count
    assert report.vague_rows < 0.3 * (report.rows + report.vague_rows)
    assert report.choices > 4 * count
    assert report.random_near_ties < 0.05 * report.random_choices


def test_a_case_is_the_same_each_time():
    first, second = (cases_of(3, 20) for _ in range(2))
    assert first == second
    assert len(set(map(str, first))) == 20


def _change(monkeypatch, target, name, changed):
    original = getattr(target, name)
    monkeypatch.setattr(target, name, lambda *given: changed(original, *given))


def merge_of_many(case):
    kept = case.settled[1]
    return case.combine == "merge" and case.spread == 1 and kept < case.settled[0].num_tiles


FAULTS = {
    "pooled tiles without their size": (
        torch_impl.Tiled, "_extra", lambda made, tiled, *given: (*made(tiled, *given)[:2], 0 * made(tiled, *given)[2])
    ),
    "the tiles of another query": (torch_impl, "select_tiles", lambda made, *given: made(*given).flip(2)),
    "a tile that is not the best": (torch_impl, "select_tiles", lambda made, *given: (made(*given) + 1).clamp_max(2)),
    "a query a hundredth too long": (torch_impl.Tiled, "tokens", lambda made, *given: 1.01 * made(*given)),
    "memory that nobody wrote": (torch_impl.Tiled, "put_tokens", lambda made, tiled, x, rows, tiles: None),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_random_calls_find_a_fault(fault, monkeypatch):
    _change(monkeypatch, *FAULTS[fault])
    with pytest.raises(Wrong):
        run(cases_of(4, 25, merge_of_many), gradients=False)


@pytest.mark.parametrize("which", range(4))
def test_random_calls_find_a_gradient_that_is_wrong(which, monkeypatch):
    def changed(original, *given):
        grads = list(original(*given))
        if grads[which] is not None:
            grads[which] = 1.02 * grads[which]
        return tuple(grads)

    _change(monkeypatch, torch_backward, "backward", changed)
    with pytest.raises(Wrong, match="gradient of"):
        run(cases_of(5, 40, lambda case: case.spread == 1 and case.dtype == torch.float32), gradients=True)
