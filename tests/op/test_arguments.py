"""Arguments that are refused, by name, before any work; and the unusual ones that are taken."""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from vsa_diffusers import video_sparse_attention
from vsa_diffusers.tiles import check_video_shape

NAN, INFINITY = float("nan"), float("inf")
SHAPE, TOKENS, HEADS, HEAD_DIM = (4, 4, 6), 96, 2, 8
WHOLE = (1, TOKENS, HEADS, HEAD_DIM)


def zeros(*shape, **options):
    return torch.zeros(shape or WHOLE, **options)


NO_TENSORS = [None, [], [[1.0]], "query", 3, 1.5, True, np.zeros(WHOLE), {}, object()]
NO_THREE_SIZES = [
    (), (4,), (4, 4), (4, 4, 4, 4), (4, 4, 0), (-4, 4, 4), (4, 4, 4.5), (4, 4, NAN), (4, 4, INFINITY), (4, 4, "4"),
    (4, 4, None), (4, 4, True), (True, True, True), (4, 4, np.True_), (4, 4, 4j), (4, 4, (4,)), (4, 4, Decimal(4)),
    {4, 5, 6}, frozenset((4, 5, 6)), {4: 0, 5: 0, 6: 0}, {4: 0, 5: 0, 6: 0}.keys(), 444, 4.0, b"\x04\x04\x04",
    torch.tensor(4), torch.ones(3, 3), torch.tensor([4.5, 4, 4]), torch.tensor([True, True, True]), np.array(4),
    object(),
]  # fmt: skip
NO_TWO_COUNTS = [
    None, 0, 5, (), (0,), (0, 0, 0), (0, -1), (0, 0.5), (0.5, 0), (0, NAN), (0, "0"), "00", ("0", "0"), (False, False),
    (0, True), {0, 1}, {0: 0, 1: 1}, (0, None), (0, 0j), b"\x00\x00", torch.tensor(0), object(),
]  # fmt: skip
NO_CHOICE = [None, 0, True, "", "Mean", ["mean"], ("torch",), b"torch", np.array(["torch", "mean"]), object()]
NO_DTYPE = [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn]

# Argument, values, and what the message says.
TABLE = [
    ("query", NO_TENSORS, "query must be a tensor"),
    ("key", NO_TENSORS, "key must be a tensor"),
    ("value", NO_TENSORS, "value must be a tensor"),
    ("gate", NO_TENSORS[1:], "gate must be a tensor"),
    ("context_mask", NO_TENSORS[1:], "context_mask must be a tensor"),
    ("video_shape", NO_THREE_SIZES, "video_shape="),
    ("video_shape", [None], "video_shape must be set"),
    ("video_shape", ["444", "auto"], "must be three positive integers"),
    ("video_shape", [(4, 4, 5)], "video_shape=(4, 4, 5) has 4 * 4 * 5 = 80 tokens"),
    ("video_shape", [(10**30, 1, 1)], "but the sequence holds 96"),
    ("block_size", NO_THREE_SIZES, "block_size="),
    ("block_size", [None], "must be three positive integers"),
    ("block_size", ["444", "largest", ""], "is unknown; choose one of 'auto'"),
    ("block_size", [(8, 8, 8)], "512 tokens; at most 128"),
    ("top_k_ratio", [0, 0.0, -0.5, 1.5, 2, NAN, INFINITY, None, "0.5", True, False, np.True_, [0.5], (0.5,)], "(0, 1]"),
    ("top_k_ratio", [0.5j, Decimal("0.5"), torch.tensor(0.5), np.array([0.5]), object()], "top_k_ratio="),
    ("top_k", [0, -1, 1.5, NAN, INFINITY, "3", True, False, np.True_, [3], (3,), {3}, 3j], "top_k="),
    ("top_k", [Decimal(3), torch.tensor(1.5), torch.tensor([3]), torch.tensor(True), np.array([3]), object()], "whole"),
    ("scale", [NAN, INFINITY, -INFINITY, 10**400, 1e300, "0.1", "", True, False, np.True_], "must be a finite number"),
    ("scale", [torch.tensor(0.1, requires_grad=True)], "requires a gradient"),
    ("scale", [[0.1], (0.1,), {0.1}, {}], "must be a finite number"),
    ("scale", [0.1j, Decimal("0.1"), np.array([0.1]), np.float32(NAN), object()], "must be a finite number"),
    ("scale", [torch.tensor(NAN), torch.tensor(True), torch.tensor(1j), torch.ones(1)], "must be a finite number"),
    ("context_tokens", NO_TWO_COUNTS, "must be two counts (before, after)"),
    ("context_tokens", [(1, 0), (0, 96)], "context tokens, but the sequence holds 96"),
    ("context_mask", [zeros(1, 4, dtype=torch.bool), zeros(1, 0), zeros(0, dtype=torch.bool)], "context_mask of shape"),
    ("combine", [*NO_CHOICE[1:], "auto", "mix"], "is unknown; choose one of 'gate'"),
    ("combine", ["gate"], 'combine="gate" needs gate='),
    ("selection", [*NO_CHOICE, "auto", "max"], "is unknown; choose one of 'mean', 'quarters'"),
    ("implementation", [*NO_CHOICE, "cuda", "Triton"], "is unknown; choose one of 'auto'"),
    ("gate", [zeros(1, TOKENS, 16), zeros(1, TOKENS, 2, 4), zeros(2, TOKENS, 2, 8), torch.tensor(0.0)], "gate.shape="),
    ("gate", [zeros(device="meta")], "on meta must equal"),
    ("gate", [zeros(dtype=dtype) for dtype in NO_DTYPE], "gate.dtype="),
    ("gate", [zeros().to_sparse()], "gate.layout=torch.sparse_coo is not supported"),
    ("key", [zeros(dtype=dtype) for dtype in (*NO_DTYPE, torch.float16)], "does not match query.dtype=torch.float32"),
    ("key", [zeros(2, TOKENS, 2, 8), zeros(1, 95, 2, 8), zeros(TOKENS, 2, 8)], "does not match query.shape"),
    ("value", [zeros(1, TOKENS, 3, 8), zeros(1, TOKENS, 2, 4), torch.tensor(0.0)], "does not match query.shape"),
    ("value", [zeros(device="meta")], "value.device=meta does not match"),
    ("query", [zeros(TOKENS, 2, 8), torch.tensor(0.0), zeros(1, 1, TOKENS, 2, 8)], "must be [batch, sequence, heads,"),
    ("query", [zeros().to_sparse()], "query.layout=torch.sparse_coo is not supported"),
    ("all three", [zeros(dtype=dtype) for dtype in NO_DTYPE], "query.dtype="),
    ("all three", [zeros(0, TOKENS, 2, 8)], "has batch=0"),
    ("all three", [zeros(1, TOKENS, 0, 8)], "has heads=0"),
    ("all three", [zeros(1, TOKENS, 2, 0)], "has head_dim=0"),
    ("all three", [zeros(1, 0, 2, 8)], "has sequence=0"),
]  # fmt: skip
ROWS = [(argument, value, message) for argument, values, message in TABLE for value in values]


