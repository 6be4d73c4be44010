"""The pieces of training: what is predicted, how sparsity comes about, what learns, and the experiment on tiny Wan."""

import importlib.util
import json
import math
import re
import shlex
from pathlib import Path

import accelerate.commands.launch
import precompute_latents
import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from merge_gate import add_gates_to_merge, coarse_branch
from transformers import HfArgumentParser
from typer.testing import CliRunner
from vsa_evidence import app, plan
from vsa_training.averages import averages_in_place
from vsa_training.objective import add_noise, logit_normal_quantiles, shift_sigmas, velocity_error
from vsa_training.options import Options
from vsa_training.parameters import choose_trainable, is_gate, parameter_groups
from vsa_training.sparsity import SparsityRamp

from tiny_models import RECIPES, run
from vsa_diffusers import add_gate_compress, enable_vsa, load_vsa, set_top_k_ratio, video_sparse_attention
from vsa_diffusers.pipeline import enabled_config
from vsa_diffusers.tiles import TileGrid

ROOT = Path(__file__).parents[2]
TINY_WAN = ROOT / "examples" / "tiny_wan" / "transformer"
WAN = RECIPES[0]
GRID = (8, 16, 16)


def test_a_perfect_velocity_has_no_error_and_leads_back_to_the_data():
    clean, noise = torch.randn(2, 3, 4, 5, 6).unbind(0)
    sigmas = torch.tensor([0.0, 0.4, 1.0])
    noisy = add_noise(clean, noise, sigmas)
    assert noisy[0].equal(clean[0])
    assert noisy[2].equal(noise[2])
    torch.testing.assert_close(noisy[1] - 0.4 * (noise - clean)[1], clean[1])
    assert velocity_error(noise - clean, clean, noise).tolist() == [0, 0, 0]
    assert velocity_error(noise - clean + 2, clean, noise).tolist() == pytest.approx([4, 4, 4])


def test_noise_levels_are_those_of_the_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    expected = scheduler.sigmas.flip(0)
    torch.testing.assert_close(shift_sigmas(torch.linspace(0.001, 1, 1000), 3.0), expected, atol=1e-5, rtol=1e-5)
    quantiles = logit_normal_quantiles(torch.tensor([0.1587, 0.5, 0.8413]), shift=1.0)
    assert quantiles.tolist() == pytest.approx([1 / (1 + math.e), 0.5, 1 / (1 + 1 / math.e)], abs=1e-3)


def test_the_ramp_falls_in_stages_from_dense_to_the_target():
    ramp = SparsityRamp(0.2, steps=8, start=2, stages=4)
    ratios = [ramp.ratio(step) for step in range(12)]
    assert ratios == pytest.approx([1, 1, 1, 1, 0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2])
    assert SparsityRamp(0.2).ratio(0) == 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(target=0), "target=0 must be in (0, 1]"),
        (dict(target=0.5, steps=-1), "steps=-1 and start=0 must be 0 or more"),
        (dict(target=0.5, stages=0), "stages=0 at least 1"),
    ],
)
def test_a_ramp_that_makes_no_sense_is_told(arguments, message):
    with pytest.raises(ValueError) as error:
        SparsityRamp(**arguments)
    assert message in str(error.value)


def test_what_is_chosen_learns_at_its_own_rate():
    model = WAN.build()
    with pytest.raises(ValueError, match="what='gates' leaves nothing to train"):
        choose_trainable(model, "gates")
    with pytest.raises(ValueError, match="what='some' is unknown; choose one of 'all', 'attention', 'gates'"):
        choose_trainable(model, "some")
    add_gate_compress(model)
    choose_trainable(model, "attention")
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, _ in model.named_parameters() if ".attn1." in name}
    rest, gates = parameter_groups(model, lr=1.0, gate_lr=2.0)
    assert (rest["lr"], gates["lr"]) == (1.0, 2.0)
    assert len(gates["params"]) == 4
    assert {id(parameter) for parameter in gates["params"]} == {
        id(parameter) for name, parameter in model.named_parameters() if is_gate(name)
    }
    choose_trainable(model, "gates")
    assert len(parameter_groups(model, 1.0, 2.0)) == 1


def test_averages_are_in_place_for_a_while_only():
    from diffusers.training_utils import EMAModel

    model = torch.nn.Linear(1, 2, bias=False)
    parameter = model.weight
    ema = EMAModel([parameter], decay=0.5)
    parameter.data.fill_(4.0)
    ema.step([parameter])
    with averages_in_place(ema, model):
        inside = parameter.detach().clone()
    assert inside.equal(ema.shadow_params[0])
    assert parameter.tolist() == [[4.0], [4.0]]


@pytest.mark.parametrize("block_size", [(4, 4, 4), (2, 2, 4)])
def test_the_coarse_branch_of_the_experiment_is_that_of_the_package(block_size):
    shape = (4, 8, 8)
    query, key, value = torch.randn(3, 2, 256, 2, 16).unbind(0)
    expected = video_sparse_attention(query, key, value, shape, block_size=block_size, combine="sum")
    expected = expected - video_sparse_attention(query, key, value, shape, block_size=block_size, combine="sparse")
    actual = coarse_branch(query, key, value, TileGrid(shape, block_size))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="is not a whole number of tiles"):
        coarse_branch(query, key, value, TileGrid((4, 8, 8), (3, 4, 4)))


def with_gates_on_merge(model, ratio):
    add_gate_compress(model)
    add_gates_to_merge(enable_vsa(model, ratio, combine="merge"))
    return model


