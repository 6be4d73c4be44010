"""What is said by default, where, and how often."""

import contextlib
import io
import logging
import sys

import pytest
import torch

from tiny_models import RECIPES, run
from tiny_pipelines_video import TINY, PipelineRecipe, embeddings, wan, wan22
from vsa_diffusers import enable_vsa, set_top_k_ratio
from vsa_diffusers.calls import Tally
from vsa_diffusers.logs import StderrHandler, show_messages
from vsa_diffusers.record import LOGGED_GRIDS, MOST_GRIDS

WAN = RECIPES[0]
GRID = (5, 10, 12)
PACKAGE = logging.getLogger("vsa_diffusers")


@contextlib.contextmanager
def plain_logging():
    """Logging as a program finds it that has not configured any; pytest has handlers of its own."""
    level = PACKAGE.level
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger(), "handlers", [])
        patch.setattr(PACKAGE, "handlers", [each for each in PACKAGE.handlers if isinstance(each, StderrHandler)])
        try:
            yield patch
        finally:
            PACKAGE.setLevel(level)  # not by the patch: loggers remember what they are enabled for


@pytest.fixture
def lines(caplog):
    """The messages so far, at INFO and above."""
    caplog.set_level(logging.INFO, "vsa_diffusers")
    return lambda *words: [each.message for each in caplog.records if all(word in each.message for word in words)]


def test_what_is_enabled_is_seen_by_default_and_stdout_is_left_alone(capsys):
    with plain_logging():
        enable_vsa(WAN.build(), 0.3)
    printed = capsys.readouterr()
    assert printed.err.count("2 of 2 video self-attention modules are sparse") == 1
    assert printed.out == ""


def test_a_program_with_a_log_of_its_own_gets_every_record_once_and_nothing_is_printed_beside(capsys):
    log = io.StringIO()
    with plain_logging():
        logging.basicConfig(stream=log, format="own %(message)s")
        enable_vsa(WAN.build(), 0.3)
    assert log.getvalue().count("own WanTransformer3DModel (Wan): 2 of 2") == 1
    assert capsys.readouterr().err == ""


def test_a_handler_of_ones_own_on_the_package_is_enough(capsys):
    with plain_logging():
        PACKAGE.addHandler(logging.NullHandler())
        enable_vsa(WAN.build(), 0.3)
    assert capsys.readouterr().err == ""


def test_one_line_silences_it_and_leaves_warnings(capsys):
    with plain_logging():
        logging.getLogger("vsa_diffusers").setLevel(logging.WARNING)
        run(enable_vsa(WAN.build(), 0.3, block_size=(1, 2, 2), dense_steps=1), WAN, GRID)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("WARNING vsa_diffusers: WanTransformer3DModel: dense_steps cannot be counted")


def test_other_ranks_than_the_first_are_quiet(capsys):
    with plain_logging() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        for rank in (1, 0):
            patch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            PACKAGE.warning("on rank %d", rank)
    assert capsys.readouterr().err == "WARNING vsa_diffusers: on rank 0\n"


def test_a_program_without_stderr_goes_on():
    with plain_logging() as patch:
        patch.setattr(sys, "stderr", None)
        [handler] = PACKAGE.handlers
        failed = []
        patch.setattr(handler, "handleError", failed.append)
        PACKAGE.warning("nobody sees this")
    assert failed == []


def test_the_handler_and_a_level_that_was_set_before_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(PACKAGE, "handlers", [])
    monkeypatch.setattr(PACKAGE, "level", logging.ERROR)
    show_messages()
    show_messages()
    assert [type(each) for each in PACKAGE.handlers] == [StderrHandler]
    assert PACKAGE.level == logging.ERROR


