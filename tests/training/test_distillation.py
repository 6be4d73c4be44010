"""`--objective distill`: the dense model is the teacher, and the sparse one comes to do what it does."""

import json
import re
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from vsa_training.dataset import collate
from vsa_training.options import Options
from vsa_training.sparsity import SparsityRamp
from vsa_training.trainer import Trainer
from vsa_training.validation import predict

from tiny_models import RECIPES
from training_material import random_material, training_options

# Ways to train, and whether a LoRA or gates alone leave all of the dense model's parameters as they are.
WAYS = {
    "full": (dict(combine="merge"), False),
    "attention": (dict(combine="merge", trainable="attention"), False),
    "lora": (dict(combine="merge", rank=2), True),
    "gates": (dict(trainable="gates"), True),
}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = random_material(tmp_path_factory.mktemp("material"))
    # Whose attention is far from uniform, so that it matters what tiles are left out.
    RECIPES[0].build().save_pretrained(folder / "pipe" / "transformer")
    return folder


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    _reset()
    yield
    _reset()


def _reset() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def begin(material: Path, output: Path, **changes) -> Trainer:
    _reset()
    options = dict(objective="distill", ramp_steps=0, validation_shards=0) | changes
    return Trainer(training_options(material, output, **options))


def train(material: Path, output: Path, **changes) -> Trainer:
    trainer = begin(material, output, **changes)
    trainer.train()
    return trainer


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def batch_of(trainer: Trainer):
    return collate([trainer.shards[0], trainer.shards[1]]).to(trainer.accelerator.device, torch.float32)


@torch.no_grad()
def predicted(trainer: Trainer, model: torch.nn.Module) -> torch.Tensor:
    batch = batch_of(trainer)
    noisy = torch.randn(batch.clean.shape, generator=torch.Generator().manual_seed(0))
    with trainer.accelerator.autocast():
        return predict(model, batch, noisy, torch.full((len(noisy),), 0.5), trainer.description.channel_axis)


@pytest.mark.parametrize(("changes", "shares"), WAYS.values(), ids=WAYS.keys())
def test_the_teacher_is_the_dense_model_to_the_last_bit_also_after_training(material, tmp_path, changes, shares):
    dense = diffusers.WanTransformer3DModel.from_pretrained(material / "pipe", subfolder="transformer").eval()
    trainer = begin(material, tmp_path, max_train_steps=3, lr_warmup_steps=0, **changes)
    teacher = trainer.distillation.teacher
    assert predicted(trainer, teacher).equal(predicted(trainer, dense))
    student = {id(parameter) for parameter in trainer.transformer.parameters()}
    assert all(id(parameter) in student for parameter in teacher.parameters()) == shares
    before = predicted(trainer, trainer.transformer.eval())
    trainer.train()
    assert not predicted(trainer, trainer.transformer.eval()).equal(before)
    assert predicted(trainer, teacher).equal(predicted(trainer, dense))


def test_what_does_not_learn_is_not_held_twice(material, tmp_path):
    held = {name: begin(material, tmp_path, **changes).held_twice for name, (changes, _) in WAYS.items()}
    assert held["lora"] == held["gates"] == 0 < held["attention"] < held["full"]


def test_in_16_bits_the_teacher_is_the_dense_model_in_16_bits(material, tmp_path):
    trainer = begin(material, tmp_path, mixed_precision="bf16", combine="merge")
    dense = diffusers.WanTransformer3DModel.from_pretrained(
        material / "pipe", subfolder="transformer", dtype=torch.bfloat16
    )
    teacher = trainer.distillation.teacher
    assert predicted(trainer, teacher).equal(predicted(trainer, dense.eval()))
    assert {name: value.dtype for name, value in teacher.named_parameters()} == {
        name: value.dtype for name, value in dense.named_parameters()
    }
    trainer.train()
    assert all(value.dtype == torch.float32 for value in trainer.transformer.parameters())


def test_in_16_bits_what_the_result_keeps_of_the_model_is_not_rounded(material, tmp_path):
    dense = diffusers.WanTransformer3DModel.from_pretrained(material / "pipe", subfolder="transformer")
    options = dict(mixed_precision="bf16", combine="merge", trainable="attention")
    trainer = train(material, tmp_path, max_train_steps=1, lr_warmup_steps=0, **options)
    weights = dict(dense.named_parameters())
    for name, value in trainer.transformer.named_parameters():
        assert value.dtype == torch.float32, name
        assert value.requires_grad or value.equal(weights[name]), name


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_with_all_tiles_and_without_gates_there_is_nothing_to_learn(material, tmp_path, weight):
    options = dict(combine="merge", top_k_ratio=1.0, distill_attention=weight, lr_scheduler="constant")
    train(material, tmp_path / "all", max_train_steps=1, **options)
    train(material, tmp_path / "some", max_train_steps=1, **options | dict(top_k_ratio=0.3))
    [everything], [some] = (metrics(tmp_path / name) for name in ("all", "some"))
    assert everything["loss"] < 1e-9
    assert some["loss"] > 1e-6


