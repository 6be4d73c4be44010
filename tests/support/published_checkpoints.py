"""Tiny random checkpoints in the layouts of published ones, and folders as the hub's cache and the hub itself are."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from tiny_models import RECIPES
from vsa_diffusers import add_gate_compress
from vsa_diffusers.models import find_family

BY_NAME = {recipe.name: recipe for recipe in RECIPES}
CONTRACT = {
    "schema_version": "fasth3-inference-contract-v1", "dmd_denoising_steps": [999, 874, 749, 624, 500, 375, 250, 125],
    "transformer_forwards": 8, "video_scheduler_shift": 10.0, "audio_scheduler_shift": 3.0, "guidance_scale": 1.0,
    "attention_backend": "VIDEO_SPARSE_ATTN_H3", "vsa_sparsity": 0.8, "vsa_tile_size": 64, "task": "t2av",
}  # fmt: skip
MIXED = (
    (r"attn1\.(to_[qkv]|norm_[qk])\.", r"\1."),
    (r"attn1\.to_out\.0\.", "to_out."),
    (r"attn2\.to_out\.0\.", "attn2.to_out."),
    (r"ffn\.net\.0\.proj\.", "ffn.fc_in."),
    (r"ffn\.net\.2\.", "ffn.fc_out."),
)
NATIVE = (
    (r"attn([12])\.to_([qkv])\.", r"attn\1.\2."),
    (r"attn([12])\.to_out\.0\.", r"attn\1.o."),
    (r"attn1\.", "self_attn."),
    (r"attn2\.", "cross_attn."),
    (r"ffn\.net\.0\.proj\.", "ffn.0."),
    (r"ffn\.net\.2\.", "ffn.2."),
    (r"\.norm2\.", ".norm3."),
    (r"^proj_out\.", "head.head."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"\.scale_shift_table$", ".modulation"),
    (r"^condition_embedder\.(time|text)_embedder\.linear_1\.", r"\1_embedding.0."),
    (r"^condition_embedder\.(time|text)_embedder\.linear_2\.", r"\1_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
)
ON_BLOCK = (r"attn1\.to_gate_compress\.", "to_gate_compress.")


def trained(name: str, seed: int = 5) -> torch.nn.Module:
    """A model whose weights are all others than the recipe's, with gates."""
    model = BY_NAME[name].build()
    torch.manual_seed(seed)
    add_gate_compress(model)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    for attn in find_family(model).video_modules(model).values():
        torch.nn.init.normal_(attn.to_gate_compress.weight, std=0.3)
    return model


def renamed(state, *rules, prefix: str = "") -> dict[str, torch.Tensor]:
    """The same tensors under other names."""
    named = {}
    for key, tensor in state.items():
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        named[prefix + key] = tensor.detach().clone().contiguous()
    return named


def write_shards(tensors, folder: Path, count: int = 3, index: bool = True) -> None:
    """In so many files, gates in the last, with or without an index."""
    folder.mkdir(parents=True, exist_ok=True)
    gates = [key for key in tensors if "to_gate_compress" in key]
    others = [key for key in tensors if key not in gates]
    parts = [others[n :: count - 1] for n in range(count - 1)] + [gates]
    names = [f"diffusion_pytorch_model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    for name, keys in zip(names, parts, strict=True):
        save_file({key: tensors[key] for key in keys}, folder / name, metadata={"format": "pt"})
    if index:
        files = {key: name for name, keys in zip(names, parts, strict=True) for key in keys}
        content = {"metadata": {"total_size": 1}, "weight_map": files}
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(content))


def write_wan(folder: Path, layout: str = "diffusers", prefix: str = "", index: bool = True, seed: int = 5):
    """FastVideo's Wan: gates on the block, with the names of `layout`; returns the model that it is of."""
    model = trained("wan", seed)
    rules = {"diffusers": [ON_BLOCK], "mixed": [ON_BLOCK, *MIXED], "native": NATIVE}[layout]
    write_shards(renamed(model.state_dict(), *rules, prefix=prefix), folder / "transformer", index=index)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanDMDPipeline"}))
    write_others(folder)
    return model


