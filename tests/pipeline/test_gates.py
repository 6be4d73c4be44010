import json

import accelerate
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from tiny_models import RECIPES, run
from vsa_diffusers import add_gate_compress, enable_vsa, load_gates, save_gates
from vsa_diffusers.gate_state import gate_version, is_trained

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


def test_the_other_gates_of_ltx_2_3_are_refused_with_the_reason(tmp_path):
    model = next(recipe for recipe in RECIPES if recipe.name == "ltx2").build()
    tensors = {}
    for n in range(2):
        tensors[f"transformer_blocks.{n}.attn1.to_gate_compress.weight"] = torch.ones(2, 64)
        tensors[f"transformer_blocks.{n}.attn1.to_gate_compress.bias"] = torch.ones(2)
    save_file(tensors, tmp_path / "ltx2.3.safetensors")
    with pytest.raises(ValueError, match="one row for each head are LTX-2\\.3's own"):
        load_gates(model, tmp_path / "ltx2.3.safetensors")
    assert not hasattr(model.transformer_blocks[0].attn1, "to_gate_compress")


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


class PackedLinear(torch.nn.Module):
    """As quantising libraries put it in a Linear's place: int8 and a scale, both buffers."""

    def __init__(self, linear):
        super().__init__()
        self.in_features = linear.in_features
        scale = linear.weight.detach().abs().amax().clamp(min=1e-12) / 127
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, hidden):
        return torch.nn.functional.linear(hidden, self.packed.to(hidden.dtype) * self.scale, self.bias)


def quantised(model):
    for block in model.blocks:
        block.attn1.to_gate_compress = PackedLinear(block.attn1.to_gate_compress)
    return model


def offloaded(model):
    return accelerate.cpu_offload(model, torch.device("cpu"))


def on_meta(model):
    return model.to("meta")


def zero_gates():
    model = WAN.build()
    add_gate_compress(model)
    return model


@pytest.mark.parametrize("change", [lambda model: model, quantised, offloaded, on_meta])
def test_whether_gates_are_trained_is_known_wherever_they_are(change, tmp_path):
    assert is_trained(WAN.build().blocks[0].attn1) is None
    assert is_trained(change(zero_gates()).blocks[0].attn1) is False
    loaded = WAN.build()
    load_gates(loaded, save_gates(gated_model(), tmp_path))
    assert is_trained(change(loaded).blocks[0].attn1) is True


@pytest.mark.parametrize("change", [lambda model: model, quantised, offloaded])
def test_gates_written_by_other_means_are_seen_wherever_they_are(change):
    model = zero_gates()
    model.load_state_dict(gated_model().state_dict())
    assert is_trained(change(model).blocks[0].attn1) is True


@pytest.mark.parametrize("change", [quantised, offloaded])
def test_enabling_uses_trained_gates_that_cannot_be_looked_at(change):
    model = enable_vsa(change(gated_model()), 0.3)
    assert {block.attn1.processor.config.combine for block in model.blocks} == {"gate"}
    model = enable_vsa(change(zero_gates()), 0.3)
    assert {block.attn1.processor.config.combine for block in model.blocks} == {"merge"}


def test_a_gate_without_values_or_history_is_an_error_and_not_a_guess():
    model = WAN.build()
    for block in model.blocks:
        block.attn1.to_gate_compress = torch.nn.Linear(64, 64, device="meta")
    with pytest.raises(ValueError, match='choose combine="gate" or combine="merge"'):
        enable_vsa(model, 0.3)
    assert {enable_vsa(model, 0.3, combine="merge").blocks[0].attn1.processor.config.combine} == {"merge"}


def test_a_lora_on_a_zero_gate_counts_as_trained_since_it_is_to_learn():
    model = zero_gates()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_gate_compress"]))
    assert is_trained(model.blocks[0].attn1) is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (quantised, "before quantising"),
        (offloaded, "before enable_sequential_cpu_offload"),
        (on_meta, "before enable_sequential_cpu_offload"),
    ],
)
def test_gates_that_cannot_be_read_or_written_are_refused_with_the_mend(change, message, tmp_path):
    file = save_gates(gated_model(), tmp_path / "good.safetensors")
    model = change(gated_model())
    with pytest.raises(ValueError, match=message):
        load_gates(model, file)
    with pytest.raises(ValueError, match=message):
        save_gates(model, file)
    assert load_gates(WAN.build(), file) == ["blocks.0.attn1", "blocks.1.attn1"]


