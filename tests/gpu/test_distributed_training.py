"""Training spread over two GPUs does what one GPU does with twice the batches."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vsa_training.dataset import Sample, write_shard
from vsa_training.description import Description

from tiny_models import RECIPES
from vsa_diffusers import load_vsa

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="runs on a machine with two GPUs"),
]
ROOT = Path(__file__).parents[2]
SPREAD = {
    "one": ["--num_processes=1"],
    "ddp": ["--num_processes=2", "--multi_gpu"],
    "fsdp": [
        "--num_processes=2", "--use_fsdp", "--fsdp_version=2", "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP",
        "--fsdp_transformer_layer_cls_to_wrap=WanTransformerBlock",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A tiny transformer, and shards of random latents for it."""
    folder = tmp_path_factory.mktemp("material")
    RECIPES[0].build().save_pretrained(folder / "pipe" / "transformer")
    latents = folder / "latents"
    latents.mkdir()
    torch.manual_seed(0)
    for shard in range(3):
        samples = [
            Sample(torch.randn(1, 4, 8, 16, 16).half(), torch.ones(1), None, {"encoder_hidden_states": text})
            for text in torch.randn(4, 1, 8, 16)
        ]
        write_shard(latents / f"{shard:06d}.safetensors", samples)
    Description("WanPipeline", "WanTransformer3DModel", 1, 3.0, 128, 128, 29, 16).save(latents)
    return folder


def train(material: Path, output: Path, spread: str, *more: str) -> list[dict]:
    """The metrics of a training, launched as a user would."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_machines=1", "--mixed_precision=no",
        "--dynamo_backend=no", "--main_process_port=0", *SPREAD[spread],
        str(ROOT / "examples" / "training" / "train_vsa.py"),
        f"--pretrained_model_name_or_path={material / 'pipe'}", f"--data_dir={material / 'latents'}",
        f"--output_dir={output}", "--max_train_steps=8", "--lr_warmup_steps=2", "--learning_rate=1e-3",
        "--lr_scheduler=constant_with_warmup", "--optimizer=adamw", "--combine=gate", "--dense_layers=none",
        "--ramp_steps=4", "--top_k_ratio=0.3", "--use_ema", "--checkpointing_steps=4", "--validation_steps=4",
        f"--gradient_accumulation_steps={2 if spread == 'one' else 1}", *more,
    ]  # fmt: skip
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "more", [(), ("--rank=4",), ("--objective=distill", "--distill_attention=0.1")], ids=["full", "lora", "distilled"]
)
@pytest.mark.parametrize("spread", ["ddp", "fsdp"])
def test_two_gpus_train_as_one_does(material, tmp_path, spread, more):
    one = train(material, tmp_path / "one", "one", *more)
    two = train(material, tmp_path / "two", spread, *more)
    assert two == [pytest.approx(line, rel=5e-3) for line in one]
    file = "pytorch_lora_weights.safetensors" if "--rank=4" in more else "diffusion_pytorch_model.safetensors"
    weights = [load_file(tmp_path / name / "final" / "transformer" / file) for name in ("one", "two")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=2e-3, rtol=2e-2, msg=name)
    load_vsa(RECIPES[0].build(), tmp_path / "two" / "final")


def test_a_sharded_training_goes_on_as_if_nothing_had_happened(material, tmp_path):
    straight = train(material, tmp_path / "run", "fsdp")
    for left in ("checkpoint-0000008", "final"):
        (tmp_path / "run" / left).rename(tmp_path / left)
    assert train(material, tmp_path / "run", "fsdp") == [pytest.approx(line, rel=1e-4) for line in straight]
