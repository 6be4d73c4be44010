import argparse

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


@pytest.mark.parametrize(("ranks", "gpus"), [(1, []), (2, [2]), (4, [2, 4]), (8, [2, 4, 8])])
def test_all_numbers_of_gpus_up_to_the_processes_are_measured(ranks, gpus):
    open_choices = dict.fromkeys(("models", "what", "ratio", "block_size", "gpus", "context_parallel"))
    args = argparse.Namespace(**open_choices, train=True)
    settle(args, ranks)
    assert args.gpus == gpus
    assert (args.models, args.ratio, args.context_parallel) == (["wan14b-480p"], 0.125, min(2, ranks))
