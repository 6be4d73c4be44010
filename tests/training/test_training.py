"""`train_vsa.py`: it learns, goes on where it was killed, and what it leaves behind is loaded by `load_vsa`."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from vsa_training.objective import logit_normal_quantiles
from vsa_training.options import Options
from vsa_training.trainer import Trainer

from tiny_text_pipeline import tiny_pipeline
from training_material import precompute, training_options, write_videos
from vsa_diffusers import load_vsa
from vsa_diffusers.pipeline import enabled_config

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": f"{ROOT}:{ROOT / 'examples' / 'training'}", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
    "PYTHONFAULTHANDLER": "1",  # a process that aborts says where
}  # fmt: skip
CALL = dict(prompt="a red ring", height=64, width=96, num_frames=17, num_inference_steps=2, output_type="pt")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    write_videos(folder / "videos", 6)
    torch.manual_seed(0)
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder / "pipe")
    precompute(pipe, folder)
    return folder


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(options: Options, kind: type[Trainer] = Trainer) -> Trainer:
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = kind(options)
    trainer.train()
    return trainer


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_gate_model_learns(material, tmp_path):
    options = training_options(
        material, tmp_path, max_train_steps=40, learning_rate=3e-3, ramp_steps=10, validation_steps=20, use_ema=True,
        ema_decay=0.9,
    )  # fmt: skip
    trainer = train(options)
    curve = metrics(tmp_path)
    assert [line["step"] for line in curve] == list(range(1, 41))
    assert sum(line["loss"] for line in curve[-5:]) < 0.8 * sum(line["loss"] for line in curve[:5])
    held_out = [line["validation_loss"] for line in curve if "validation_loss" in line]
    assert len(held_out) == 2
    assert held_out[1] < 0.95 * held_out[0]
    assert all(block.attn1.to_gate_compress.weight.any() for block in trainer.transformer.blocks)


def test_the_ratio_falls_and_gates_have_their_own_rate(material, tmp_path):
    train(training_options(material, tmp_path, ramp_start=1, ramp_stages=2, lr_scheduler="constant"))
    curve = metrics(tmp_path)
    assert [line["top_k_ratio"] for line in curve] == pytest.approx([1.0, 1.0, 1.0, 0.65, 0.65, 0.3])
    assert {(line["lr"], line["gate_lr"]) for line in curve} == {(1e-3, 1e-2)}


KILLED = """
import os, signal
import torch
torch.set_num_threads(1)
from vsa_training.options import Options
from vsa_training.trainer import Trainer

class Killed(Trainer):
    def _log(self, report):
        super()._log(report)
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGKILL)

