"""Learning rates follow diffusers' schedules, and a training that is made longer comes to its new curve smoothly."""

import pytest
import torch
from diffusers.optimization import get_scheduler
from vsa_training.learning_rates import SCHEDULES, LearningRates, check_rates


def optimizer(lr=0.5):
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    groups = [{"params": parameters[:1], "name": "lr"}, {"params": parameters[1:], "name": "gate_lr", "lr": 2.0}]
    return torch.optim.AdamW(groups, lr=lr)


def rates_of(rates, steps):
    curve = []
    for _ in range(steps):
        curve.append(rates.current()["lr"])
        rates.step()
    return curve


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_are_those_of_diffusers(name):
    theirs = optimizer()
    scheduler = get_scheduler(name, theirs, num_warmup_steps=3, num_training_steps=12)
    expected = []
    for _ in range(12):
        expected.append(theirs.param_groups[0]["lr"])
        theirs.step()
        scheduler.step()
    assert rates_of(LearningRates([optimizer()], name, total=12, warmup=3), 12) == pytest.approx(expected)


def test_every_group_keeps_its_own_rate():
    rates = LearningRates([optimizer(), optimizer()], "cosine", total=12, warmup=2)
    rates.step()
    assert rates.current() == {"lr": 0.25, "gate_lr": 1.0}
    assert rates.highest() == {"lr": 0.5, "gate_lr": 2.0}


def gone_on(state, total, warmup=4):
    rates = LearningRates([optimizer()], "cosine", total, warmup)
    check_rates(state)
    rates.load(state)
    return rates


def test_rates_go_on_where_they_stopped():
    straight = rates_of(LearningRates([optimizer()], "cosine", total=20, warmup=4), 20)
    stopped = LearningRates([optimizer()], "cosine", total=20, warmup=4)
    assert rates_of(stopped, 9) == straight[:9]
    assert rates_of(gone_on(stopped.state(), total=20), 11) == straight[9:]


def test_a_finished_training_that_is_made_longer_rises_from_zero_to_the_longer_curve():
    finished = LearningRates([optimizer()], "cosine", total=20, warmup=4)
    rates_of(finished, 20)
    longer = gone_on(finished.state(), total=40)
    assert longer.before_last() == pytest.approx(0)
    curve = rates_of(longer, 20)
    whole = rates_of(LearningRates([optimizer()], "cosine", total=40, warmup=4), 40)
    assert curve[3:] == pytest.approx(whole[23:])
    assert 0 < curve[0] < curve[1] < curve[2] < curve[3]
    # Killed on the way up, it goes on as if nothing had happened.
    again = gone_on(finished.state(), total=40)
    rates_of(again, 2)
    assert rates_of(gone_on(again.state(), total=40), 18) == curve[2:]


def test_a_constant_rate_stays_constant_when_there_are_more_steps():
    finished = LearningRates([optimizer()], "constant", total=5, warmup=0)
    rates_of(finished, 5)
    longer = LearningRates([optimizer()], "constant", total=9, warmup=0)
    longer.load(finished.state())
    assert rates_of(longer, 4) == [0.5] * 4
