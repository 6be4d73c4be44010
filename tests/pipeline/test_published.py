"""`load_vsa` takes checkpoints as they were published, whole or not at all, and says what it sets."""

import json
import logging

import huggingface_hub
import pytest
import torch
from published_checkpoints import (
    BY_NAME,
    CONTRACT,
    Hub,
    cached,
    renamed,
    trained,
    write_fasth3,
    write_fasth3_lora,
    write_shards,
    write_wan,
)
from safetensors.torch import load_file, save_file

from oracle import relative_error
from tiny_models import run
from vsa_diffusers import enable_vsa, load_gates, load_vsa, save_vsa, vsa_status
from vsa_diffusers.models import find_family
from vsa_diffusers.pipeline import enabled_config
from vsa_diffusers.published import top_k_by_tokens

WAN, H3 = BY_NAME["wan"], BY_NAME["minimax-h3"]
GRID = (5, 10, 12)
FAST_WAN = "FastVideo/FastWan2.1-T2V-1.3B-Diffusers"
PREFIXES = ("", "module.", "_orig_mod.", "diffusion_model.", "model.diffusion_model.", "transformer.")
LAYOUTS = [("diffusers", "", True), ("mixed", "", False), ("native", "", True), ("native", "", False)]
LAYOUTS += [("mixed", prefix, True) for prefix in PREFIXES[1:]]


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_untouched(model, before):
    assert not getattr(model, "_vsa_installation", None)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(after[key].equal(value) for key, value in before.items())


@pytest.mark.parametrize(("layout", "prefix", "index"), LAYOUTS)
def test_fastvideos_wan_is_loaded_whole_onto_a_stock_model(tmp_path, layout, prefix, index):
    folder = tmp_path / "FastWan2.1-T2V-1.3B-Diffusers"
    expected = write_wan(folder, layout, prefix, index)
    model = load_vsa(WAN.build(), folder)
    assert state(model).keys() == state(expected).keys()
    assert all(value.equal(state(expected)[key]) for key, value in state(model).items())
    config = enabled_config(model)
    assert (config.top_k_ratio, config.combine, config.block_size) == (0.2, "gate", (4, 4, 4))
    assert run(model, WAN, GRID).equal(run(enable_vsa(expected, 0.2), WAN, GRID))


def test_a_model_that_came_from_the_checkpoint_gets_its_gates_alone(tmp_path):
    folder = tmp_path / "Wan2.1-VSA-T2V-14B-720P-Diffusers"
    write_wan(folder)
    model = WAN.build()
    model.register_to_config(_name_or_path=str(folder / "transformer"))
    before = state(model)
    load_vsa(model, folder, top_k_ratio=0.3)
    assert all(model.state_dict()[key].equal(value) for key, value in before.items())
    assert vsa_status(model).transformers[0].gates == (2, 2)
    assert enabled_config(model).top_k_ratio == 0.3


@pytest.mark.parametrize("contract", [None, CONTRACT])
def test_a_tree_of_fasth3_is_loaded_by_its_contract_or_its_name(tmp_path, contract, caplog):
    folder = tmp_path / ("theirs" if contract else "FastVideo-FastH3-4-step-Preview-v1-VSA-DataFree")
    expected = write_fasth3(folder, contract)
    with caplog.at_level(logging.INFO, "vsa_diffusers"):
        model = load_vsa(H3.build(), folder)
    assert all(value.equal(state(expected)[key]) for key, value in state(model).items())
    sparsity = 0.8 if contract else 0.9
    assert enabled_config(model).top_k_ratio == pytest.approx(1 - sparsity)
    assert f"sparsity {sparsity} (top_k_ratio={1 - sparsity:g}), blocks of (4, 4, 4), combine='gate'" in caplog.text
    assert run(model, H3, GRID).equal(run(enable_vsa(expected, 1 - sparsity), H3, GRID))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(pdd_steps=8), "has pdd_steps: sparse references"),
        (dict(vsa_ref_keep_rate=0.2), "has vsa_ref_keep_rate: sparse references"),
        (dict(vsa_tile_size=128), "vsa_tile_size=128, but what can be served has 64"),
        (dict(attention_backend="FLASH_ATTN"), "attention_backend='FLASH_ATTN'"),
        (dict(schema_version="v2"), "schema_version='v2'"),
        (dict(vsa_sparsity=1.0), "vsa_sparsity=1.0, which must be a share"),
    ],
)
def test_contracts_of_other_operations_are_refused(tmp_path, change, message):
    write_fasth3(tmp_path, CONTRACT | change)
    model = H3.build()
    before = state(model)
    with pytest.raises(ValueError) as error:
        load_vsa(model, tmp_path)
    assert message in str(error.value)
    assert_untouched(model, before)