@pytest.mark.parametrize(("changes", "shares"), WAYS.values(), ids=WAYS.keys())
def test_gradients_are_where_something_is_trained_and_nowhere_else(material, tmp_path, changes, shares):
    trainer = begin(material, tmp_path, distill_attention=0.1, **changes)
    for name, parameter in trainer.transformer.named_parameters():
        if "lora_B" in name:  # zero at first, so that nothing reaches lora_A
            torch.nn.init.normal_(parameter, std=0.1)
    trainer._losses(batch_of(trainer), 0)["loss"].backward()
    learns = {name: parameter.requires_grad for name, parameter in trainer.transformer.named_parameters()}
    reached = {name: parameter.grad is not None for name, parameter in trainer.transformer.named_parameters()}
    assert reached == learns
    assert any(parameter.grad.any() for parameter in trainer.transformer.parameters() if parameter.requires_grad)
    own = {id(parameter) for parameter in trainer.transformer.parameters()}
    teacher = [parameter for parameter in trainer.distillation.teacher.parameters() if id(parameter) not in own]
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher)


def test_the_loss_is_the_distance_to_the_teacher_and_that_of_every_sparse_layers_attention(material, tmp_path):
    trainer = begin(material, tmp_path, combine="merge", distill_attention=0.25, dense_layers=[0])
    losses = trainer._losses(batch_of(trainer), 0)
    assert losses["loss"].item() == pytest.approx((losses["output_loss"] + 0.25 * losses["attention_loss"]).item())

    outputs = {}
    for name, model in (("student", trainer.transformer), ("teacher", trainer.distillation.teacher)):
        model.blocks[1].attn1.register_forward_hook(lambda *call, name=name: outputs.setdefault(name, call[2]))
    losses = trainer._losses(batch_of(trainer), 0)
    found, expected = outputs["student"].double(), outputs["teacher"].double()
    relative = (found - expected).square().mean() / expected.square().mean()
    assert losses["attention_loss"].item() == pytest.approx(relative.item(), rel=1e-4)


@pytest.mark.parametrize("way", ["full", "lora", "gates"])
def test_steps_on_a_batch_bring_the_sparse_model_nearer_to_the_dense_one(material, tmp_path, way):
    trainer = begin(material, tmp_path, distill_attention=0.1, top_k_ratio=0.1, **WAYS[way][0])
    batch = batch_of(trainer)
    learning = [parameter for parameter in trainer.transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=3e-4 if way == "full" else 1e-2)
    before = trainer._losses(batch, 0)
    for _ in range(30):
        optimizer.zero_grad()
        trainer._losses(batch, 0)["loss"].backward()
        optimizer.step()
    after = trainer._losses(batch, 0)
    assert all(after[name] < 0.9 * before[name] for name in ("loss", "output_loss", "attention_loss"))


@pytest.mark.parametrize(
    "changes", [dict(combine="merge", use_ema=True, ratio_schedule="0.8:0.3"), dict(rank=2, lora_dropout=0.2)],
    ids=["full", "lora"],
)  # fmt: skip
def test_a_stopped_distillation_goes_on_as_if_nothing_had_happened(material, tmp_path, changes):
    class Stopped(Trainer):
        def _log(self, report):
            super()._log(report)
            if self.step == 6:
                raise KeyboardInterrupt

    changes = dict(max_train_steps=8, ramp_steps=6, distill_attention=0.1, objective="distill") | changes
    straight = train(material, tmp_path / "straight", **changes)
    _reset()
    with pytest.raises(KeyboardInterrupt):
        Stopped(training_options(material, tmp_path / "stopped", **changes | dict(validation_shards=0))).train()
    resumed = train(material, tmp_path / "stopped", **changes)
    assert resumed.resumed.name == "checkpoint-0000004"
    assert metrics(tmp_path / "stopped") == [pytest.approx(line, rel=1e-5) for line in metrics(tmp_path / "straight")]
    for value, other in zip(resumed.transformer.parameters(), straight.transformer.parameters(), strict=True):
        torch.testing.assert_close(value, other, atol=1e-6, rtol=1e-5)


