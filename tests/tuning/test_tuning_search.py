"""How a tuning shares a budget between layers, predicts, chooses, and keeps its state."""

import itertools
import math
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import pytest
from made_up_tuning import made_up, point

from vsa_diffusers.tiles import num_selected_tiles
from vsa_diffusers.tuning import Target, Tuning, api
from vsa_diffusers.tuning.api import _Confirm, next_budget
from vsa_diffusers.tuning.probe import RATIOS, Probe
from vsa_diffusers.tuning.result import DEFAULT, best_of, is_beyond_chance
from vsa_diffusers.tuning.search import LEVELS, SHAPES, Cost, Search, default_at
from vsa_diffusers.tuning.state import State


@pytest.mark.parametrize("budget", [0.1, 0.25, 0.5])
def test_layers_share_a_budget_nearly_as_well_as_can_be(budget):
    probe = made_up([0.3, 0.05, 0.1])
    search = Search(probe, Cost.of_probe(probe), SHAPES["constant"])
    found = search.at(budget)
    every = [
        (np.take(search.costs, places).mean(), search.squares[range(3), places].sum() ** 0.5)
        for places in itertools.product(range(len(LEVELS)), repeat=3)
    ]
    least = min(error for cost, error in every if cost <= budget + 1e-9)
    even = min(search.squares[:, place].sum() ** 0.5 for place, cost in enumerate(search.costs) if cost <= budget)
    assert found.cost <= budget + 1e-9
    assert least - 1e-9 <= found.error <= 1.1 * least
    assert found.error < even
    assert found.levels[0] > found.levels[2] >= found.levels[1]


@pytest.mark.parametrize("shape", ["constant", "ramp", "front", "steep"])
def test_layers_alike_meet_any_budget_nearly(shape):
    probe = made_up([0.3, 0.05], tiles=400, total=20)
    search = Search(probe, Cost.of_probe(probe), SHAPES[shape], even=True)
    for budget in (0.1, 0.33, 0.6, 0.8):
        found = search.at(budget)
        assert len(set(found.levels)) == 1
        assert 0.95 * budget < found.cost <= budget


def test_a_layer_that_reaches_the_output_more_gets_more():
    probe = made_up([0.1, 0.1])
    probe.gains[1] = 3
    low, high = Search(probe, Cost.of_probe(probe), SHAPES["constant"]).at(0.3).levels
    assert high > low


@pytest.mark.parametrize("tiles", [32, 96, 1000])
def test_the_default_never_keeps_more_than_the_budget(tiles):
    probe = made_up([0.1], tiles=tiles)
    cost = Cost.of_probe(probe)
    for budget in (0.05, 0.2, 0.26, 0.67, 0.9):
        ratio, found = default_at(probe, cost, budget)
        kept = num_selected_tiles(tiles, ratio) / tiles
        assert budget - 1 / tiles < found == kept <= budget


def test_what_was_measured_is_predicted_however_few_the_tiles():
    probe = made_up([0.3], tiles=16)
    shares = [num_selected_tiles(16, ratio) / 16 for ratio in RATIOS]
    for place, share in enumerate(shares):
        assert share > RATIOS[place]
        assert probe.output_error(np.full(4, share))[0] == pytest.approx(probe.errors[0, 0, place])
    fewer = made_up([0.3], tiles=3)
    assert [fewer.share(ratio) for ratio in RATIOS] == [1 / 3, 1 / 3, 1 / 3, 2 / 3, 1]
    assert fewer.output_error(np.array([1 / 3, 2 / 3, 1, 1]))[0] == pytest.approx([0.3, fewer.errors[0, 0, 3], 0, 0])
    times = dict.fromkeys(RATIOS, 2.0) | {0.0: 10.0, 0.4: 4.0, 0.7: 6.0}
    cost = Cost.of_probe(Probe(**vars(fewer) | {"times": times}))
    assert [cost.of(share) for share in (1 / 3, 2 / 3, 1)] == pytest.approx([0.2, 0.4, 0.6])


def test_fewer_tiles_than_were_measured_lose_more():
    probe = made_up([0.3], tiles=1000)
    low, least, more = (probe.output_error(np.full(4, share))[0, 0] for share in (0.02, RATIOS[0], RATIOS[1]))
    assert (low - least) / 0.03 == pytest.approx((least - more) / 0.05)


def test_times_are_counted_where_they_are_stable_only():
    times = {0.0: 10.0, 0.05: 2.0, 0.1: 3.0, 0.2: 4.0, 0.4: 6.0, 0.7: 9.0}
    probe = Probe(**vars(made_up([0.1])) | {"times": times, "spread": 0.05, "rest": 10.0})
    cost = Cost.of_probe(probe)
    assert cost.is_time
    assert cost.of(0.3) == pytest.approx(0.5)
    assert cost.of(0.8) == pytest.approx(1.0)
    assert cost.budget_for(1.25) == pytest.approx(0.6)
    noisy = Cost.of_probe(Probe(**vars(probe) | {"spread": 0.4}))
    assert not noisy.is_time
    assert "40%" in noisy.reason
    assert noisy.of(0.3) == 0.3