@pytest.mark.parametrize("place", ["file", "folder", "variant"])
def test_an_adapter_of_fasth3_is_merged(tmp_path, place):
    base = H3.build()
    expected = write_fasth3_lora(tmp_path / "vsa-datafree", base)
    (tmp_path / "adapter_manifest.json").write_text("{}")
    model = H3.build()
    before = state(model)
    if place == "variant":
        load_vsa(model, tmp_path, variant="vsa-datafree")
    else:
        file = tmp_path / "vsa-datafree"
        load_vsa(model, file if place == "folder" else file / "adapter_model.safetensors")
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, expected.get(key, before.get(key)), atol=1e-5, rtol=1e-5)
    assert enabled_config(model).top_k_ratio == pytest.approx(0.1)
    assert relative_error(run(model, H3, GRID), run(base, H3, GRID)) > 1e-2


def test_the_published_merge_comes_out():
    from vsa_diffusers.published import _merged

    terms = {
        "lora_A": torch.tensor([[1.0, 2, 3]]),
        "lora_B": torch.tensor([[2.0], [-1]]),
        "diff": torch.full((2, 3), 0.5),
    }
    merged = _merged("weight", torch.zeros(2, 3), terms, None)
    assert merged.tolist() == [[2.5, 4.5, 6.5], [-0.5, -1.5, -2.5]]


def test_an_adapter_without_gates_was_trained_dense_and_stays_so(tmp_path):
    base = H3.build()
    expected = write_fasth3_lora(
        tmp_path, base, gates=False, finetuned_model="FastVideo/FastVideo-FastH3-Dense-4-step-v1"
    )
    model = load_vsa(H3.build(), tmp_path)
    base.load_state_dict(expected, strict=False)
    torch.testing.assert_close(run(model, H3, GRID), run(base, H3, GRID), atol=1e-4, rtol=1e-4)


GATE = "transformer_blocks.1.attn.to_gate_compress.set_weight"


@pytest.mark.parametrize(
    ("change", "metadata", "message"),
    [
        (lambda t: t.pop(GATE), {}, "has gates for 1 of 2 blocks"),
        (lambda t: t.pop("transformer_blocks.0.attn.to_q.lora_A.weight"), {}, "lora_B without lora_A"),
        (lambda t: t.update({"proj_in.diff_m": torch.ones(1)}), {}, "proj_in.diff_m, which is no part of an adapter"),
        (lambda t: t.update({"proj_in.set_weight": torch.ones(1)}), {}, "proj_in.set_weight, which is no part"),
        (lambda t: t.update({"other.diff": torch.ones(1)}), {}, "MiniMaxH3Transformer3DModel has no other.weight"),
        (lambda t: t.update({"proj_in.diff": torch.ones(3)}), {}, "does not fit proj_in.weight (48, 16)"),
        (
            lambda t: [t.pop(key) for key in list(t) if key.startswith("transformer_blocks.1") and key != GATE], {},
            "leaves blocks ['1'] untouched",
        ),
        (None, dict(diff_tensors="1"), "says diff_tensors='1', but holds"),
        (None, dict(low_rank_tensors="3"), "says low_rank_tensors='3', but holds"),
        (lambda t: t[GATE].fill_(float("nan")), {}, "holds NaN"),
    ],
)  # fmt: skip
def test_adapters_that_are_not_whole_are_refused_and_change_nothing(tmp_path, change, metadata, message):
    model = H3.build()
    before = state(model)
    write_fasth3_lora(tmp_path, model, change=change, **metadata)
    with pytest.raises(ValueError) as error:
        load_vsa(model, tmp_path)
    assert message in str(error.value)
    assert_untouched(model, before)


def test_one_of_several_adapters_has_to_be_named(tmp_path):
    write_fasth3_lora(tmp_path / "vsa-datafree", H3.build())
    (tmp_path / "adapter_manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds several adapters \(\['vsa-datafree'\]\); pass one as variant="):
        load_vsa(H3.build(), tmp_path)
    with pytest.raises(ValueError, match=r"variant='other': .* has no other/adapter_model\.safetensors"):
        load_vsa(H3.build(), tmp_path, variant="other")