def test_merge_with_a_gate_begins_as_merge_and_follows_the_ratio():
    model, plain = with_gates_on_merge(WAN.build(), 0.3), WAN.build()
    enable_vsa(plain, 0.3, combine="merge")
    assert run(model, WAN, GRID).equal(run(plain, WAN, GRID))
    before = run(set_top_k_ratio(model, 0.6), WAN, GRID)
    assert before.equal(run(set_top_k_ratio(plain, 0.6), WAN, GRID))
    torch.nn.init.ones_(model.blocks[0].attn1.to_gate_compress.bias)
    assert not run(model, WAN, GRID).equal(before)


def test_gradients_reach_the_gates_of_the_experiment():
    model = with_gates_on_merge(WAN.build(), 0.3)
    output = model(**WAN.inputs(GRID), return_dict=False)[0]
    F.mse_loss(output, torch.zeros_like(output)).backward()
    assert model.blocks[1].attn1.to_gate_compress.weight.grad.abs().sum() > 0


def test_the_plan_begins_with_what_matters_most():
    runs = list(plan(["dense", "gate", "merge"], [0.125, 0.5], seeds=range(2), trainable="all"))
    assert runs[:5] == [
        ("dense", 1.0, 0), ("gate", 0.125, 0), ("merge", 0.125, 0), ("gate", 0.5, 0), ("merge", 0.5, 0),
    ]  # fmt: skip
    assert len(runs) == 10
    assert ("merge", 0.125, 0) not in plan(["dense", "gate", "merge"], [0.125], seeds=range(1), trainable="gates")


@pytest.mark.slow
def test_the_experiment_runs_and_goes_on(tmp_path):
    def invoke(*more):
        options = dict(
            latents=tmp_path / "latents", output=tmp_path / "evidence", clips=32, side=64, frames=13, held_out=1,
            levels=2, ratios="1,0.5", train_ratios="0.5", variants="dense,gate,merge_gate", seeds=1, steps=2,
            batch_size=1, device="cpu", optimizer="muon", dense_layers="0", block_size="2,2,2",
        )  # fmt: skip
        words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        return CliRunner().invoke(app, [*words, *more])

    first = invoke("--minutes=0.0001")
    assert first.exit_code == 75, first.output
    second = invoke("--keep")
    assert second.exit_code == 0, second.output
    path = tmp_path / "evidence" / "results.json"
    results = json.loads(path.read_text())
    assert list(results["runs"]) == ["dense-1-seed0", "gate-0.5-seed0", "merge_gate-0.5-seed0"]
    dense = results["untrained"]["dense"]["1"]
    assert results["untrained"]["merge"]["1"] == pytest.approx(dense, rel=1e-4)
    assert results["untrained"]["sparse"]["1"] == pytest.approx(dense, rel=1e-4)
    assert results["untrained"]["merge"]["0.5"] != pytest.approx(dense, rel=1e-3)
    assert results["runs"]["dense-1-seed0"]["losses"]["1"] != dense
    (tmp_path / "evidence" / "loss_by_ratio.png").unlink()
    assert invoke("--report-only").exit_code == 0
    assert (tmp_path / "evidence" / "loss_by_ratio.png").exists()
    kept = load_vsa(WanTransformer3DModel.from_pretrained(TINY_WAN), tmp_path / "evidence" / "gate-0.5-seed0")
    assert enabled_config(kept).top_k_ratio == 0.5
    assert enabled_config(kept).dense_layers == (0,)
    assert enabled_config(kept).block_size == (2, 2, 2)
    assert kept.blocks[1].attn1.to_gate_compress.weight.any()
    assert not kept.blocks[0].attn1.to_gate_compress.weight.any()
    assert invoke("--lr=0.1").exit_code == 2
    assert invoke("--variants=some").exit_code == 2
    assert invoke("--block-size=2,2").exit_code == 2
    # As written before these were options: they had their defaults then.
    for name in ("compile", "block_size"):
        del results["settings"][name]
    path.write_text(json.dumps(results))
    assert invoke("--report-only").exit_code == 0
    refused = invoke()
    assert refused.exit_code == 2
    assert "other values of block_size;" in refused.output
    assert invoke("--block-size=4,4,4").exit_code == 0


COMMANDS = re.findall(r"^accelerate launch(?:\\\n|.)*", (ROOT / "docs" / "training.md").read_text(), re.MULTILINE)
SCRIPTS = {"train_vsa.py": Options, "precompute_latents.py": precompute_latents.Options}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_training_page_have_options_that_exist(command):
    launcher, words = shlex.split(command.replace("\\\n", " ")), []
    while not launcher[-1].startswith("examples/"):
        words.insert(0, launcher.pop())
    [options] = HfArgumentParser(SCRIPTS[Path(launcher[-1]).name]).parse_args_into_dataclasses(words)
    assert options.pretrained_model_name_or_path.startswith("Wan-AI/")
    accelerate.commands.launch.launch_command_parser().parse_args(launcher[2:])


def test_the_training_page_has_commands():
    assert len(COMMANDS) == 5


def test_a_lora_without_peft_is_refused_with_what_installs_it(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "peft" else find(name, *more))
    Options("pipe", "latents", "training", rank=0)
    with pytest.raises(ImportError, match=r'needs peft; pip install "vsa_diffusers\[train\]"'):
        Options("pipe", "latents", "training", rank=4)