def test_another_teacher_is_another_training(material, tmp_path):
    options = dict(combine="merge", max_train_steps=4)
    train(material, tmp_path / "run", **options)
    other = diffusers.WanTransformer3DModel.from_pretrained(material / "pipe", subfolder="transformer")
    torch.nn.init.ones_(other.proj_out.bias)
    other.save_pretrained(tmp_path / "other" / "transformer")
    with pytest.raises(ValueError, match=r"training with other options: \{'teacher': '\w+'\}; go on with those"):
        begin(material, tmp_path / "run", pretrained_model_name_or_path=str(tmp_path / "other"), **options)


def test_gradient_checkpointing_changes_nothing(material, tmp_path):
    for name in ("kept", "recomputed"):
        train(
            material, tmp_path / name, combine="merge", distill_attention=0.1, max_train_steps=3,
            gradient_checkpointing=name == "recomputed",
        )  # fmt: skip
    assert metrics(tmp_path / "recomputed") == [pytest.approx(line, rel=1e-4) for line in metrics(tmp_path / "kept")]


def test_annealing_falls_from_the_first_ratio_to_the_last_and_stays_there(material, tmp_path):
    ramp = SparsityRamp(0.125, steps=300, stages=10, first=0.5)
    ratios = [ramp.ratio(step) for step in range(600)]
    assert ratios == sorted(ratios, reverse=True)
    assert [ratios[step] for step in (0, 29, 299)] == pytest.approx([0.5, 0.5, 0.1625])
    assert ratios[300] == ratios[599] == 0.125
    assert len(set(ratios)) == 11
    train(material, tmp_path, ratio_schedule="0.8:0.3", ramp_start=1, ramp_steps=4, ramp_stages=2)
    assert [line["top_k_ratio"] for line in metrics(tmp_path)] == pytest.approx([0.8, 0.8, 0.8, 0.55, 0.55, 0.3])


TOLD = [
    (
        dict(combine="merge"),
        r"Distils: matches the dense model's output; 1\d\d,\d{3} of its parameters are held twice.",
    ),
    (
        dict(rank=2, combine="merge", distill_attention=0.1),
        r"Distils: matches the dense model's output, and 2 layers' attention outputs \(weight 0.1\); nothing is held",
    ),
    (dict(ratio_schedule="0.8:0.3", ramp_steps=4), r"top_k_ratio 0.3, falling from 0.8 over steps 0 to 4, blocks"),
]


@pytest.mark.parametrize(("changes", "told"), TOLD)
def test_a_distillation_says_what_it_does(material, tmp_path, capsys, changes, told):
    begin(material, tmp_path, **changes)
    assert len(re.findall(told, capsys.readouterr().out)) == 1


def test_fsdp_of_the_first_kind_is_refused(material, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    monkeypatch.setattr(Accelerator, "is_fsdp2", False)
    with pytest.raises(ValueError, match=r'objective="distill" shards its teacher .* launch with --fsdp_version=2'):
        begin(material, tmp_path)


def test_diffusion_says_nothing_of_a_teacher(material, tmp_path, capsys):
    assert begin(material, tmp_path, objective="diffusion").teacher is None
    assert "Distils" not in capsys.readouterr().out


WRONG = [
    (dict(objective="copy"), "objective='copy' is unknown; choose one of diffusion, distill."),
    (dict(distill_attention=0.1), "distill_attention=0.1 needs objective=\"distill\"; objective='diffusion' has no"),
    (dict(objective="distill", distill_attention=-1.0), "distill_attention=-1.0 must be 0 or more."),
    (dict(objective="distill", distill_attention=float("nan")), "distill_attention=nan must be 0 or more."),
    (dict(ratio_schedule="0.5"), "ratio_schedule='0.5' must be two ratios in (0, 1] that fall, such as 0.5:0.125."),
    (dict(ratio_schedule="0.1:0.5"), "ratio_schedule='0.1:0.5' must be two ratios"),
    (dict(ratio_schedule="2:0.125"), "ratio_schedule='2:0.125' must be two ratios"),
    (dict(ratio_schedule="nan:0.125"), "ratio_schedule='nan:0.125' must be two ratios"),
    (dict(ratio_schedule="0.5:0.2", ramp_steps=9), "ratio_schedule='0.5:0.2' ends at 0.2, but top_k_ratio=0.125 is"),
    (dict(ratio_schedule="0.5:0.125"), "ratio_schedule='0.5:0.125' needs ramp_steps, the steps in which the ratio"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_options_are_told_by_name(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Options("pipe", "latents", "training", **changes)
