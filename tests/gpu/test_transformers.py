"""Every supported transformer in bf16 on a GPU, with the Triton kernels: `pytest -m gpu tests/gpu -n 4`."""

import pytest
import torch

from oracle import relative_error
from tiny_models import RECIPES
from vsa_diffusers import VSAConfig, disable_vsa, enable_vsa, video_sparse_attention

DEVICE = "cuda"
GRID = (5, 18, 20)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a machine with a CUDA GPU"),
    pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name),
]
# Angles and coordinates stay in fp32, as pipelines pass them.
PRECISE_INPUTS = {"image_rotary_emb", "video_coords", "position_ids"}
# A row of one attention call in bf16 against fp32; measured: a few 1e-3.
ROW_TOLERANCE = 2e-2
# Scores of tile means have 11 bits on a GPU: of two tiles that score alike the other may be kept, for a tile of rows.
CLOSE_ROWS = 0.95


def build(recipe):
    """In bf16 but for what `from_pretrained` keeps in fp32; all weights are rounded once, so `.float()` is exact."""
    model = recipe.build().bfloat16()
    # With a scale in fp32, diffusers' own Helios processor hands attention a key of another dtype than the query.
    precise = set(model._keep_in_fp32_modules or []) - {"history_key_scale"}
    for name, parameter in model.named_parameters():
        if precise & set(name.split(".")):
            parameter.data = parameter.data.float()
    return model.to(DEVICE)


def place(value, dtype):
    """Tensors, alone or in lists, on the GPU; floating ones rounded to bf16 and given in `dtype`."""
    if isinstance(value, (list, tuple)):
        return type(value)(place(each, dtype) for each in value)
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(DEVICE).bfloat16().to(dtype) if value.is_floating_point() and dtype else value.to(DEVICE)


@torch.no_grad()
def run(model, recipe, dtype=torch.bfloat16):
    torch.manual_seed(1)
    inputs = recipe.inputs(GRID).items()
    inputs = {name: place(value, None if name in PRECISE_INPUTS else dtype) for name, value in inputs}
    output = model(**inputs, return_dict=False)[0]
    return torch.stack(list(output)) if isinstance(output, (list, tuple)) else output


def run_sparse(model, recipe, ratio, implementation, dtype=torch.bfloat16):
    enable_vsa(model, config=VSAConfig(top_k_ratio=ratio, implementation=implementation))
    output = run(model, recipe, dtype)
    disable_vsa(model)
    return output


@pytest.fixture
def calls(monkeypatch):
    """Every call of the op: its tensors, its other arguments, and what it returned."""
    recorded = []

    def spy(query, key, value, video_shape, **options):
        output = video_sparse_attention(query, key, value, video_shape, **options)
        recorded.append(((query, key, value), video_shape, options, output))
        return output

    monkeypatch.setattr("vsa_diffusers.processor.video_sparse_attention", spy)
    return recorded


def share_of_close_rows(actual, expected):
    """Rows are single tokens of single heads: one tile chosen otherwise, on a near-tie, leaves all others close."""
    errors = (actual.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    return int((errors < ROW_TOLERANCE).sum()) / errors.numel()


def test_every_call_agrees_with_pytorch_in_fp32(recipe, calls):
    run_sparse(build(recipe), recipe, 0.2, "triton")
    assert len(calls) == recipe.sparse
    for tensors, shape, options, output in calls:
        assert output.dtype == torch.bfloat16
        precise = [x.float() for x in tensors]
        options = options | {"implementation": "torch"}
        expected = video_sparse_attention(*precise, shape, **options)
        assert share_of_close_rows(output, expected) >= CLOSE_ROWS
        # The tolerance tells sparse from dense, save where an amplified history outweighs the video.
        if recipe.name != "helios-amplified":
            dense = video_sparse_attention(*precise, shape, **options | {"top_k": None, "top_k_ratio": 1.0})
            video = slice(options["context_tokens"][0], output.shape[1] - options["context_tokens"][1])
            assert share_of_close_rows(dense[:, video], expected[:, video]) < 0.5


def test_ratio_one_is_as_near_to_dense_as_bf16_allows(recipe):
    model = build(recipe)
    dense, sparse = run(model, recipe), run_sparse(model, recipe, 1.0, "triton")
    exact = run(model.float(), recipe, torch.float32)
    assert relative_error(sparse, exact) <= 1.5 * relative_error(dense, exact) + 1e-3


def test_a_lower_ratio_errs_no_more_than_pytorch_in_bf16(recipe):
    model = build(recipe)
    ours, reference = (run_sparse(model, recipe, 0.3, implementation) for implementation in ("triton", "torch"))
    exact = run_sparse(model.float(), recipe, 0.3, "torch", torch.float32)
    assert relative_error(ours, exact) <= 1.5 * relative_error(reference, exact) + 1e-3
