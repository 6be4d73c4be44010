import argparse
from pathlib import Path

import pytest
import torch

from vsa_diffusers.bench.scaling import SIZES, imbalance, settle, shortened


def test_wan14b_at_480p_has_the_weights_of_720p_and_the_tokens_of_480p():
    assert SIZES["wan14b-480p"].video_shape() == SIZES["wan1.3b-480p"].video_shape() == (21, 30, 52)
    assert SIZES["wan14b-480p"].config == SIZES["wan14b-720p"].config


def test_layers_shorten_every_stack():
    model = shortened(SIZES["hunyuan-720p"], 3).build("meta", torch.bfloat16)
    assert (len(model.transformer_blocks), len(model.single_transformer_blocks)) == (3, 3)
    assert len(shortened(SIZES["wan14b-480p"], 2).build("meta", torch.bfloat16).blocks) == 2


def test_imbalance_is_what_the_busiest_has_above_the_mean():
    assert imbalance([3, 3]) == 0
    assert imbalance([1, 2, 3]) == pytest.approx(0.5)


def choices(**given) -> argparse.Namespace:
    """Of a step of training."""
    names = ("models", "what", "ratio", "block_size", "gpus", "context_parallel", "layers", "json")
    return argparse.Namespace(**dict.fromkeys(names) | dict(train=True, runs=3) | given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(runs=0), "--runs 0 leaves nothing to measure; give 1 or more."),
        (dict(layers=0), "--layers 0 leaves nothing to measure; give 1 or more."),
        (dict(json=Path("/nowhere/rows.json")), "--json /nowhere/rows.json: there is no folder /nowhere; make it"),
    ],
)
def test_what_cannot_be_measured_or_kept_is_told_before_anything_runs(given, message):
    with pytest.raises(ValueError, match=message):
        settle(choices(**given), 2)


@pytest.mark.parametrize(("ranks", "gpus"), [(1, []), (2, [2]), (4, [2, 4]), (8, [2, 4, 8])])
def test_all_numbers_of_gpus_up_to_the_processes_are_measured(ranks, gpus):
    args = choices()
    settle(args, ranks)
    assert args.gpus == gpus
    assert (args.models, args.ratio, args.context_parallel) == (["wan14b-480p"], 0.125, min(2, ranks))