@pytest.mark.parametrize(
    ("target", "of_cost"),
    [
        (Target("psnr", 31.0), lambda cost: dict(psnr=36 + 10 * math.log(cost))),
        (Target("speedup", 1.5), lambda cost: dict(speedup=2 / (1 + cost))),
        (Target("error", 0.05), lambda cost: dict(error=0.1 * (1 - cost))),
    ],
    ids=lambda each: getattr(each, "name", ""),
)
def test_budgets_close_in_on_the_target(target, of_cost):
    points = [point(cost=0.25, **of_cost(0.25))]
    for _ in range(6):
        budget = next_budget(points, target)
        if budget is None:
            break
        points.append(point(cost=budget, **of_cost(budget)))
    best = min((each for each in points if target.beyond(each.value(target.name)) >= 0),
               key=lambda each: target.beyond(each.value(target.name)))  # fmt: skip
    assert budget is None
    assert target.beyond(best.value(target.name)) <= api.TOLERANCES[target.name]


def test_the_best_is_the_cheapest_that_reaches_a_quality_and_the_best_that_reaches_a_speed():
    points = (
        point("a", 0.1, 20.0, speedup=2.0),
        point("b", 0.2, 31.0, speedup=1.5),
        point("c", 0.4, 35.0, speedup=1.1),
    )
    chosen = {
        name: Tuning(Target(name, value), points, None, None, None, None).best.name
        for name, value in (("psnr", 30.0), ("speedup", 1.4))
    }
    assert chosen == {"psnr": "b", "speedup": "b"}
    missed = Tuning(Target("psnr", 40.0), points, None, None, None, None)
    assert (missed.is_met, missed.best.name) == (False, "c")
    dearer = (*points, point("d", 0.5, 30.0))
    assert [each.name for each in Tuning(Target("psnr", 40.0), dearer, None, None, None, None).frontier] == [
        "a",
        "b",
        "c",
    ]


def test_a_state_goes_on_and_refuses_another_tuning(tmp_path):
    path = tmp_path / "state.json"
    state = State(path, {"seed": 0})
    assert state.once("a", lambda: [1, 2.5]) == [1, 2.5]
    with pytest.raises(KeyboardInterrupt):
        state.once("b", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    again = State(path, {"seed": 0})
    assert again.once("a", pytest.fail) == [1, 2.5]
    assert again.once("b", lambda: 3) == 3
    with pytest.raises(ValueError, match=r"seed=0 instead of 1.*--anew"):
        State(path, {"seed": 1})
    assert State(path, {"seed": 1}, anew=True).once("a", lambda: 4) == 4
    for content in ("", "[]", "{}", '{"facts": [], "results": {}}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"state.json is no state of a tuning; .*--anew"):
            State(path, {"seed": 1})


def comparison_of(quality):
    """What `_Confirm` asks of a comparison: PSNR and SSIM by prompt, as `quality` gives them for a setting's name."""

    def result(setting):
        close = [SimpleNamespace(psnr=each, ssim=0.9) for each in quality(setting.name)]
        means = {"psnr": fmean(each.psnr for each in close), "ssim": 0.9}
        return SimpleNamespace(close=close, mean=means.__getitem__)

    def videos(settings):
        return SimpleNamespace(results=[None, *map(result, settings)], speedup=lambda result: 1.2)

    return videos


LUCK = [12.0, -4.0, 3.0, -5.0]  # 1.5 dB in the mean, and less than chance may give
SKILL = [1.6, 1.4, 1.5, 1.5]


@pytest.mark.parametrize(
    ("gains", "chosen"),
    [(LUCK, "front, even"), (SKILL, "steep, even"), (LUCK[:1], "front, even"), ([9.0], "front, even")],
)
def test_another_schedule_is_chosen_where_it_wins_by_more_than_chance(gains, chosen):
    def quality(name):
        base = [30 + 20 * math.log(float(name.split()[-1]) / 0.3) + place for place in range(len(gains))]
        extra = gains if name.startswith("steep, even") else [0.0 if "even" in name else -1.0] * len(gains)
        return [one + other for one, other in zip(base, extra, strict=True)]

    probed = made_up([0.3, 0.05], total=20, tiles=1000)
    cost = Cost.of_probe(probed)
    confirm = _Confirm(Target("psnr", 30.0), probed, cost, comparison_of(quality), lambda setting: None)
    confirm.settle([Search(probed, cost, SHAPES[name], even=True) for name in ("constant", "front", "steep")], rounds=3)
    points = list(confirm.points.values())
    best = best_of(points, Target("psnr", 30.0))
    assert best.schedule == chosen or (chosen.startswith("front") and best.schedule == DEFAULT)
    steep = [each for each in points if each.schedule == "steep, even"]
    assert steep
    assert all(each.proven == (chosen == "steep, even") for each in steep)


def test_a_mean_is_beyond_chance_by_student_s_quantiles():
    assert is_beyond_chance(SKILL)
    assert not is_beyond_chance(LUCK)
    assert not is_beyond_chance([9.0])
    assert not is_beyond_chance([-1.0, -1.1, -0.9])
    # Mean 1, deviation 1: with three 2.92 / 3 ** 0.5 is more than 1, with five 2.13 / 5 ** 0.5 is less.
    three, five = [0.0, 1.0, 2.0], [1 + each for each in (-1.2649, -0.6325, 0.0, 0.6325, 1.2649)]
    assert not is_beyond_chance(three)
    assert is_beyond_chance(five)
