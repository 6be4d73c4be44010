"""Gates that a checkpoint has and the model has not, and settings that it was not trained for, are told."""

import logging

import huggingface_hub
import pytest
import torch

from tiny_models import RECIPES
from vsa_diffusers import add_gate_compress, enable_vsa, load_gates, save_gates
from vsa_diffusers.models import find_family

WAN = RECIPES[0]
FAST_WAN = "FastVideo/FastWan2.1-T2V-1.3B-Diffusers"


def gated():
    model = WAN.build()
    add_gate_compress(model)
    for attn in find_family(model).video_modules(model).values():
        torch.nn.init.normal_(attn.to_gate_compress.weight)
    return model


def told(caplog, model, **settings):
    caplog.clear()
    with caplog.at_level(logging.WARNING, "vsa_diffusers"):
        enable_vsa(model, **settings)
    return " ".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("size", ["1GB", "60KB"])
def test_a_folder_whose_files_hold_gates_is_told_until_they_are_loaded(tmp_path, caplog, size):
    gated().save_pretrained(tmp_path / "transformer", max_shard_size=size)
    model = type(WAN.build()).from_pretrained(tmp_path, subfolder="transformer")
    said = told(caplog, model)
    assert "its files hold gates, but the model has none" in said
    assert f"load_vsa(pipe, {str(tmp_path)!r})" in said
    load_gates(model, tmp_path)
    assert "gates" not in told(caplog, model)


def test_a_repository_in_the_hubs_cache_is_told(tmp_path, caplog, monkeypatch):
    repository = tmp_path / "models--someone--their-model"
    gated().save_pretrained(repository / "snapshots" / "abc" / "transformer")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = WAN.build()
    model.register_to_config(_name_or_path="someone/their-model")
    found = huggingface_hub.try_to_load_from_cache
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: found(repo, file, tmp_path))
    assert "its files hold gates" in told(caplog, model)


@pytest.mark.parametrize(
    ("name", "is_told"),
    [
        (FAST_WAN, True),
        (f"/cache/models--{FAST_WAN.replace('/', '--')}/snapshots/abc/transformer", True),
        ("someone/Wan-VSA-finetune", True),
        ("/models/their_vsa/transformer", True),
        ("FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers", False),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", False),
        ("/home/vsa/models/wan/transformer", False),
        ("someone/canvsaver", False),
    ],
)
def test_a_name_that_says_vsa_is_told(caplog, name, is_told):
    model = WAN.build()
    model.register_to_config(_name_or_path=name)
    said = told(caplog, model)
    assert ("trained with VSA, with gates, but the model has none" in said) == is_told
    model = gated()
    model.register_to_config(_name_or_path=name)
    assert "has none" not in told(caplog, model)


def test_what_save_vsa_wrote_says_vsa_without_gates(tmp_path, caplog):
    (tmp_path / "my_vsa").mkdir()
    (tmp_path / "my_vsa" / "vsa_index.json").write_text("{}")
    model = WAN.build()
    model.register_to_config(_name_or_path=str(tmp_path / "my_vsa"))
    assert "has none" not in told(caplog, model)


def test_a_config_that_says_vsa_is_told(caplog):
    model = WAN.build()
    model.register_to_config(attention_backend="VIDEO_SPARSE_ATTN", vsa_sparsity=0.8)
    assert "its config has ['attention_backend', 'vsa_sparsity']" in told(caplog, model)
    assert "has none" not in told(caplog, model, combine="sparse")


@pytest.mark.parametrize("by", ["weights", "gates"])
def test_settings_that_a_checkpoint_was_not_trained_for_are_told(tmp_path, caplog, by):
    model = gated()
    if by == "weights":
        model.register_to_config(_name_or_path=FAST_WAN)
    else:
        folder = tmp_path / "FastWan2.1-T2V-1.3B-Diffusers"
        save_gates(model, folder)
        load_gates(model, folder)
    assert "was not trained for top_k_ratio=0.5 (trained: 0.2)" in told(caplog, model)
    assert "block_size=(2, 2, 2) (trained: (4, 4, 4))" in told(caplog, model, top_k_ratio=0.2, block_size=(2, 2, 2))
    assert "selection='quarters' (trained: 'mean')" in told(caplog, model, top_k_ratio=0.2, selection="quarters")
    assert "schedule='front'" in told(caplog, model, top_k_ratio=0.2, schedule="front")
    assert "trained" not in told(caplog, model, top_k_ratio=0.2)
    assert "top_k_ratio" not in told(caplog, model, top_k=1)
