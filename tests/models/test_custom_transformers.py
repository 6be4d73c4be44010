"""`register_transformer`: transformers that the package does not know, with and without attention processors."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from oracle import relative_error
from vsa_diffusers import (
    VSAAttnProcessor,
    add_gate_compress,
    disable_vsa,
    enable_vsa,
    load_gates,
    register_transformer,
    save_gates,
)
from vsa_diffusers.models import attention_modules, find_family
from vsa_diffusers.processor import FamilyAttnProcessor

SHAPE = (4, 8, 12)
HIDDEN = 24


class Attention(nn.Module):
    def __init__(self, norm=None):
        super().__init__()
        self.heads = 2
        self.to_q, self.to_k, self.to_v = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        if norm is not None:
            self.norm_q, self.norm_k = nn.RMSNorm(norm), nn.RMSNorm(norm)
            nn.init.uniform_(self.norm_q.weight, 1, 3)
        self.over_all_heads = norm == HIDDEN
        self.to_out = nn.ModuleList([nn.Linear(HIDDEN, HIDDEN), nn.Dropout(0.0)])

    def forward(self, hidden_states, scale=None):
        query, key, value = self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states)
        if self.over_all_heads:
            query, key = self.norm_q(query), self.norm_k(key)
        query, key, value = (x.unflatten(-1, (2, -1)) for x in (query, key, value))
        if hasattr(self, "norm_q") and not self.over_all_heads:
            query, key = self.norm_q(query), self.norm_k(key)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2).flatten(2)
        return self.to_out[1](self.to_out[0](out))


class WithProcessor(Attention):
    """Calls its processor, as diffusers' attention modules do."""

    def __init__(self, norm=None):
        super().__init__(norm)
        self.processor = Attention.forward

    def forward(self, hidden_states, **kwargs):
        return self.processor(self, hidden_states, **kwargs)


class Transformer(nn.Module):
    def __init__(self, attention=Attention, norm=None, **arguments):
        super().__init__()
        self.layers = nn.ModuleList(attention(norm) for _ in range(2))
        self.arguments = arguments

    def forward(self, tokens):
        hidden_states = tokens.flatten(1, 3)
        for layer in self.layers:
            hidden_states = hidden_states + layer(4 * hidden_states, **self.arguments)
        return hidden_states


def grid(transformer, inputs):
    return inputs["tokens"].shape[1:4]


@pytest.fixture
def tokens():
    return torch.randn(2, *SHAPE, HIDDEN)