Killed(Options(**{options!r})).train()
"""


def kill(options: Options) -> None:
    """Train in another process until that is killed, after step 6."""
    command = [sys.executable, "-W", "ignore", "-c", KILLED.format(options=vars(options))]
    killed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


def interrupt(options: Options) -> None:
    """The same in this process."""

    class Interrupted(Trainer):
        def _log(self, report):
            super()._log(report)
            if self.step == 6:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(options, Interrupted)


@pytest.mark.parametrize(
    ("stop", "changes"),
    [
        (kill, dict(use_ema=True, gradient_accumulation_steps=2, optimizer="muon")),
        (interrupt, dict(rank=2, lora_dropout=0.2, lr_scheduler="cosine")),
    ],
    ids=["full, killed", "lora, interrupted"],
)
def test_a_stopped_training_goes_on_as_if_nothing_had_happened(material, tmp_path, stop, changes):
    def options(name):
        return training_options(material, tmp_path / name, max_train_steps=8, ramp_steps=6, **changes)

    straight = train(options("straight"))
    stop(options("stopped"))
    assert len(metrics(tmp_path / "stopped")) == 6
    assert [path.name for path in (tmp_path / "stopped").glob("checkpoint*")] == ["checkpoint-0000004"]
    with (tmp_path / "stopped" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 7, "lo')

    resumed = train(options("stopped"))
    assert metrics(tmp_path / "stopped") == [pytest.approx(line, rel=1e-5) for line in metrics(tmp_path / "straight")]
    for (name, value), other in zip(
        resumed.transformer.named_parameters(), straight.transformer.parameters(), strict=True
    ):
        torch.testing.assert_close(value, other, atol=1e-6, rtol=1e-5, msg=name)


def test_checkpoints_hold_no_pickle_and_old_ones_go(material, tmp_path):
    train(training_options(material, tmp_path, checkpointing_steps=2, checkpoints_total_limit=2, use_ema=True))
    assert [path.name for path in sorted(tmp_path.glob("checkpoint*"))] == ["checkpoint-0000004", "checkpoint-0000006"]
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".jsonl", ".safetensors"}


def test_a_checkpoint_of_another_training_is_refused(material, tmp_path):
    train(training_options(material, tmp_path, max_train_steps=4))
    changed = training_options(material, tmp_path, max_train_steps=4, top_k_ratio=0.5)
    with pytest.raises(ValueError, match=r"training with other options: \{'top_k_ratio': 0.3\}; go on with those"):
        train(changed)
    with pytest.raises(ValueError, match="'checkpoint-9' is no checkpoint; there are: checkpoint-0000004"):
        train(training_options(material, tmp_path, resume_from_checkpoint="checkpoint-9"))


@pytest.mark.parametrize(
    ("changes", "learns"),
    [
        (dict(), lambda name: True),
        (dict(rank=2), lambda name: False),
        (dict(combine="merge", trainable="attention"), lambda name: ".attn1." in name),
        (dict(trainable="gates"), lambda name: False),
    ],
    ids=["full", "lora", "merge", "gates"],
)
def test_the_result_comes_back_on_the_stock_pipeline(material, tmp_path, changes, learns):
    stock = diffusers.WanPipeline.from_pretrained(material / "pipe")
    before = {name: value.clone() for name, value in stock.transformer.state_dict().items()}
    trained = train(training_options(material, tmp_path, **changes)).transformer.eval()
    load_vsa(stock, tmp_path / "final")
    config = enabled_config(stock.transformer)
    assert (config.top_k_ratio, config.block_size) == (0.3, (1, 2, 2))

    pipe = diffusers.WanPipeline.from_pretrained(material / "pipe", transformer=trained)
    videos = [each(**CALL, generator=torch.Generator().manual_seed(0)).frames for each in (stock, pipe)]
    torch.testing.assert_close(*videos, atol=1e-5, rtol=0)
    after = stock.transformer.state_dict()
    changed = {name for name, value in before.items() if not after.get(name, value).equal(value)}
    assert all(learns(name) for name in changed)
    assert bool(changed) == any(map(learns, before))


def test_only_the_gates_of_sparse_layers_learn(material, tmp_path):
    trainer = train(training_options(material, tmp_path, trainable="gates", dense_layers=[0]))
    first, second = (block.attn1.to_gate_compress for block in trainer.transformer.blocks)
    assert not first.weight.any()
    assert second.weight.any()


def test_noise_levels_stay_within_their_bounds(material, tmp_path):
    trainer = Trainer(training_options(material, tmp_path, min_sigma=0.6, max_sigma=0.8, validation_sigmas=3))
    for sigmas in (trainer._draw_sigmas(200), trainer._judged_sigmas()):
        assert sigmas.min() >= 0.6
        assert sigmas.max() <= 0.8
        assert sigmas.unique().numel() == len(sigmas)
    everywhere = Trainer(training_options(material, tmp_path))._draw_sigmas(2000)
    expected = logit_normal_quantiles(torch.tensor([0.1, 0.5, 0.9]), shift=3.0)
    torch.testing.assert_close(everywhere.quantile(torch.tensor([0.1, 0.5, 0.9])), expected, atol=0.03, rtol=0)


def test_validation_videos_are_written(material, tmp_path):
    options = training_options(material, tmp_path, max_train_steps=4, validation_steps=4, num_inference_steps=2)
    options.validation_prompts = ["a red ring", "a small blue disc"]
    train(options)
    names = sorted(path.name for path in (tmp_path / "validation").iterdir())
    assert names == ["step-0000004-0.mp4", "step-0000004-1.mp4"]


def test_tensorboard_gets_the_metrics_of_every_step_once(material, tmp_path):
    pytest.importorskip("tensorboard", reason="runs with tensorboard installed: pip install '.[train]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = training_options(material, tmp_path, max_train_steps=7, report_to="tensorboard")
    interrupt(options)  # after step 6, and the last checkpoint is that of step 4
    train(options)
    events = EventAccumulator(str(tmp_path / "logs" / "vsa")).Reload()
    losses = [event.value for event in events.Scalars("loss")]
    assert losses == pytest.approx([line["loss"] for line in metrics(tmp_path)])


def test_gradient_checkpointing_changes_nothing(material, tmp_path):
    for name in ("kept", "recomputed"):
        train(training_options(material, tmp_path / name, gradient_checkpointing=name == "recomputed"))
    assert metrics(tmp_path / "recomputed") == [pytest.approx(line, rel=1e-4) for line in metrics(tmp_path / "kept")]


SHARDED = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "WanTransformerBlock",
}  # fmt: skip


def train_two_processes(options: Options, *, sharded: bool) -> None:
    given = [(name, value) for name, value in vars(options).items() if value is not None]
    words = [f"--{name}={value}" for name, value in given if not isinstance(value, list)]
    command = [
        sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        ROOT / "tests" / "support" / "accelerate_on_cpu.py", ROOT / "examples" / "training" / "train_vsa.py", *words,
        "--block_size", "1", "2", "2", "--dense_layers", "none",
    ]  # fmt: skip
    environment = ENVIRONMENT | (SHARDED if sharded else {})
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


on_processors = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="runs where PyTorch's FSDP runs on processors, as in 2.13"
)


@pytest.mark.parametrize(
    ("sharded", "rank", "optimizer"),
    [
        pytest.param(False, 0, "adamw", marks=pytest.mark.slow),
        pytest.param(True, 0, "muon", marks=[on_processors, pytest.mark.slow]),
        pytest.param(True, 4, "muon", marks=on_processors),
    ],
)
def test_two_processes_do_what_one_does_with_twice_the_batches(material, tmp_path, sharded, rank, optimizer):
    options = dict(train_batch_size=1, max_train_steps=5, validation_steps=2, use_ema=True, rank=rank)
    options |= dict(optimizer=optimizer)
    train(training_options(material, tmp_path / "one", gradient_accumulation_steps=2, **options))
    train_two_processes(training_options(material, tmp_path / "two", **options), sharded=sharded)
    assert metrics(tmp_path / "two") == [pytest.approx(line, rel=1e-4) for line in metrics(tmp_path / "one")]
    file = "pytorch_lora_weights.safetensors" if rank else "diffusion_pytorch_model.safetensors"
    one, two = (load_file(tmp_path / name / "final" / "transformer" / file) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=on_processors)], ids=["ddp", "fsdp"])
def test_two_processes_distil_as_one_does(material, tmp_path, sharded, rank):
    options = dict(train_batch_size=1, max_train_steps=5, validation_steps=5, rank=rank, combine="merge")
    options |= dict(objective="distill", distill_attention=0.1, optimizer="muon", ratio_schedule="0.8:0.3")
    train(training_options(material, tmp_path / "one", gradient_accumulation_steps=2, **options))
    train_two_processes(training_options(material, tmp_path / "two", **options), sharded=sharded)
    assert metrics(tmp_path / "two") == [pytest.approx(line, rel=1e-3) for line in metrics(tmp_path / "one")]


@pytest.mark.slow
@on_processors
def test_a_sharded_training_goes_on_as_if_nothing_had_happened(material, tmp_path):
    options = training_options(material, tmp_path / "run", train_batch_size=1, use_ema=True, optimizer="muon")
    train_two_processes(options, sharded=True)
    straight = metrics(tmp_path / "run")
    for left in ("checkpoint-0000006", "final"):
        (tmp_path / "run" / left).rename(tmp_path / left)
    train_two_processes(options, sharded=True)
    assert metrics(tmp_path / "run") == [pytest.approx(line, rel=1e-5) for line in straight]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(max_train_steps=0), "max_train_steps=0 must be at least 1"),
        (dict(ramp_steps=7), "end after max_train_steps=6; the target ratio would never be trained"),
        (dict(min_sigma=0.9, max_sigma=0.5), "min_sigma=0.9 and max_sigma=0.5 must be in 0 to 1, in order"),
        (dict(rank=4, trainable="gates"), "rank=4 trains a LoRA and gates; trainable='gates' is for rank=0"),
        (dict(combine="merge", trainable="gates"), 'trainable="gates" needs combine="gate"'),
        (dict(validation_shards=3), "has 3 shards, and validation_shards=3 leaves none to train on"),
        (dict(lora_target="to_x", rank=1), "lora_target='to_x' names ['to_x'], but WanTransformer3DModel has no such"),
        (dict(data_dir="/nowhere"), "has no dataset.json; make the shards with precompute_latents.py"),
        (dict(top_k_ratio=1.5), "top_k_ratio=1.5 must be in (0, 1]"),
        (dict(dense_layers=[5]), "dense_layers=(5,) names layer 5, but there are 2 video"),
    ],
)
def test_wrong_options_are_told(material, tmp_path, changes, message):
    with pytest.raises(ValueError) as error:
        Trainer(training_options(material, tmp_path, **changes))
    assert message in str(error.value)
