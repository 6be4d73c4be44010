"""Whole calls of the pipelines with joint attention or extra tokens: exact at ratio 1, sparse below, undone after."""

import logging
from types import SimpleNamespace

import diffusers
import pytest
import torch

from oracle import relative_error
from positions import assert_all_steps_are_known, recorded_positions
from tiny_pipelines_context import CONTEXT_PIPELINES, ltx_long
from tiny_pipelines_joint import JOINT_PIPELINES, transformer
from vsa_diffusers import disable_vsa, enable_vsa


def check(pipe, call, caplog, left_out=0):
    """Exact at ratio 1, different and finite below, and undone after; `left_out` steps at the end are not made."""
    dense = call()
    enable_vsa(pipe, 1.0)
    with recorded_positions(pipe) as positions:
        torch.testing.assert_close(call(), dense, atol=1e-3, rtol=1e-3)
    assert_all_steps_are_known(positions, left_out)
    enable_vsa(pipe, 0.3)
    with caplog.at_level(logging.INFO, "vsa_diffusers"):
        sparse = call()
    assert torch.isfinite(sparse).all()
    assert relative_error(sparse, dense) > 1e-5
    assert "runs dense" not in caplog.text
    disable_vsa(pipe)
    assert call().equal(dense)


@pytest.mark.parametrize("case", JOINT_PIPELINES + CONTEXT_PIPELINES, ids=lambda case: case.__name__)
def test_a_whole_call(case, caplog):
    torch.manual_seed(0)
    pipe, inputs = case()
    pipe.set_progress_bar_config(disable=True)

    def call():
        output = pipe(**inputs, output_type="latent", generator=torch.Generator().manual_seed(0), return_dict=False)[0]
        return torch.cat([part.flatten() for part in output])

    # The long pipeline takes its scheduler's last step for the end of the schedule, and does not make it.
    check(pipe, call, caplog, left_out=1 if case is ltx_long else 0)


MINIMAX_H3 = {
    "MiniMaxH3CoreDenoiseStep": dict(),
    "MiniMaxH3FL2VACoreDenoiseStep": dict(
        keyframe_anchors=("first", "last"), condition_latents=[torch.ones(1, 24, 1, 8, 8)] * 2
    ),
    "MiniMaxH3Ref2VACoreDenoiseStep": dict(
        normalized_references=[SimpleNamespace(kind="image"), SimpleNamespace(kind="video", has_audio=True)],
        condition_latents=[torch.ones(1, 24, 1, 6, 4), torch.ones(1, 24, 2, 8, 4)],
        audio_condition_latents=[torch.ones(6, 32)],
    ),
}


@pytest.mark.parametrize("blocks", MINIMAX_H3)
def test_the_denoising_blocks_of_minimax_h3(blocks, caplog):
    module = pytest.importorskip(
        "diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3",
        reason="runs with a diffusers that has MiniMax-H3's blocks; constraints.txt names one",
    )
    pipe = getattr(module, blocks)().init_pipeline()
    schedulers = {name: diffusers.MiniMaxH3Scheduler() for name in ("scheduler", "audio_scheduler")}
    name = "transformer_ref" if "Ref2VA" in blocks else "transformer"
    pipe.update_components(**schedulers, **{name: transformer("minimax-h3", in_channels=24, audio_in_channels=32)})
    pipe.set_progress_bar_config(disable=True)
    inputs = MINIMAX_H3[blocks] | dict(
        prompt_embeds=torch.ones(1, 7, 16), text_token_tags=torch.ones(7, dtype=torch.long), height=128, width=128,
        num_frames=124, num_inference_steps=2,
    )  # fmt: skip
    check(pipe, lambda: pipe(**inputs, generator=torch.Generator().manual_seed(0)).get("latents"), caplog)
