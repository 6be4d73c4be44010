"""What is counted from modules is what a forward computes."""

import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tiny_models import RECIPES
from vsa_diffusers.planning.costs import count

GRID = (6, 20, 24)
PATCHES_OF_ONE = {"ltx": (4, 12, 16), "hunyuan-video-1.5": (4, 12, 16)}  # which have as many tokens as latents
# Without history, references or image tokens, which are not counted; batch of the recipe's inputs.
COUNTED = {"wan": 2, "wan-vace": 2, "ltx": 2, "ltx2": 2, "hunyuan-video": 2, "hunyuan-video-1.5": 2, "cogvideox-5b": 2,
           "mochi": 2, "easyanimate": 2, "motif-video": 2, "minimax-h3": 1, "cosmos3": 1, "skyreels-v2": 2,
           "anyflow": 2, "cosmos-predict2": 2, "allegro": 2, "kandinsky5": 2, "kandinsky6": 2}  # fmt: skip
TEXT = 8


@pytest.mark.parametrize("recipe", [each for each in RECIPES if each.name in COUNTED], ids=lambda each: each.name)
def test_the_flops_of_a_forward_are_counted(recipe):
    model = recipe.build()
    latents = PATCHES_OF_ONE.get(recipe.name, GRID)
    inputs = recipe.inputs(latents)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs, return_dict=False)
    costs, grid, batch = count(model), recipe.video_shape(latents), COUNTED[recipe.name]
    assert len(costs.layers) == recipe.sparse
    counted = costs.attention_flops(grid, batch, TEXT) + costs.other_flops(grid, batch, TEXT)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_a_checkpoint_has_the_parameters_that_its_name_says(models):
    said = {name: re.search(r"[-_](\d+(?:\.\d+)?)[bB](?:-|$)", model.name) for name, model in models.items()}
    said = {name: float(match[1]) for name, match in said.items() if match}
    assert len(said) >= 6
    # What the name counts may leave out embedders, or be rounded.
    assert {name: models[name].costs.parameters / 1e9 for name in said} == pytest.approx(said, rel=0.25)


def test_attention_takes_the_larger_share_the_longer_the_video(models):
    costs = models["wan"].costs
    shares = [costs.attention_share(grid, 1, 512) for grid in ((5, 30, 52), (21, 30, 52), (21, 45, 80))]
    assert shares == sorted(shares)
    assert all(0 < share < 1 for share in shares)


def test_every_family_has_layers_and_heads(models):
    for name, model in models.items():
        assert model.costs.layers, name
        assert model.costs.head_dim in (64, 96, 128), name
        assert model.costs.video_parameters < model.costs.parameters, name
