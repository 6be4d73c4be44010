"""MiniMax-H3 with gates: FastH3's attention inside of the model, against its definition."""

import pytest
import torch
from diffusers.models.transformers.transformer_minimax_h3 import _apply_rotary_emb
from safetensors.torch import save_file

from oracle import fasth3, packed_tiles, relative_error
from tiny_models import RECIPES, call, run
from tiny_models_context import minimax_h3_inputs
from vsa_diffusers import VSAAttnProcessor, add_gate_compress, enable_vsa, load_gates, save_gates

RECIPE = next(recipe for recipe in RECIPES if recipe.name == "minimax-h3")
GRID, VIDEO = (5, 10, 12), (5, 5, 6)
SEGMENTS = (7, 24, 5)
BLOCK = (2, 2, 2)


class Definition:
    """Diffusers' processor with FastH3's attention in its place."""

    def __call__(self, attn, hidden_states, rotary_emb=None, attention_mask=None):
        heads = [to(hidden_states).unflatten(-1, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v)]
        query, key, value = attn.norm_q(heads[0]), attn.norm_k(heads[1]), heads[2]
        query, key = (_apply_rotary_emb(x, *rotary_emb) for x in (query, key))
        gate = attn.to_gate_compress(hidden_states).unflatten(-1, (attn.heads, -1))
        tiles = len(packed_tiles((), VIDEO, BLOCK).unique())
        output, _ = fasth3(query, key, value, gate, SEGMENTS, VIDEO, top_k=-(-3 * tiles // 10), block_size=BLOCK)
        return attn.to_out[0](output.type_as(query).flatten(2))


def gated():
    model = RECIPE.build()
    add_gate_compress(model)
    for block in model.transformer_blocks:
        torch.nn.init.normal_(block.attn.to_gate_compress.weight, std=0.3)
    return model


def by_definition():
    model = gated()
    for block in model.transformer_blocks:
        block.attn.processor = Definition()
    return model


def gradients(model):
    call(model.train(), RECIPE, GRID).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if "attn.to_" in name}


def test_gates_of_this_family_have_no_bias():
    gate = gated().transformer_blocks[0].attn.to_gate_compress
    assert [name for name, _ in gate.named_parameters()] == ["weight"]
    assert gate.weight.shape == (64, 48)


def test_the_model_computes_what_the_definition_says_forward_and_backward():
    expected = run(by_definition(), RECIPE, GRID)
    model = enable_vsa(gated(), 0.3, block_size=BLOCK)
    assert relative_error(run(model, RECIPE, GRID), expected) < 1e-5
    found, wanted = gradients(model), gradients(by_definition())
    assert "transformer_blocks.1.attn.to_gate_compress.weight" in wanted
    for name, gradient in wanted.items():
        if name.startswith("transformer_blocks"):
            assert relative_error(found[name], gradient) < 1e-4, name


def test_the_segments_are_those_of_each_forward():
    model = enable_vsa(gated(), 0.3, block_size=BLOCK)
    told = []
    attn = model.transformer_blocks[0].attn
    attn.register_forward_pre_hook(lambda *_: told.append(attn.processor.state.segments))
    run(model, RECIPE, GRID)
    inputs = RECIPE.inputs(GRID)
    without = {"video_indices": inputs["video_indices"][24:], "hidden_states": inputs["hidden_states"][:, 24:]}
    keep = torch.cat([torch.arange(7), torch.arange(31, len(inputs["position_ids"]))])
    rows = {name: inputs[name][keep] for name in ("timestep_indices", "token_tags", "position_ids")}
    moved = {name: without.get(name, inputs[name]) - 24 for name in ("video_indices", "audio_indices")}
    with torch.no_grad():
        model(**inputs | without | rows | moved)
    assert told == [SEGMENTS, (7, 0, 5)]


def test_prompts_of_other_lengths_make_no_graph_after_the_second():
    model, eager = (enable_vsa(gated(), 0.3, block_size=BLOCK) for _ in range(2))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in model.transformer_blocks:
        block.compile(backend="eager", fullgraph=True)
    graphs = []
    for text in (7, 9, 12, 15):
        inputs = minimax_h3_inputs(GRID, text=text)
        with torch.no_grad():
            output, expected = (each(**inputs, return_dict=False)[0] for each in (model, eager))
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[-1]


def test_rows_that_nobody_counts_are_refused():
    model = gated()
    attn = model.transformer_blocks[0].attn
    attn.processor = VSAAttnProcessor(combine="gate", video_shape=VIDEO)
    hidden = torch.randn(1, 150, 48)
    assert torch.isfinite(attn(hidden)).all()
    attn.processor._processor_of(attn).surplus = "before"
    with pytest.raises(ValueError, match=r"sees 157 rows, of which video_shape=\(5, 5, 6\) has 150, and text"):
        attn(torch.randn(1, 157, 48))


@pytest.mark.parametrize("suffix", ["weight", "set_weight"])
def test_gates_as_published_are_loaded_and_saved(tmp_path, suffix):
    keys = [f"transformer_blocks.{n}.attn.to_gate_compress" for n in range(2)]
    save_file(
        {f"{key}.{suffix}": torch.full((64, 48), n + 1.0) for n, key in enumerate(keys)}, tmp_path / "a.safetensors"
    )
    model = RECIPE.build()
    assert load_gates(model, tmp_path / "a.safetensors") == [key.removesuffix(".to_gate_compress") for key in keys]
    assert float(model.transformer_blocks[1].attn.to_gate_compress.weight[0, 0]) == 2.0
    again = RECIPE.build()
    load_gates(again, save_gates(model, tmp_path / "b"))
    assert again.transformer_blocks[1].attn.to_gate_compress.weight.equal(
        model.transformer_blocks[1].attn.to_gate_compress.weight
    )


def test_gates_with_a_bias_are_refused(tmp_path):
    tensors = {}
    for n in range(2):
        tensors[f"transformer_blocks.{n}.attn.to_gate_compress.weight"] = torch.ones(64, 48)
        tensors[f"transformer_blocks.{n}.attn.to_gate_compress.bias"] = torch.ones(64)
    save_file(tensors, tmp_path / "a.safetensors")
    model = RECIPE.build()
    with pytest.raises(ValueError, match=r"'weight': \(64, 48\)}, but needs {'weight': \(64, 48\)}"):
        load_gates(model, tmp_path / "a.safetensors")
    assert not hasattr(model.transformer_blocks[0].attn, "to_gate_compress")