def test_gates_are_not_added_to_an_offloaded_model_which_would_never_give_them_values(tmp_path):
    file = save_gates(gated_model(), tmp_path)
    model = offloaded(WAN.build())
    for add in (add_gate_compress, lambda model: load_gates(model, file)):
        with pytest.raises(ValueError, match="before enable_sequential_cpu_offload"):
            add(model)
    assert not hasattr(model.blocks[0].attn1, "to_gate_compress")


def test_a_change_of_gates_is_noticed_without_looking_at_their_values(tmp_path):
    model = zero_gates()
    attn = model.blocks[0].attn1
    seen = [gate_version(attn)]

    def changed():
        seen.append(gate_version(attn))
        return seen[-1] != seen[-2]

    assert not changed()
    run(model, WAN, GRID)
    model.to(torch.float64).to(torch.float32)
    assert not changed()
    file = save_gates(gated_model(), tmp_path)
    for change in (
        lambda: load_gates(model, file),
        lambda: model.load_state_dict(gated_model().state_dict()),
        lambda: setattr(attn, "to_gate_compress", torch.nn.Linear(64, 64)),
        lambda: torch.nn.init.ones_(attn.to_gate_compress.bias),
    ):
        change()
        assert changed()
    for parameter in attn.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(attn.parameters()).step()
    assert changed()
    assert gate_version(WAN.build().blocks[0].attn1) is None
    assert gate_version(offloaded(zero_gates()).blocks[0].attn1) == ()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.full((64,), float("nan")), "blocks.0.attn1.to_gate_compress.bias in .* holds NaN or infinity"),
        (torch.ones(64, dtype=torch.int32), "is int32 instead of floating point"),
        (torch.ones(64, dtype=torch.bool), "is bool instead of floating point"),
        (torch.ones(64, dtype=torch.complex64), "is complex64 instead of floating point"),
        (torch.full((64,), 1e6), "has values up to 1e\\+06, but float16 holds at most 6.55e\\+04"),
    ],
)
def test_values_that_no_gate_can_have_are_refused_by_key(tmp_path, value, message):
    file = saved(tmp_path, lambda tensors: tensors.update({"blocks.0.attn1.to_gate_compress.bias": value}))
    model = gated_model().to(torch.float16)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_gates(model, file)
    assert all(tensor.equal(before[key]) for key, tensor in model.state_dict().items())


def test_a_checkpoint_that_holds_a_gate_under_two_names_is_refused(tmp_path):
    file = saved(tmp_path, lambda tensors: tensors.update({"blocks.0.to_gate_compress.bias": torch.zeros(64)}))
    with pytest.raises(ValueError, match="twice, under two names"):
        load_gates(WAN.build(), file)


def test_an_interrupt_while_gates_are_loaded_leaves_them_as_they_were(tmp_path, monkeypatch):
    file = save_gates(gated_model(), tmp_path)
    model = WAN.build()
    structure = {name: type(module) for name, module in model.named_modules()}
    load, calls = torch.nn.Linear.load_state_dict, []

    def interrupted(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return load(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Linear, "load_state_dict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_gates(model, file)
    assert {name: type(module) for name, module in model.named_modules()} == structure
    add_gate_compress(model)
    zeros = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        load_gates(model, file)
    assert all(tensor.equal(zeros[key]) for key, tensor in model.state_dict().items())


def test_shards_that_are_missing_or_lie_outside_are_refused(tmp_path):
    gated_model().save_pretrained(tmp_path, max_shard_size="60KB")
    [index] = tmp_path.glob("*.index.json")
    content = json.loads(index.read_text())
    for name, message in (("../../other.safetensors", "names '../../other"), ("gone.safetensors", "is missing")):
        key = "blocks.0.attn1.to_gate_compress.bias"
        index.write_text(json.dumps(content | {"weight_map": content["weight_map"] | {key: name}}))
        with pytest.raises(ValueError, match=message):
            load_gates(WAN.build(), tmp_path)
    index.write_text(json.dumps({"weight_map": [1]}))
    with pytest.raises(ValueError, match='has no "weight_map"'):
        load_gates(WAN.build(), tmp_path)