def named(row):
    argument, value, _ = row
    told = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
    return f"{argument}={told}"[:60].split(" at 0x")[0]


def arguments_with(argument, value):
    """A call that is right but for this."""
    tensors = dict.fromkeys(("query", "key", "value"), value if argument == "all three" else zeros())
    return tensors | {"video_shape": SHAPE, "top_k_ratio": 0.5} | ({} if argument == "all three" else {argument: value})


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_a_bad_argument_is_refused_by_name(row):
    argument, value, message = row
    with pytest.raises((ValueError, TypeError)) as refusal:
        video_sparse_attention(**arguments_with(argument, value))
    assert message in str(refusal.value)
    assert ("query" if argument == "all three" else argument) in str(refusal.value)
    raised_in = refusal.traceback[-1].path.name
    assert raised_in in ("arguments.py", "tiles.py")
    assert refusal.traceback[-1].name.startswith(("check_", "_three_"))


def test_the_table_of_bad_arguments_is_long():
    assert len(ROWS) > 250


def test_a_gate_that_is_not_used_is_refused():
    with pytest.raises(ValueError, match="combine='merge' does not use it"):
        video_sparse_attention(**arguments_with("gate", zeros()), combine="merge")


def call(**options):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2 + 4 * 8 * 8, 2, 8, generator=generator) for _ in range(3))
    given = {"video_shape": (4, 8, 8), "context_tokens": (0, 2), "block_size": (2, 4, 4), "combine": "merge"} | options
    return video_sparse_attention(query, key, value, **given)


@pytest.mark.parametrize("kind", [float, np.int64, np.int32, np.uint8, np.float64, np.float32, Fraction, torch.tensor])
def test_whole_numbers_of_any_kind_are_integers_everywhere(kind):
    sizes = {"video_shape": (4, 8, 8), "context_tokens": (0, 2), "block_size": (2, 4, 4)}
    unusual = {name: tuple(kind(size) for size in value) for name, value in sizes.items()}
    assert call(**unusual, top_k=kind(3)).equal(call(top_k=3))
    assert [type(size) for size in check_video_shape(unusual["video_shape"])] == [int] * 3


@pytest.mark.parametrize("kind", [np.float64, np.float32, Fraction])
def test_ratios_and_scales_may_be_real_numbers_of_any_kind(kind):
    assert call(top_k_ratio=kind(0.375), scale=kind(0.25)).equal(call(top_k_ratio=0.375, scale=0.25))
    assert call(top_k_ratio=np.float32(0.3)).equal(call(top_k_ratio=0.3))


@pytest.mark.parametrize("kind", [list, iter, np.array, torch.tensor])
def test_sizes_may_come_in_anything_that_has_an_order(kind):
    options = {name: kind(value) for name, value in (("video_shape", (4, 8, 8)), ("block_size", (2, 4, 4)))}
    assert call(**options, context_tokens=kind([0, 2])).equal(call())


def test_a_scale_of_zero_is_zero():
    query, key, value = (torch.randn(1, 32, 1, 8) for _ in range(3))
    output = video_sparse_attention(query, key, value, (2, 4, 4), top_k_ratio=1, scale=0, combine="sparse")
    assert torch.allclose(output, value.mean(1, keepdim=True).expand_as(value), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gate_may_be_of_another_floating_dtype(dtype):
    query, gate = torch.randn(1, 32, 1, 8).bfloat16(), torch.randn(1, 32, 1, 8, dtype=dtype)
    expected = video_sparse_attention(query, query, query, (2, 4, 4), gate=gate.bfloat16())
    assert video_sparse_attention(query, query, query, (2, 4, 4), gate=gate).equal(expected)
