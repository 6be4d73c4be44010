import json
import logging

import diffusers
import pytest
import torch

from vsa_diffusers.bench.full_size import FULL_SIZES
from vsa_diffusers.bench.measure import machine
from vsa_diffusers.bench.transformers import blocks_compiled, cells, main, shallow
from vsa_diffusers.models import find_family


@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="runs where torch sees no GPU (CUDA_VISIBLE_DEVICES= pytest), where it takes seconds",
)
def test_it_measures_every_transformer_and_writes_json(tmp_path, capsys, caplog):
    path = tmp_path / "transformers.json"
    with caplog.at_level(logging.INFO, "vsa_diffusers"):
        rows = main(["--tiny", "--json", str(path)])
    assert [(row["model"], row["what"]) for row in rows] == [
        (name, what) for name in FULL_SIZES for what in ("dense default", "merge 0.2", "gate 0.2")
    ]
    assert all(row["seconds"] > 0 for row in rows)
    written = json.loads(path.read_text())
    assert len(written["rows"]) == len(rows)
    assert written["machine"] == machine("cpu")
    assert "runs dense" not in caplog.text
    printed = capsys.readouterr().out
    assert "cannot run" not in printed
    assert all(name in printed for name in FULL_SIZES)


def test_memory_is_in_billions_of_bytes_as_the_headings_say():
    row = {"model": "", "what": "", "runs": 1, "seconds": 1.0, "speedup": None}
    assert cells(row | {"peak_bytes": 4_502_632_960, "weights_bytes": 2_890_126_848})[-3:] == ["4.5", "1.6", "2.9"]
    assert cells(row | {"peak_bytes": None, "weights_bytes": 1})[-3:] == ["", "", ""]


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs where torch sees no GPU (CUDA_VISIBLE_DEVICES= pytest)")
def test_full_sizes_need_a_gpu():
    with pytest.raises(SystemExit, match="pass --tiny"):
        main([])


# (published parameters in units of 1e9, video tokens)
PUBLISHED = {
    "wan1.3b-480p": (1.42, 32_760),
    "ltx2-512p": (18.88, 6_144),
    "ltx2-1080p": (18.88, 32_640),
    "cogvideox5b-480p": (5.57, 17_550),
    "wan14b-720p": (14.29, 75_600),
    "hunyuan-720p": (12.82, 118_800),
}


@pytest.mark.parametrize("name", FULL_SIZES)
def test_a_full_size_has_its_checkpoint_s_parameters_and_accepts_its_inputs(name):
    size = FULL_SIZES[name]
    model = size.build("meta", torch.bfloat16)
    parameters, tokens = PUBLISHED[name]
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 2) == parameters
    inputs = size.make_inputs(model.config, "meta", torch.bfloat16)
    frames, height, width = find_family(model).read_grid(model, inputs)
    assert (frames, height, width) == size.video_shape()
    assert frames * height * width == tokens
    with torch.no_grad(), shallow(model):
        assert model(**inputs, return_dict=False)[0].shape == inputs["hidden_states"].shape


@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="runs where torch sees no GPU (CUDA_VISIBLE_DEVICES= pytest), where it takes seconds",
)
def test_blocks_are_compiled_in_the_dense_and_the_sparse_model(monkeypatch):
    compiled = []
    monkeypatch.setattr(
        diffusers.WanTransformer3DModel, "compile_repeated_blocks", lambda self, **options: compiled.append(options)
    )
    rows = main(
        ["--tiny", "--models", "wan1.3b-480p", "--combines", "merge", "--compile", "--block-size", "4", "4", "4"]
    )
    assert compiled == 2 * [{"fullgraph": True, "mode": "default"}]
    assert [(row["compile"], row["block_size"]) for row in rows] == 2 * [("default", ["4", "4", "4"])]


@pytest.mark.parametrize(
    ("name", "stack"), [("wan1.3b-480p", "blocks"), ("cogvideox5b-480p", "transformer_blocks")]
)  # of the second diffusers does not say which blocks are repeated
def test_compiled_blocks_are_as_before_afterwards(name, stack):
    model = FULL_SIZES[name].build("cpu", torch.float32, tiny=True)
    with blocks_compiled(model, "default"):
        assert all(block._compiled_call_impl is not None for block in getattr(model, stack))
        assert model._compiled_call_impl is None
    assert all(block._compiled_call_impl is None for block in getattr(model, stack))
