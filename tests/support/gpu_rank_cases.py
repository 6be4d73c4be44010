"""What two GPUs have to do as one does, with the kernels, by name."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from diffusers import ContextParallelConfig

from oracle import relative_error
from ranks import averaged
from vsa_diffusers import add_gate_compress, cp_plan, disable_vsa, enable_vsa
from vsa_diffusers.bench.full_size import FULL_SIZES, FullSize

DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
SMALL = {"num_attention_heads": 4, "attention_head_dim": 128, "num_layers": 2}
LATENTS = (16, 32, 32)  # patches of 1 x 2 x 2 make 4096 tokens of it
UNEVEN = (5, 18, 18)  # and 405 of this


def size(name: str, latents: tuple[int, int, int]) -> FullSize:
    """A published transformer's make with few layers, and heads as the kernels have them."""
    full = FULL_SIZES[name]
    more = {"rope_axes_dim": (16, 56, 56), "num_single_layers": 2} if "hunyuan" in name else {}
    return replace(full, config=full.config | full.tiny | SMALL | more, latents=latents)


def pair(name: str, gates: bool, uneven: bool = False):
    """A model and its inputs, the same on every rank."""
    latents = UNEVEN if uneven else LATENTS
    torch.manual_seed(0)
    model = size(name, latents).build(DEVICE, DTYPE)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith((".to_q.weight", ".to_k.weight")):
            parameter.data.mul_(4)  # so that attention is not nearly uniform
    if gates:
        add_gate_compress(model)
        for parameter_name, parameter in model.named_parameters():
            if "to_gate_compress" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.02)
    return model, size(name, latents).make_inputs(model.config, DEVICE, DTYPE)


def forward(model, inputs) -> torch.Tensor:
    return model(**inputs, return_dict=False)[0]


def spread(model, **options) -> None:
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, **options), cp_plan=cp_plan(model))


@torch.no_grad()
def equals_one_gpu(name: str, gates: bool = False, uneven: bool = False, **options) -> None:
    """Three times, since launches that were recorded are made again from the second call on."""
    model, inputs = pair(name, gates, uneven)
    enable_vsa(model, **{"top_k_ratio": 0.3, "block_size": (4, 4, 4)} | options)
    expected = forward(model, inputs)
    spread(model, ulysses_anything=uneven)
    for _ in range(3):
        error = relative_error(forward(model, inputs), expected)
        assert error < 2e-2, error


@torch.no_grad()
def dense_equals_one_gpu(name: str) -> None:
    model, inputs = pair(name, False)
    expected = forward(model, inputs)
    enable_vsa(model, 0.2)
    spread(model)
    forward(model, inputs)
    error = relative_error(forward(disable_vsa(model), inputs), expected)
    assert error < 2e-2, error


def trains_as_one_gpu(name: str, gates: bool = False, compiled: bool = False) -> None:
    found = []
    for over_two in (False, True):
        model, inputs = pair(name, gates)
        model.train().requires_grad_(True)
        enable_vsa(model, 0.3, block_size=(4, 4, 4))
        if over_two:
            spread(model)
        if compiled:
            model.compile_repeated_blocks()
        forward(model, inputs).float().square().mean().backward()
        gradients = {key: each.grad.float() for key, each in model.named_parameters() if each.grad is not None}
        found.append(averaged(gradients) if over_two else gradients)
    one, two = found
    assert one.keys() == two.keys()
    largest = max(float(gradient.norm()) for gradient in one.values())
    wrong = {
        key: error
        for key, gradient in one.items()
        if (error := float((two[key] - gradient).norm())) > 0.05 * float(gradient.norm()) + 1e-3 * largest
    }
    assert not wrong, wrong


WAN, HUNYUAN = "wan1.3b-480p", "hunyuan-720p"
CASES = {
    "wan, merge": functools.partial(equals_one_gpu, WAN),
    "wan, sparse alone by means": functools.partial(equals_one_gpu, WAN, combine="sparse", selection="mean"),
    "wan, gates": functools.partial(equals_one_gpu, WAN, gates=True),
    "wan, blocks that fit": functools.partial(equals_one_gpu, WAN, block_size="auto"),
    "wan, 405 tokens": functools.partial(equals_one_gpu, WAN, uneven=True),
    "hunyuan, merge": functools.partial(equals_one_gpu, HUNYUAN),
    "hunyuan, 405 tokens": functools.partial(equals_one_gpu, HUNYUAN, uneven=True),
    "wan, dense": functools.partial(dense_equals_one_gpu, WAN),
    "hunyuan, dense": functools.partial(dense_equals_one_gpu, HUNYUAN),
    "wan trains": functools.partial(trains_as_one_gpu, WAN),
    "wan trains with gates": functools.partial(trains_as_one_gpu, WAN, gates=True),
    "wan trains compiled": functools.partial(trains_as_one_gpu, WAN, compiled=True),
    "hunyuan trains": functools.partial(trains_as_one_gpu, HUNYUAN),
}
