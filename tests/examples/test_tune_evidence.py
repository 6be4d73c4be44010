"""The evidence for tuning: what a tuned setting is compared with keeps at least as many tiles, and what it says."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from made_up_tuning import made_up
from tune_evidence import Tuned, settings_of, share_for

from vsa_diffusers import VSAConfig
from vsa_diffusers.schedule import mean_share
from vsa_diffusers.tuning import Point, Target, Tuning
from vsa_diffusers.tuning.search import SHAPES, Cost, Search

TILES, STEPS = 1000, 20
CALL = {"num_inference_steps": STEPS, "height": 256}


def tuning(shape, arguments=CALL, **target):
    """A tuning of two unlike layers whose best setting has this schedule."""
    probe = made_up([0.3, 0.05], total=STEPS, tiles=TILES)
    cost = Cost.of_probe(probe)
    found = Search(probe, cost, SHAPES[shape]).at(0.4)
    best = Point("best", found.name, found.config(probe), found.cost, found.kept, 30.0, 0.9, 1.2, None, found)
    shown = dict.fromkeys(("model", "pipeline", "dtype", "device", "hardware", "versions", "seed"))
    shown |= {"prompts": ["a", "b"], "arguments": arguments}
    comparison = SimpleNamespace(prompts=("a", "b"), to_dict=lambda: shown)
    return Tuning(Target.one_of(target or {"psnr": 30.0}), (best,), probe, cost, comparison, None)


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "constant"])
def test_what_a_tuned_setting_is_compared_with_keeps_what_it_says_and_no_less(shape):
    tuned = Tuned.of(tuning(shape))
    of_kind = {what["kind"]: (setting.config, what["kept"]) for setting, what in settings_of([tuned], [1.5])}
    assert of_kind["default, more"][1] == pytest.approx(1.5 * tuned.kept, abs=1 / TILES)
    for kind in ("default", "schedule alone"):
        config, said = of_kind[kind]
        if not isinstance(config, VSAConfig):
            assert config.keys() == {"default"}
            config = VSAConfig(**{name: value for name, value in config["default"].items() if name != "enable"})
        schedule = "constant" if config.schedule == "auto" else config.schedule
        kept = mean_share(schedule, config.top_k_ratio, config.dense_steps, STEPS)
        assert kept == pytest.approx(said, abs=1 / TILES)
        assert tuned.kept <= said < 1.1 * tuned.kept


@pytest.mark.parametrize("shape", ["steep", "dense start"])
def test_what_was_tuned_elsewhere_is_judged_as_if_it_was_here(shape, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(tuning(shape).to_dict()))
    here, read = (settings_of([tuned], []) for tuned in (Tuned.of(tuning(shape)), Tuned.read(path, CALL)))
    assert read == here
    assert Tuned.read(path, CALL).prompts == ("a", "b")
    np.testing.assert_array_equal(Tuned.read(path, CALL).probe.errors, tuning(shape).probe.errors)


def test_another_target_or_another_call_is_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(tuning("front", ssim=0.9).to_dict()))
    with pytest.raises(
        ValueError, match=r"results\.json was tuned for \{'ssim': 0\.9\} with .*; this judges PSNR, with"
    ):
        Tuned.read(path, CALL)
    path.write_text(json.dumps(tuning("front", arguments=CALL | {"height": 128}).to_dict()))
    with pytest.raises(ValueError, match="'height': 128"):
        Tuned.read(path, CALL)


def test_the_default_s_share_of_equal_psnr_is_on_a_line_between_those_made():
    rows = [{"kept": 0.6, "psnr": [30.0, 32.0]}, {"kept": 0.4, "psnr": [20.0, 22.0]}]
    assert share_for(26.0, rows) == pytest.approx(0.5)
    assert share_for(33.0, rows) is None
