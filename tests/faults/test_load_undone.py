"""`load_vsa` changes all that was saved, or nothing."""

import json

import pytest
import torch
from peft import LoraConfig

from tiny_fine_tuned import WAN, differences, everything, fine_tuned
from vsa_diffusers import VSAConfig, add_gate_compress, enable_vsa, load_vsa, pretrained, save_vsa
from vsa_diffusers.pipeline import enabled_config

KINDS = {"full": {}, "lora": dict(lora=True), "gates": {}, "gate-less": dict(gates=False)}


def stock():
    return WAN.build()


def enabled():
    return enable_vsa(WAN.build(), 0.7, dense_layers=(1,))


def gated():
    model = WAN.build()
    add_gate_compress(model)
    torch.nn.init.ones_(model.blocks[1].attn1.to_gate_compress.weight)
    return enable_vsa(model, 0.7)


def adapted():
    model = WAN.build()
    model.add_adapter(LoraConfig(r=2, target_modules=["attn1.to_q"], init_lora_weights=False), adapter_name="mine")
    return model


CASES = [
    (state, kind)
    for state in (stock, enabled, gated, adapted)
    for kind in KINDS
    if state is not adapted or kind == "lora"
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for kind, options in KINDS.items():
        contents = "gates" if kind == "gates" else "auto"
        save_vsa(fine_tuned(WAN.build(), **options), folder / kind, contents=contents)
    return folder


@pytest.mark.parametrize(("state", "kind"), CASES)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(dense_layers=(99,)), "names layer 99"),
        (dict(modules=("nothing.*",)), "matches no video self-attention"),
        (dict(ratio=1), "unknown keys"),
    ],
)
def test_a_config_that_does_not_fit_changes_nothing(saved, state, kind, changes, message):
    model = state()
    before = everything(model)
    with pytest.raises(ValueError, match=message):
        load_vsa(model, saved / kind, **changes)
    assert differences(before, everything(model)) == []


@pytest.mark.parametrize(("state", "kind"), CASES)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("after", [False, True])
def test_an_error_while_vsa_is_enabled_changes_nothing(saved, state, kind, error, after, monkeypatch):
    model = state()
    before = everything(model)

    def broken(pipe, config):
        if after:
            enable_vsa(pipe, config=config)
        raise error

    monkeypatch.setattr(pretrained, "enable_vsa", broken)
    with pytest.raises(error):
        load_vsa(model, saved / kind)
    assert differences(before, everything(model)) == []
    monkeypatch.undo()
    load_vsa(stock(), saved / kind)


def test_an_interrupt_between_two_transformers_changes_neither(tmp_path, monkeypatch):
    from tiny_pipelines_video import TEXT, PipelineRecipe, embeddings, wan22

    recipe = PipelineRecipe("WanPipeline", wan22(), lambda: TEXT | embeddings())
    pipe = recipe.build()
    for part in (pipe.transformer, pipe.transformer_2):
        fine_tuned(part)
    save_vsa(enable_vsa(pipe, 0.3, combine="gate"), tmp_path)
    fresh = recipe.build()
    before = [everything(part, video=False) for part in (fresh.transformer, fresh.transformer_2)]
    load = torch.nn.Module.load_state_dict

    def interrupted(self, *args, **kwargs):
        result = load(self, *args, **kwargs)
        if self is fresh.transformer_2:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(torch.nn.Module, "load_state_dict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_vsa(fresh, tmp_path)
    after = [everything(part, video=False) for part in (fresh.transformer, fresh.transformer_2)]
    assert [differences(one, other) for one, other in zip(before, after, strict=True)] == [[], []]


def test_a_failed_load_leaves_a_model_that_can_be_loaded_enabled_and_disabled(saved):
    model = enabled()
    with pytest.raises(ValueError, match="names layer 99"):
        load_vsa(model, saved / "lora", dense_layers=(99,))
    load_vsa(model, saved / "lora")
    assert enabled_config(model) == enabled_config(load_vsa(stock(), saved / "lora"))
    before = everything(load_vsa(stock(), saved / "lora"))["video"]
    assert everything(model)["video"].equal(before)


def test_whole_weights_do_not_go_under_an_adapter(saved):
    model = adapted()
    before = everything(model)
    with pytest.raises(ValueError, match=r"has the adapter \['mine'\]; remove it with unload_lora\(\)"):
        load_vsa(model, saved / "full")
    assert differences(before, everything(model)) == []


def test_a_config_edited_by_hand_is_refused_with_what_to_do_instead(tmp_path):
    save_vsa(fine_tuned(WAN.build()), tmp_path)
    VSAConfig(top_k_ratio=0.9).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"vsa_config.json is not the file that vsa_index.json was saved with"):
        load_vsa(stock(), tmp_path)
    values = json.loads((tmp_path / "vsa_config.json").read_text())
    (tmp_path / "vsa_config.json").write_text(json.dumps(values | {"dense_layers": [99]}))
    with pytest.raises(ValueError, match="names layer 99"):
        load_vsa(stock(), tmp_path)
