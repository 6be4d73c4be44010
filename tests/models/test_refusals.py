"""What VSA does not fit is refused with the reason, or runs dense with the reason logged."""

import types

import diffusers
import pytest
import torch
from torch import nn

from oracle import relative_error
from tiny_models import RECIPES, run
from vsa_diffusers import VSAAttnProcessor, add_gate_compress, enable_vsa
from vsa_diffusers.models import REFUSED, find_family

GRID = (4, 16, 16)


def build(name):
    recipe = next(recipe for recipe in RECIPES if recipe.name == name)
    return recipe, recipe.build()


@pytest.mark.parametrize("name", [name for name in REFUSED if hasattr(diffusers, name)])
def test_refused_classes_are_named_with_the_reason(name):
    cls = getattr(diffusers, name)
    transformer = cls.__new__(cls)  # its weights do not matter
    pipe = types.SimpleNamespace(components={"transformer": transformer, "vae": nn.Identity()})
    for call, argument in ((enable_vsa, transformer), (enable_vsa, pipe), (add_gate_compress, transformer)):
        with pytest.raises(ValueError, match=f"^{name} cannot use Video Sparse Attention: it"):
            call(argument)


def test_skyreels_runs_dense_in_its_causal_mode_and_says_why(caplog):
    recipe, model = build("skyreels-v2")
    model._set_ar_attention(2)
    dense = run(model, recipe, GRID)
    enable_vsa(model, 0.3)
    assert run(model, recipe, GRID).equal(dense)
    assert "blocks.0-1.attn1 runs dense: the call has an attention mask" in caplog.text
    model._set_ar_attention(1)
    assert relative_error(run(model, recipe, GRID), dense) > 1e-4


@pytest.mark.parametrize("name", ["ltx2", "ltx2.3", "ltx2-references"])
def test_ltx2_runs_dense_under_a_mask_between_video_tokens_and_says_why(name, caplog):
    recipe, model = build(name)
    torch.manual_seed(1)
    inputs = recipe.inputs(GRID)
    tokens = inputs["hidden_states"].shape[1]
    # As IC-LoRA pipelines pass it: how much each token may attend to each other one.
    inputs["video_self_attention_mask"] = torch.rand(2, tokens, tokens)
    with torch.no_grad():
        dense = model(**inputs, return_dict=False)[0]
        enable_vsa(model, 0.3)
        assert model(**inputs, return_dict=False)[0].equal(dense)
        reason = f"transformer_blocks.0-{recipe.sparse - 1}.attn1 runs dense: the call has an attention mask"
        assert caplog.text.count(reason) == 1
        del inputs["video_self_attention_mask"]
        assert relative_error(model(**inputs, return_dict=False)[0], dense) > 1e-4


def test_kandinsky_leaves_calls_with_nabla_attention_to_the_stock_processor(caplog):
    recipe, model = build("kandinsky5")
    calls = []

    def stock(attn, hidden_states, encoder_hidden_states, rotary_emb, sparse_params):
        calls.append(sparse_params)
        return hidden_states

    for attn in find_family(model).video_modules(model).values():
        attn.processor = stock
    enable_vsa(model, 0.3)
    torch.manual_seed(1)
    sparse_params = {"to_fractal": True, "sta_mask": None, "P": 0.9}
    with torch.no_grad():
        model(**recipe.inputs(GRID), sparse_params=sparse_params, return_dict=False)
    assert calls == [sparse_params] * recipe.sparse
    assert "self_attention runs dense: the call has sparse_params, the model's own nabla attention" in caplog.text


def test_the_processor_refuses_fields_that_it_cannot_serve():
    for fields in (dict(dense_steps=2), dict(dense_layers=(0,)), dict(modules=("*",))):
        with pytest.raises(ValueError, match=f"VSAAttnProcessor cannot serve {next(iter(fields))}"):
            VSAAttnProcessor(video_shape=(4, 8, 8), **fields)


def test_for_transformer_serves_the_layers_that_were_asked_for():
    _, model = build("allegro")
    processors = VSAAttnProcessor.for_transformer(model, video_shape=(4, 8, 8), dense_layers=(0,))
    sparse = [name for name, processor in processors.items() if hasattr(processor, "config")]
    assert sparse == ["transformer_blocks.1.attn1.processor"]


@pytest.mark.parametrize("video_shape", [None, (4, 8, 8)])
def test_a_shared_attention_class_is_refused_with_the_way_out(video_shape):
    # Such a class drops the arguments that a processor's signature does not name, rotary embeddings among them.
    recipe, model = build("allegro")
    for attn in find_family(model).video_modules(model).values():
        attn.processor = VSAAttnProcessor(top_k_ratio=0.2, video_shape=video_shape)
    with pytest.raises(ValueError, match=r"attn=Attention does not tell .*VSAAttnProcessor.for_transformer"):
        run(model, recipe, GRID)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("by_hand", [False, True], ids=["enabled", "by hand"])
def test_a_grid_of_fewer_tokens_than_the_video_has_is_refused(recipe, by_hand):
    model = recipe.build()
    if by_hand:
        processors = VSAAttnProcessor.for_transformer(model, top_k_ratio=0.5, video_shape=(2, 4, 6))
        for name, processor in processors.items():
            model.get_submodule(name.removesuffix(".processor")).processor = processor
    else:
        enable_vsa(model, 0.5, video_shape=(2, 4, 6))
    with pytest.raises(ValueError, match=r"video_shape=\(2, 4, 6\) has 48 tokens, but"):
        run(model, recipe, (5, 10, 12))