def test_enabling_says_what_is_sparse_how_and_what_stays_dense(lines):
    enable_vsa(WAN.build(), top_k=3, block_size=(4, 4, 4), dense_layers=(0,))
    assert lines() == [
        "WanTransformer3DModel (Wan): 1 of 2 video self-attention modules are sparse: blocks.1.attn1 with top_k=3, "
        "combine='merge', selection='quarters', block_size=(4, 4, 4). Dense: blocks.0.attn1; cross-attention."
    ]


def test_two_experts_that_are_alike_are_one_line(lines):
    enable_vsa(PipelineRecipe("WanPipeline", wan22(), dict).build(), 0.3)
    [line] = lines()
    assert line.startswith("transformer, transformer_2 (Wan): 2 of 2 video self-attention modules are sparse")


def test_modules_with_different_settings_are_told_apart_or_counted(lines):
    patterns = {f"blocks.{n}.attn1": dict(top_k_ratio=(n + 1) / 10) for n in range(2)}
    enable_vsa(WAN.build(), config=patterns)
    assert lines("blocks.0.attn1 with top_k_ratio=0.1", "blocks.1.attn1 with top_k_ratio=0.2")


def test_a_new_grid_is_told_once_whatever_the_ratio(lines):
    model = enable_vsa(WAN.build(), 0.3, block_size=(2, 4, 4))
    for ratio, grid in ((0.3, GRID), (0.5, GRID), (0.5, (4, 16, 16)), (0.3, GRID)):
        run(set_top_k_ratio(model, ratio), WAN, grid)
    first, second = lines("grid ")
    assert first.startswith(
        "WanTransformer3DModel: grid 5x5x6, 150 tokens in 12 tiles of 2x4x4 (61% padding), of which each keeps 4 (33%)"
        "; combine='merge', selection='quarters'; PyTorch, not the Triton kernels: they "
    )
    assert "grid 4x8x8, 256 tokens in 8 tiles of 2x4x4 (0% padding), of which each keeps 4 (50%)" in second


def test_layers_that_keep_different_numbers_share_a_line(lines):
    patterns = {f"blocks.{n}.attn1": dict(top_k_ratio=(n + 1) / 4, block_size=(2, 4, 4)) for n in range(2)}
    run(enable_vsa(WAN.build(), config=patterns), WAN, GRID)
    [line] = lines("grid ")
    assert "of which each keeps 3 to 6 (25% to 50%)" in line


def test_grids_without_end_are_neither_told_nor_remembered_without_end(lines):
    model = enable_vsa(WAN.build(), 0.3, block_size=(1, 2, 2))
    hooks = model.blocks[0].attn1.processor.state.hooks
    for width in range(2, 2 * MOST_GRIDS + 6, 2):
        run(model, WAN, (1, 2, width))
    assert len(lines("grid ")) == LOGGED_GRIDS
    assert len(hooks.record._grids) == MOST_GRIDS


def test_dense_steps_are_one_line_a_run(lines):
    pipe = enable_vsa(PipelineRecipe("WanPipeline", wan(), dict).build(), 0.3, dense_steps=0.5)
    for _ in range(2):
        pipe(**embeddings(), **TINY | dict(num_inference_steps=3, guidance_scale=3.0, output_type="latent"))
    assert lines("steps run dense") == ["transformer: 2 of 3 steps run dense, from the first on (dense_steps=0.5)."] * 2
    assert not lines("runs dense")


def test_a_reason_is_told_of_the_modules_that_are_new_to_it(lines):
    model = enable_vsa(WAN.build(), 0.3)
    hooks = model.blocks[0].attn1.processor.state.hooks
    processors = hooks.sparse_processors()
    for names in (["blocks.0.attn1"], ["blocks.0.attn1", "blocks.1.attn1"], ["blocks.1.attn1"]):
        tally = Tally()
        for name in names:
            tally.add_dense("mask", "the call has an attention mask", name)
        hooks.record.add("model", tally, processors)
    assert lines("runs dense") == [f"blocks.{n}.attn1 runs dense: the call has an attention mask." for n in range(2)]
