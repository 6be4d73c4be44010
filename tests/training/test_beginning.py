"""How a training begins: with defaults that work together, with what it says, with a refusal, or longer than before."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import train_vsa
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from transformers import HfArgumentParser
from vsa_training.command_line import run_script
from vsa_training.options import Options
from vsa_training.trainer import Trainer

from training_material import random_material, training_options

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """As `precompute_latents.py` leaves it by default: latents in fp16, text embeddings in bf16."""
    return random_material(tmp_path_factory.mktemp("material"), layers=4, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def begin(material, output, *words) -> None:
    """What the command line does."""
    given = [f"--pretrained_model_name_or_path={material / 'pipe'}", f"--data_dir={material / 'latents'}"]
    parser = HfArgumentParser(Options)
    [options] = parser.parse_args_into_dataclasses([*given, f"--output_dir={output}", *words])
    AcceleratorState._reset_state(reset_partial_state=True)
    train_vsa.begin(options)()


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def by_default(material, tmp_path_factory):
    """The folder of a training with all defaults, but for its length and the workers."""
    folder = tmp_path_factory.mktemp("by default")
    begin(material, folder, "--max_train_steps=20", "--gradient_accumulation_steps=2", "--dataloader_num_workers=0")
    return folder


def test_the_defaults_train_from_what_is_precomputed_by_default(by_default):
    curve = metrics(by_default)
    assert [line["step"] for line in curve] == list(range(1, 21))
    assert max(line["lr"] for line in curve) == pytest.approx(2e-4)
    assert {line["top_k_ratio"] for line in curve} == {0.125}
    assert curve[-1]["validation_loss"] > 0
    config = json.loads((by_default / "final" / "vsa_config.json").read_text())
    assert (config["combine"], config["dense_layers"], config["block_size"]) == ("merge", [0, -1], [4, 4, 4])


def test_the_recipe_of_the_training_page_is_the_default():
    [recipe] = re.findall(r"\*\*The recipe\*\*: (.*?)\n\n", PAGE, re.DOTALL)
    recipe = " ".join(recipe.split())
    options = Options("pipe", "latents", "training")
    assert recipe.startswith(
        "merge by quarters, first and last layer dense, all weights trained, Muon at 2e-4 with a cosine, no ramp, 600 "
        "steps of 8 clips, "
    )
    assert "For a real grid that is (4, 4, 4)" in recipe
    assert (options.combine, options.selection, options.dense_layers) == ("merge", "auto", [0, -1])
    assert (options.trainable, options.rank, options.optimizer) == ("all", 0, "muon")
    assert (options.learning_rate, options.lr_scheduler, options.warmup_steps) == (2e-4, "cosine", 600 // 20)
    assert (options.ramp_start, options.ramp_steps, options.max_train_steps) == (0, 0, 600)
    assert options.train_batch_size * options.gradient_accumulation_steps == 8
    assert (options.block_size, options.top_k_ratio) == ([4, 4, 4], 0.125)


def test_the_training_page_shows_what_a_training_by_default_says(material, tmp_path, capsys):
    Trainer(Options(str(material / "pipe"), str(material / "latents"), str(tmp_path)))
    [shown] = re.findall(r"```\n(Trains .*?)```", PAGE, re.DOTALL)
    assert capsys.readouterr().out.replace(str(tmp_path), "training") == shown


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(), "Trains all weights and gates (16,640): 207,312 of 207,312 parameters of Wan"),
        (dict(rank=2, combine="merge"), "Trains a LoRA of rank 2 (4,096): 4,096 of 194,768"),
        (dict(trainable="gates"), "Trains gates: 16,640 of 2"),
        (dict(trainable="attention", dense_layers=[0]), "Trains video self-attention and gates (12,480): "),
        (dict(dense_layers=[0, -1]), "Sparse: 2 of 4 video self-attention layers (dense: 0, 3), top_k_ratio 0.3"),
        (dict(), "falling from 1 over steps 0 to 4, blocks of 1 x 2 x 2, combine gate, selection mean."),
        (
            dict(combine="merge", ramp_steps=0),
            "top_k_ratio 0.3, blocks of 1 x 2 x 2, combine merge, selection quarters.",
        ),
        (dict(), "Data: 4 clips (2 held out) of 13 frames at 64 x 64, latents [1, 4, 4, 8, 8]."),
        (
            dict(gradient_accumulation_steps=3),
            "Steps: 6 of 6 clips (batches of 2, 1 process, 3 batches a step), no mixed",
        ),
        (dict(), "AdamW, learning rate 0.001, gates 0.01, constant_with_warmup after 2 steps of warm-up."),
        (dict(), "Begins anew in "),
    ],
)
def test_a_training_says_what_it_does(material, tmp_path, capsys, changes, told):
    Trainer(training_options(material, tmp_path, **changes))
    assert capsys.readouterr().out.count(told) == 1


def test_a_finished_training_goes_on_with_more_steps(material, tmp_path, capsys):
    def trained(steps):
        AcceleratorState._reset_state(reset_partial_state=True)
        options = dict(lr_scheduler="cosine", max_train_steps=steps, ramp_steps=0, validation_steps=100)
        Trainer(training_options(material, tmp_path, **options)).train()
        return capsys.readouterr().out

    trained(8)
    assert f"Resumes from {tmp_path / 'checkpoint-0000008'} at step 8 of 8. All steps are done" in trained(8)
    assert len(metrics(tmp_path)) == 8
    told = trained(16)
    assert (
        "at step 8 of 16. It was meant to have 8 steps: the learning rates go from 0 to 0.389 of their highest" in told
    )
    curve = metrics(tmp_path)
    assert [line["step"] for line in curve] == list(range(1, 17))
    rates = [line["lr"] for line in curve]
    assert rates[7] < rates[8] < rates[9] > rates[10] > rates[15]
    with pytest.raises(ValueError, match="has 16 steps, more than max_train_steps=12; ask for more"):
        trained(12)


WRONG = [
    (["--max_train_steps=0"], "max_train_steps=0 must be at least 1."),
    (["--learning_rate=nan"], "learning_rate=nan must be a positive number."),
    (["--learning_rate=-1"], "learning_rate=-1.0 must be a positive number."),
    (["--top_k_ratio=0"], "top_k_ratio=0.0 must be in (0, 1]"),
    (["--block_size", "4", "4"], "block_size=[4, 4] must be three numbers"),
    (["--dense_layers", "first"], "dense_layers=['first'] must be whole numbers, such as 0 -1, or none."),
    (["--dense_layers", "0", "1", "2", "3"], "dense_layers=[0, 1, 2, 3] leaves none of the 4 video self-attention"),
    (["--lr_warmup_steps=600"], "lr_warmup_steps=600 must be less than max_train_steps=600."),
    (["--checkpoints_total_limit=0"], "checkpoints_total_limit=0 must be at least 1."),
    (["--data_dir=nowhere"], "nowhere has no dataset.json"),
    (["--pretrained_model_name_or_path=/no/where"], "'/no/where' is neither a directory nor a repository's name"),
    (["--subfolder=transformer_2"], "has no transformer_2/; there are: transformer."),
    (["--resume_from_checkpoint=checkpoint-7"], "resume_from_checkpoint='checkpoint-7' is no checkpoint"),
    (["--validation_shards=3"], "validation_shards=3 leaves none to train on"),
    (["--trainable=gates"], 'trainable="gates" needs combine="gate"'),
]


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_wrong_options_end_with_one_sentence_and_status_2(material, tmp_path, monkeypatch, capsys, words, message):
    given = [f"--pretrained_model_name_or_path={material / 'pipe'}", f"--data_dir={material / 'latents'}"]
    monkeypatch.setattr(sys, "argv", ["train_vsa.py", *given, f"--output_dir={tmp_path}", *words])
    with pytest.raises(SystemExit) as ended:
        run_script(Options, train_vsa.begin, "")
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in told
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_muon_is_not_trained_in_fp16(material, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    with pytest.raises(ValueError, match="optimizer=muon is two optimisers, for which fp16 cannot scale gradients"):
        Trainer(training_options(material, tmp_path, optimizer="muon"))
    assert len(Trainer(training_options(material, tmp_path, optimizer="muon", rank=2)).optimizers) == 1


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_ends_the_training_before_it_is_saved(material, tmp_path, what):
    class Poisoned(Trainer):
        def _losses(self, batch, turn):
            loss = super()._losses(batch, turn)["loss"]
            if self.step == 3 and what == "loss":
                return {"loss": loss * float("nan")}
            if self.step == 3:
                loss.register_hook(lambda gradient: gradient * float("inf"))
            return {"loss": loss}

    with pytest.raises(RuntimeError, match=r"at step 4; lower learning_rate .* go on from the last checkpoint"):
        Poisoned(training_options(material, tmp_path, checkpointing_steps=2)).train()
    assert [path.name for path in tmp_path.glob("checkpoint*")] == ["checkpoint-0000002"]


def test_an_output_folder_that_is_none_is_told_at_the_start(material, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    given = [f"--pretrained_model_name_or_path={material / 'pipe'}", f"--data_dir={material / 'latents'}"]
    monkeypatch.setattr(sys, "argv", ["train_vsa.py", *given, f"--output_dir={tmp_path / 'file'}"])
    with pytest.raises(SystemExit, match="2"):
        run_script(Options, train_vsa.begin, "")
    assert f"File exists: '{tmp_path / 'file'}'" in capsys.readouterr().err


def test_a_fault_of_the_script_keeps_its_traceback(monkeypatch):
    def fail():
        raise ValueError("in the middle of the training")

    words = ["train_vsa.py", "--pretrained_model_name_or_path=a", "--data_dir=b", "--output_dir=c"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(ValueError, match="in the middle"):
        run_script(Options, lambda options: fail, "")


def test_damaged_shards_are_named(material, tmp_path):
    random_material(tmp_path / "damaged", layers=4)
    latents = tmp_path / "damaged" / "latents"
    shard = latents / "000001.safetensors"
    whole = shard.read_bytes()
    options = training_options(material, tmp_path / "run", data_dir=str(latents))
    for content in (b"", whole[:100], whole[:-10], b"x" * len(whole)):
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=r"000001.safetensors is damaged or no shard .*; remove it, and run"):
            Trainer(options)
    shard.write_bytes(whole[:-8] + bytes(8))
    trainer = Trainer(options)
    with pytest.raises(ValueError, match=r"000001.safetensors is damaged: sample [01] is not what was written"):
        [trainer.shards[index] for index in range(len(trainer.shards))]