@pytest.mark.parametrize("prefix", ["", "model."])
def test_the_gates_of_ltx_2_are_loaded(tmp_path, prefix):
    expected = trained("ltx2")
    save_file(renamed(expected.state_dict(), prefix=prefix), tmp_path / "model.safetensors")
    model = load_vsa(BY_NAME["ltx2"].build(), tmp_path)
    gates = [key for key in model.state_dict() if "to_gate_compress" in key]
    assert len(gates) == 4
    assert all(model.state_dict()[key].equal(expected.state_dict()[key]) for key in gates)


@pytest.mark.parametrize("name", ["audio_attn1", "attn2"])
def test_gates_of_other_attention_of_ltx_2_are_refused(tmp_path, name):
    tensors = renamed({k: v for k, v in trained("ltx2").state_dict().items() if "gate_comp" in k})
    tensors[f"transformer_blocks.0.{name}.to_gate_compress.weight"] = torch.zeros(64, 64)
    save_file(tensors, tmp_path / "model.safetensors")
    model = BY_NAME["ltx2"].build()
    before = state(model)
    with pytest.raises(ValueError, match=f"lacks: .'transformer_blocks.0.{name}.to_gate_compress.weight'"):
        load_vsa(model, tmp_path)
    assert_untouched(model, before)


FOREIGN = {
    "blocks.0.attn.proj_l.weight": "sparse-linear attention (SLA)",
    "blocks.0.attn.qkv_proj.weight": "ComfyUI's or the native release's names",
    "blocks.0.mlp.fc1.weight": "ComfyUI's or the native release's names",
    "blocks.0.attn1.to_q.weight_scale": "quantised in a format of their own",
    "blocks.0.attn1.to_q.alpha": "a LoRA of another format",
}


@pytest.mark.parametrize("key", FOREIGN)
@pytest.mark.parametrize("index", [True, False])
def test_foreign_layouts_are_refused_with_the_reason(tmp_path, key, index):
    tensors = renamed(trained("wan").state_dict()) | {key: torch.zeros(1)}
    write_shards(tensors, tmp_path / "transformer", index=index)
    model = WAN.build()
    before = state(model)
    with pytest.raises(ValueError) as error:
        load_vsa(model, tmp_path)
    assert f"{key} belongs to" in str(error.value)
    assert FOREIGN[key] in str(error.value)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("repository", "reason"),
    [
        ("FastVideo/FastVideo-FastH3-Trim-8-Step", "it has 42 blocks"),
        ("FastVideo/FastH3-OmniRef-PDD", "tiles have 128 tokens"),
        ("FastVideo/FastVideo-FastH3-8-Step-V2-FP8", "quantised"),
        ("FastVideo/FastVideo-FastH3-Comfy", "ComfyUI's names"),
        ("Comfy-Org/FastVideo-FastH3", "ComfyUI's names"),
        ("thu-ml/TurboDiffusion", "SLA"),
        ("lightx2v/Minimax-h3-Turbo-SLA", "SLA"),
        ("Veda-Sparse/Minimax-H3-FL2VA-Veda-Preview", "learned scores"),
    ],
)
def test_repositories_that_cannot_be_served_are_refused_before_weights_are_downloaded(
    repository, reason, monkeypatch, tmp_path
):
    write_fasth3(tmp_path / "there")
    hub = Hub(tmp_path / "there", tmp_path / "here")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.download)
    with pytest.raises(ValueError) as error:
        load_vsa(H3.build(), repository)
    assert reason in str(error.value)
    assert not [name for name in hub.downloaded() if name.endswith(".safetensors")]


def test_what_save_vsa_wrote_may_have_any_name(tmp_path):
    folder = tmp_path / "FastVideo-FastH3-Comfy" / "wan-fp8-sla"
    model = enable_vsa(trained("wan"), 0.3)
    save_vsa(model, folder)
    assert run(load_vsa(WAN.build(), folder), WAN, GRID).equal(run(model, WAN, GRID))


def test_a_checkpoint_without_gates_is_refused(tmp_path):
    folder = tmp_path / "FastWan2.2-TI2V-5B-FullAttn-Diffusers"
    WAN.build().save_pretrained(folder / "transformer")
    with pytest.raises(ValueError, match=r"holds no gates \(it was trained with full attention\)"):
        load_vsa(WAN.build(), folder)