@pytest.mark.parametrize("norm", [None, HIDDEN, HIDDEN // 2])
@pytest.mark.parametrize("attention", [Attention, WithProcessor])
def test_registered_modules_are_exact_at_ratio_one_and_restored_afterwards(attention, norm, tokens):
    register_transformer(Transformer, "layers.*", grid)
    model = Transformer(attention, norm)
    dense = model(tokens)
    attributes = [dict(vars(layer)) for layer in model.layers]
    enable_vsa(model, 1.0)
    torch.testing.assert_close(model(tokens), dense, atol=1e-4, rtol=1e-4)
    enable_vsa(model, 0.3, block_size=(2, 4, 4))
    assert relative_error(model(tokens).detach(), dense.detach()) > 1e-4
    shorter = tokens[:, :2]
    assert torch.isfinite(model(shorter)).all()
    disable_vsa(model)
    assert model(tokens).equal(dense)
    assert [vars(layer) for layer in model.layers] == attributes


def test_a_name_registers_too_and_subclasses_are_served(tokens):
    class Named(Transformer):
        pass

    class Derived(Named):
        pass

    register_transformer("Named", "layers.1", grid)
    assert list(find_family(Derived()).video_modules(Derived())) == ["layers.1"]


def test_without_a_grid_the_video_shape_must_be_given(tokens, caplog):
    register_transformer(Transformer, "layers.*")
    model = Transformer()
    dense = model(tokens)
    enable_vsa(model, 0.3, block_size=(2, 4, 4))
    assert model(tokens).equal(dense)
    assert "layers.0-1 runs dense: the video shape could not be read" in caplog.text
    enable_vsa(model, 0.3, video_shape=SHAPE, block_size=(2, 4, 4))
    assert relative_error(model(tokens).detach(), dense.detach()) > 1e-4


def test_arguments_that_nobody_explained_run_dense(tokens, caplog):
    register_transformer(Transformer, "layers.*", grid)
    model = Transformer(scale=0.5)
    dense = model(tokens)
    enable_vsa(model, 0.3)
    assert model(tokens).equal(dense)
    assert "the call has more arguments than hidden_states" in caplog.text


def test_a_project_function_gets_the_arguments_of_the_call(tokens, caplog):
    def project(attn, hidden_states, scale):
        projections = (attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))
        query, key, value = (x.unflatten(-1, (2, -1)) for x in projections)
        return query * scale * query.shape[-1] ** 0.5, key, value

    register_transformer(Transformer, "layers.*", grid, project=project)
    model = Transformer(scale=0.5)
    dense = model(tokens)
    enable_vsa(model, 1.0)
    with caplog.at_level(logging.INFO, "vsa_diffusers"):
        torch.testing.assert_close(model(tokens), dense, atol=1e-4, rtol=1e-4)
    assert "runs dense" not in caplog.text


def test_a_whole_processor_may_be_given_but_not_with_a_project_function(tokens):
    class Twice(FamilyAttnProcessor):
        def __call__(self, attn, hidden_states):
            return 2 * self.original(attn, hidden_states)

    register_transformer(Transformer, "layers.*", grid, processor=Twice)
    model = Transformer()
    single = model.layers[0](tokens.flatten(1, 3))
    enable_vsa(model)
    assert model.layers[0](tokens.flatten(1, 3)).equal(2 * single)
    with pytest.raises(ValueError, match="project= and processor= were both given"):
        register_transformer(Transformer, "layers.*", grid, processor=Twice, project=lambda attn, hidden_states: None)


@pytest.mark.parametrize("attention", [Attention, WithProcessor])
def test_gates_are_added_trained_saved_and_loaded(attention, tokens, tmp_path):
    register_transformer(Transformer, "layers.*", grid)
    model = Transformer(attention)
    assert add_gate_compress(model) == ["layers.0", "layers.1"]
    enable_vsa(model, 0.3, combine="gate")
    model(tokens).square().sum().backward()
    assert all(layer.to_gate_compress.weight.grad.any() for layer in model.layers)
    nn.init.normal_(model.layers[1].to_gate_compress.weight)
    other = Transformer(attention)
    load_gates(other, save_gates(model, tmp_path))
    assert other.layers[1].to_gate_compress.weight.equal(model.layers[1].to_gate_compress.weight)


def test_processors_can_be_had_for_modules_that_take_them(tokens):
    register_transformer(Transformer, "layers.*", grid)
    model = Transformer(WithProcessor)
    dense = model(tokens)
    processors = VSAAttnProcessor.for_transformer(model, top_k_ratio=1.0, video_shape=SHAPE)
    assert list(processors) == [f"{name}.processor" for name in attention_modules(model)]
    for name, processor in processors.items():
        model.get_submodule(name.removesuffix(".processor")).processor = processor
    torch.testing.assert_close(model(tokens), dense, atol=1e-4, rtol=1e-4)


def test_modules_without_a_processor_need_enable_vsa():
    register_transformer(Transformer, "layers.*", grid)
    with pytest.raises(ValueError, match="Transformer has video self-attention without a processor; use enable_vsa"):
        VSAAttnProcessor.for_transformer(Transformer(), video_shape=SHAPE)


def test_a_copy_of_an_enabled_model_is_independent(tokens):
    register_transformer(Transformer, "layers.*", grid)
    model = enable_vsa(Transformer(), 0.3, block_size=(2, 4, 4))
    sparse = model(tokens)
    twin = copy.deepcopy(model)
    dense = disable_vsa(copy.deepcopy(model))(tokens)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert twin(tokens).equal(sparse)
    assert disable_vsa(twin)(tokens).equal(dense)


def test_a_forward_that_a_hook_set_on_the_module_comes_back(tokens):
    register_transformer(Transformer, "layers.*", grid)
    model = Transformer()
    hooked = [lambda *args, layer=layer: 3 * Attention.forward(layer, *args) for layer in model.layers]
    for layer, forward in zip(model.layers, hooked, strict=True):
        layer.forward = forward
    dense = model(tokens)
    enable_vsa(model, 0.3, video_shape=(1, 1, 1))
    disable_vsa(model)
    assert [layer.forward for layer in model.layers] == hooked
    assert model(tokens).equal(dense)


def test_an_unknown_transformer_is_told_how_to_register():
    class Unknown(nn.Module):
        pass

    with pytest.raises(ValueError, match="Teach your own class with register_transformer"):
        enable_vsa(Unknown())
    with pytest.raises(ValueError, match="teach your own class with register_transformer"):
        add_gate_compress(Unknown())
    register_transformer(Unknown, "layers.*")
    with pytest.raises(ValueError, match="Unknown has no module whose name matches"):
        enable_vsa(Unknown())