def write_fasth3(folder: Path, contract: dict | None = None):
    """FastVideo's MiniMax-H3: a tree of diffusers' names, and perhaps a contract file."""
    model = trained("minimax-h3")
    write_shards(renamed(model.state_dict()), folder / "transformer")
    model.save_config(folder / "transformer")
    (folder / "modular_model_index.json").write_text("{}")
    if contract is not None:
        (folder / "fastvideo_inference.json").write_text(json.dumps(contract))
    write_others(folder)
    return model


def write_others(folder: Path) -> None:
    """What no loader of a transformer has to fetch."""
    for name in ("text_encoder", "vae"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        save_file({"weight": torch.zeros(1)}, folder / name / "model.safetensors")


def write_fasth3_lora(folder: Path, base: torch.nn.Module, gates: bool = True, change=None, **metadata):
    """FastH3's adapter for a model; returns what the merged weights and the gates are."""
    torch.manual_seed(6)
    tensors: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    state = base.state_dict()
    for key, weight in state.items():
        module, _, _ = key.rpartition(".")
        if re.search(r"\.(to_[qkv]|to_out\.0|ff\.net\.0\.proj|ff\.net\.2)\.weight$", key):
            a, b = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            expected[key] = weight + b @ a
        if re.search(r"(norm\d?|^proj_in|ff\.net\.2)\.weight$", key):
            tensors[f"{module}.diff"] = torch.randn_like(weight)
            expected[key] = expected.get(key, weight) + tensors[f"{module}.diff"]
        if key == "proj_in.bias":
            tensors[f"{module}.diff_b"] = torch.randn_like(weight)
            expected[key] = weight + tensors[f"{module}.diff_b"]
    blocks = len(base.transformer_blocks)
    for n in range(blocks if gates else 0):
        gate = f"transformer_blocks.{n}.attn.to_gate_compress"
        tensors[f"{gate}.set_weight"] = expected[f"{gate}.weight"] = torch.randn(64, 48)
    if change is not None:
        change(tensors)
    facts = {
        "format": "fastvideo-lora-v2", "rank": "2", "base_model": "MiniMaxAI/MiniMax-H3",
        "finetuned_model": "FastVideo/FastVideo-FastH3-4-step-v1",
        "low_rank_tensors": str(sum(".lora_" in key for key in tensors)),
        "diff_tensors": str(sum(key.endswith((".diff", ".diff_b")) for key in tensors)),
        "set_weight_tensors": str(sum(key.endswith(".set_weight") for key in tensors)),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata=facts | metadata)
    return expected


def cached(folder: Path, cache: Path, repository: str) -> Path:
    """The folder as the hub's cache lays out a repository; returns the snapshot."""
    home = cache / f"models--{repository.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0123abc")
    return Path(shutil.copytree(folder, home / "snapshots" / "0123abc"))


class Hub:
    """Stands for the hub: copies of a folder's files what `snapshot_download` is asked for, by its rules."""

    def __init__(self, folder: Path, snapshot: Path):
        self.folder, self.snapshot = folder, snapshot
        snapshot.mkdir(parents=True)

    def download(self, repository, allow_patterns=None, ignore_patterns=None, **_):
        for file in self.folder.rglob("*"):
            name = file.relative_to(self.folder).as_posix()
            wanted = any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns or ["*"])
            if file.is_file() and wanted and not any(fnmatch.fnmatch(name, each) for each in ignore_patterns or []):
                (self.snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, self.snapshot / name)
        return str(self.snapshot)

    def downloaded(self) -> list[str]:
        return sorted(file.relative_to(self.snapshot).as_posix() for file in self.snapshot.rglob("*") if file.is_file())