@pytest.mark.parametrize("damage", ["a weight is missing", "a weight is one too many", "a shard is missing", "sizes"])
def test_checkpoints_that_do_not_fit_are_refused_and_change_nothing(tmp_path, damage):
    write_wan(tmp_path, index=damage == "a shard is missing")
    first = sorted((tmp_path / "transformer").glob("*.safetensors"))[0]
    tensors = load_file(first)
    key = next(iter(tensors))
    if damage == "a weight is missing":
        del tensors[key]
    if damage == "a weight is one too many":
        tensors["more"] = torch.zeros(1)
    if damage == "sizes":
        tensors[key] = torch.zeros(1)
    first.unlink() if damage == "a shard is missing" else save_file(tensors, first)
    model = WAN.build()
    before = state(model)
    with pytest.raises(ValueError, match=r"does not fit the transformer|is missing, which"):
        load_vsa(model, tmp_path)
    assert_untouched(model, before)


def test_both_roundings_that_fastvideo_has_had_can_be_chosen(tmp_path):
    assert (top_k_by_tokens((20, 28, 52), 0.8), top_k_by_tokens((20, 48, 80), 0.9)) == (91, 120)
    assert (top_k_by_tokens((21, 30, 52), 0.8), top_k_by_tokens((21, 45, 80), 0.9)) == (103, 119)
    folder = tmp_path / "FastWan2.1-T2V-1.3B-Diffusers"
    write_wan(folder)
    model = load_vsa(WAN.build(), folder, rounding="tokens", video_shape=(5, 5, 6))
    assert enabled_config(model).top_k == 1
    with pytest.raises(ValueError, match=r"rounding='tokens' counts the video's tokens, so it needs a known sparsity"):
        load_vsa(WAN.build(), folder, rounding="tokens")
    with pytest.raises(ValueError, match="rounding='nearest'"):
        load_vsa(WAN.build(), folder, rounding="nearest")


@pytest.mark.parametrize("load", [load_gates, load_vsa])
def test_of_a_repository_only_the_files_that_are_needed_are_downloaded(tmp_path, monkeypatch, load):
    write_fasth3(tmp_path / "there", CONTRACT)
    hub = Hub(tmp_path / "there", tmp_path / "models--someone--fast" / "snapshots" / "0")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.download)
    model = H3.build()
    model.register_to_config(_name_or_path="someone/fast")
    load(model, "someone/fast")
    weights = [name for name in hub.downloaded() if name.endswith(".safetensors")]
    assert weights == ["transformer/diffusion_pytorch_model-00003-of-00003.safetensors"]


def test_of_a_repository_without_an_index_the_transformer_alone_is_downloaded(tmp_path, monkeypatch):
    expected = write_wan(tmp_path / "there", "mixed", index=False)
    hub = Hub(tmp_path / "there", tmp_path / "here")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.download)
    model = load_vsa(WAN.build(), "FastVideo/FastWan2.1-T2V-14B-Diffusers")
    assert {name.split("/")[0] for name in hub.downloaded()} == {"transformer"}
    assert enabled_config(model).top_k_ratio == 0.1
    assert run(model, WAN, GRID).equal(run(enable_vsa(expected, 0.1), WAN, GRID))


@pytest.mark.parametrize("what", ["wan", "adapter"])
def test_names_on_the_hub_are_resolved_offline_from_its_cache(tmp_path, monkeypatch, what):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    if what == "wan":
        expected = state(write_wan(tmp_path / "there"))
        cached(tmp_path / "there", tmp_path / "cache", FAST_WAN)
        model = load_vsa(WAN.build(), FAST_WAN)
    else:
        repository = "FastVideo/FastVideo-FastH3-4-step-Preview-v1-LoRA"
        expected = write_fasth3_lora(tmp_path / "there" / "vsa-datafree", H3.build())
        (tmp_path / "there" / "adapter_manifest.json").write_text(json.dumps({}))
        cached(tmp_path / "there", tmp_path / "cache", repository)
        model = load_vsa(H3.build(), repository, variant="vsa-datafree")
    for key, value in expected.items():
        torch.testing.assert_close(model.state_dict()[key], value, atol=1e-5, rtol=1e-5)


def test_an_error_at_the_end_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    write_wan(tmp_path)
    model = WAN.build()
    before = state(model)
    attn = next(iter(find_family(model).video_modules(model).values()))
    monkeypatch.setattr(type(model), "load_state_dict", lambda *a, **k: (_ for _ in ()).throw(MemoryError("full")))
    with pytest.raises(MemoryError):
        load_vsa(model, tmp_path)
    assert not hasattr(attn, "to_gate_compress")
    assert_untouched(model, before)
