import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_models import RECIPES, run
from vsa_diffusers import add_gate_compress, enable_vsa, load_gates, save_gates

WAN = RECIPES[0]
GRID = (5, 10, 12)


def gated_model():
    model = WAN.build()
    add_gate_compress(model)
    for block in model.blocks:
        torch.nn.init.normal_(block.attn1.to_gate_compress.weight)
        torch.nn.init.normal_(block.attn1.to_gate_compress.bias)
    return model


def test_new_gates_are_zero_linear_layers_of_the_right_size_and_dtype():
    model = WAN.build().to(torch.bfloat16)
    assert add_gate_compress(model) == ["blocks.0.attn1", "blocks.1.attn1"]
    gate = model.blocks[0].attn1.to_gate_compress
    assert isinstance(gate, torch.nn.Linear)
    assert gate.weight.shape == (64, 64)
    assert gate.weight.dtype == gate.bias.dtype == torch.bfloat16
    assert not gate.weight.any()
    assert not gate.bias.any()
    assert add_gate_compress(model) == []
    assert not hasattr(model.blocks[0].attn2, "to_gate_compress")


@pytest.mark.parametrize("target", ["gates", "deep/er/my.safetensors"])
def test_saved_gates_come_back_on_a_stock_model(tmp_path, target):
    model = gated_model()
    file = save_gates(model, tmp_path / target)
    assert file.suffix == ".safetensors"
    assert sorted(load_file(file)) == sorted(
        f"blocks.{n}.attn1.to_gate_compress.{p}" for n in range(2) for p in ("weight", "bias")
    )
    fresh = WAN.build()
    assert load_gates(fresh, tmp_path / target) == ["blocks.0.attn1", "blocks.1.attn1"]
    for each in (model, fresh):
        enable_vsa(each, 0.3)
    assert run(fresh, WAN, GRID).equal(run(model, WAN, GRID))


def test_gates_inside_a_whole_checkpoint_are_found_sharded_or_not(tmp_path):
    model = gated_model()
    for name, size in (("whole", "1GB"), ("shards", "60KB")):
        model.save_pretrained(tmp_path / name / "transformer", max_shard_size=size)
        for path in (tmp_path / name, tmp_path / name / "transformer"):
            fresh = WAN.build()
            load_gates(fresh, path)
            assert fresh.blocks[1].attn1.to_gate_compress.weight.equal(model.blocks[1].attn1.to_gate_compress.weight)
    assert len(list((tmp_path / "shards" / "transformer").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("prefix", ["", "transformer.", "model.diffusion_model."])
def test_fastvideo_keys_on_the_block_are_understood(tmp_path, prefix):
    model = gated_model()
    tensors = {}
    for layer, block in enumerate(model.blocks):
        for key, value in block.attn1.to_gate_compress.state_dict().items():
            tensors[f"{prefix}blocks.{layer}.to_gate_compress.{key}"] = value
    save_file(tensors, tmp_path / "model.safetensors")
    fresh = WAN.build()
    load_gates(fresh, tmp_path)
    assert fresh.blocks[1].attn1.to_gate_compress.bias.equal(model.blocks[1].attn1.to_gate_compress.bias)


def saved(tmp_path, change):
    tensors = {key: value.clone() for key, value in load_file(save_gates(gated_model(), tmp_path / "a")).items()}
    change(tensors)
    save_file(tensors, tmp_path / "changed.safetensors")
    return tmp_path / "changed.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.clear() or t.update(other=torch.zeros(1)), "holds no gates; keys must look like blocks.0.attn1"),
        (lambda t: t.update({"blocks.9.attn1.to_gate_compress.bias": torch.zeros(64)}), "lacks: ['blocks.9.attn1"),
        (lambda t: t.pop("blocks.0.attn1.to_gate_compress.bias"), "needs {'weight': (64, 64), 'bias': (64,)}"),
        (lambda t: t.update({"blocks.0.attn1.to_gate_compress.bias": torch.zeros(5)}), "has shapes"),
        (
            lambda t: [t.pop(f"blocks.0.attn1.to_gate_compress.{p}") for p in ("weight", "bias")],
            "has gates for 1 of 2 modules; missing: ['blocks.0.attn1']",
        ),
    ],
)
def test_gates_that_do_not_fit_are_an_error_and_change_nothing(tmp_path, change, message):
    file = saved(tmp_path, change)
    model = WAN.build()
    keys = list(model.state_dict())
    with pytest.raises(ValueError) as error:
        load_gates(model, file)
    assert message in str(error.value)
    assert list(model.state_dict()) == keys


def test_the_gates_of_fasth3_are_refused_with_the_reason(tmp_path):
    model = next(recipe for recipe in RECIPES if recipe.name == "minimax-h3").build()
    keys = [f"transformer_blocks.{n}.attn.to_gate_compress.weight" for n in range(2)]
    save_file({key: torch.ones(64, 48) for key in keys}, tmp_path / "fasth3.safetensors")
    with pytest.raises(ValueError, match="which have no bias, weigh a coarse branch over tiles of text"):
        load_gates(model, tmp_path / "fasth3.safetensors")
    assert not hasattr(model.transformer_blocks[0].attn, "to_gate_compress")


def test_nothing_to_save_and_wrong_models_are_errors(tmp_path):
    with pytest.raises(ValueError, match="WanTransformer3DModel has no gates to save"):
        save_gates(WAN.build(), tmp_path)
    with pytest.raises(ValueError, match="transformer=Linear is not a supported video transformer"):
        add_gate_compress(torch.nn.Linear(2, 2))


def test_gates_added_before_layerwise_casting_compute_in_the_compute_dtype():
    model = gated_model()
    enable_vsa(model, 0.3)
    expected = run(model, WAN, GRID)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.blocks[0].attn1.to_gate_compress.weight.dtype == torch.float8_e4m3fn
    output = run(model, WAN, GRID)
    assert torch.isfinite(output).all()
    torch.testing.assert_close(output, expected, atol=0.5, rtol=0.5)
