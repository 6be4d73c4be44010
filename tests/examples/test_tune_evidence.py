"""The evidence for tuning: what a tuned setting is compared with keeps at least as many tiles, and what it says."""

from types import SimpleNamespace

import numpy as np
import pytest
from tune_evidence import settings_of, share_for

from vsa_diffusers import VSAConfig
from vsa_diffusers.schedule import mean_share
from vsa_diffusers.tuning import Point, Target
from vsa_diffusers.tuning.probe import RATIOS, Probe, Tiling
from vsa_diffusers.tuning.search import SHAPES, Cost, Search

TILES, STEPS = 1000, 20


def tuned(shape):
    """A tuning of two unlike layers whose best setting has this schedule."""
    errors = np.array([0.3, 0.05])[:, None, None] * np.ones((1, 2, 1)) * (1 - np.array(RATIOS))
    names, tiling = ("blocks.0.attn1", "blocks.1.attn1"), Tiling("auto", "mean", 0.1, 0.2)
    probe = Probe(names, (0, STEPS - 1), STEPS, TILES, TILES, tiling, errors, np.ones((2, 2)), {}, 0.0, 0.0)
    cost = Cost.of_probe(probe)
    found = Search(probe, cost, SHAPES[shape]).at(0.4)
    config = found.config(probe)
    best = Point("best", shape, config, found.cost, found.kept, 30.0, 0.9, 1.2, None, found)
    return SimpleNamespace(best=best, probe=probe, cost=cost, target=Target("psnr", 30.0))


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "constant"])
def test_what_a_tuned_setting_is_compared_with_keeps_what_it_says_and_no_less(shape):
    tuning = tuned(shape)
    of_kind = {what["kind"]: (setting.config, what["kept"]) for setting, what in settings_of([tuning])}
    for kind in ("default", "schedule alone"):
        config, said = of_kind[kind]
        if not isinstance(config, VSAConfig):
            assert config.keys() == {"default"}
            config = VSAConfig(**{name: value for name, value in config["default"].items() if name != "enable"})
        schedule = "constant" if config.schedule == "auto" else config.schedule
        kept = mean_share(schedule, config.top_k_ratio, config.dense_steps, STEPS)
        assert kept == pytest.approx(said, abs=1 / TILES)
        assert tuning.best.kept <= said < 1.1 * tuning.best.kept


def test_the_default_s_share_of_equal_psnr_is_on_a_line_between_those_made():
    rows = [{"kept": 0.6, "psnr": [30.0, 32.0]}, {"kept": 0.4, "psnr": [20.0, 22.0]}]
    assert share_for(26.0, rows) == pytest.approx(0.5)
    assert share_for(33.0, rows) is None
