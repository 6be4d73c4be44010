"""VSA and everything else that is stacked on a transformer: one by one, and in pairs, in every order."""

import itertools
import random

import pytest
import torch
from stacked import EFFECTS, EXCLUDED, FEATURES, UNCOPIED, Stack, why_excluded

from oracle import relative_error
from tiny_models import RECIPES
from vsa_diffusers import enable_vsa

GRID, OTHER = (5, 10, 12), (3, 12, 14)
FAMILIES = {recipe.name: recipe for recipe in RECIPES if recipe.name in ("wan", "hunyuan-video")}
# What diffusers does not do for a family.
UNSERVED = {
    ("hunyuan-video", "SeaCache"): "it does not know how to read this transformer's latents",
    ("hunyuan-video", "FasterCache"): "single blocks return one stream only, which the cache does not expect",
}
SAMPLE = 30  # how many pairs the suite tries; none that is compiled, since those take seconds each


def stacked(family, folder, names, ratio=None, place=0):
    """A transformer with these features applied in order; VSA is enabled before the one at `place`, or at the end."""
    torch._dynamo.reset()
    stack = Stack(FAMILIES[family].build(), FAMILIES[family], folder)
    for position in range(len(names) + 1):
        if ratio is not None and position == place:
            stack.enable(ratio)
        if position < len(names):
            FEATURES[names[position]].apply(stack)
    return stack


def assert_exact_and_sparse(family, folder, names, place):
    """At ratio 1.0 as dense with the same features, and different below; returns the dense output."""
    missing = [package for name in names for package in FEATURES[name].missing()]
    if missing:
        packages = " ".join(missing).replace(".", "-")
        pytest.skip(f"runs where {' and '.join(missing)} is installed: pip install {packages}")
    dense = stacked(family, folder, names).denoise(GRID)
    assert torch.isfinite(dense).all()
    stack = stacked(family, folder, names, 1.0, place)
    error = relative_error(stack.denoise(GRID), dense)
    assert error < max(FEATURES[name].tolerance for name in names)
    stack.set_ratio(0.3)
    assert relative_error(stack.denoise(GRID), dense) > max(1e-3, 2 * error)
    return dense


SINGLE = [each for each in itertools.product(FAMILIES, FEATURES) if each not in UNSERVED]
# Tracing HunyuanVideo takes long, and compiled models have tests of their own.
QUICK = [(family, name) for family, name in SINGLE if family == "wan" or FEATURES[name].kind != "compile"]


@pytest.mark.parametrize(("family", "name", "place"), [(*each, number % 2) for number, each in enumerate(QUICK)])
def test_a_feature_is_exact_at_ratio_one_and_sparse_below(family, name, place, tmp_path):
    dense = assert_exact_and_sparse(family, tmp_path, [name], place)
    effect = relative_error(dense, stacked(family, tmp_path, []).denoise(GRID))
    # What is stacked has the effect that it should have, so that the comparison is one.
    assert (effect > 1e-4) == EFFECTS[FEATURES[name].kind]


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 1], ids=["VSA first", "VSA last"])
@pytest.mark.parametrize(("family", "name"), SINGLE)
def test_a_feature_is_exact_whenever_it_is_applied(family, name, place, tmp_path):
    assert_exact_and_sparse(family, tmp_path, [name], place)


def all_pairs():
    """Every two features in both orders, with VSA before, between and after them in turn."""
    places = itertools.cycle(range(3))
    for family in FAMILIES:
        for first, second in itertools.permutations(FEATURES, 2):
            unserved = (family, first) in UNSERVED or (family, second) in UNSERVED
            slow = family != "wan" and is_compiled(first, second)
            if not unserved and not slow and why_excluded(first, second) is None:
                yield family, first, second, next(places)


def is_compiled(*names):
    return "compile" in {FEATURES[name].kind for name in names}


def is_installed(pair):
    return not any(FEATURES[name].missing() for name in pair[1:3])


PAIRS = list(all_pairs())


def sample():
    """A fixed random part of the pairs, among those whose packages the suite always has."""
    chosen = random.Random(0)
    pairs = [pair for pair in PAIRS if not any(FEATURES[name].needs for name in pair[1:3])]
    return chosen.sample([pair for pair in pairs if not is_compiled(*pair[1:3])], SAMPLE)


@pytest.mark.parametrize(("family", "first", "second", "place"), sample())
def test_a_pair_is_exact_at_ratio_one_and_sparse_below(family, first, second, place, tmp_path):
    assert_exact_and_sparse(family, tmp_path, [first, second], place)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "first", "second", "place"), PAIRS)
def test_every_pair_is_exact_at_ratio_one_and_sparse_below(family, first, second, place, tmp_path):
    assert_exact_and_sparse(family, tmp_path, [first, second], place)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "then", "reason"), EXCLUDED, ids=[f"{n}: {rule[2]}" for n, rule in enumerate(EXCLUDED)]
)
def test_pairs_that_exclude_one_another_fail_without_vsa_too(before, then, reason, tmp_path):
    pairs = [pair for pair in itertools.product(sorted(before), sorted(then)) if pair[0] != pair[1]]
    pairs = [pair for pair in pairs if is_installed(("wan", *pair))]
    if not pairs:
        pytest.skip("runs where torchao and optimum-quanto are installed: pip install torchao optimum-quanto")
    assert any(fails("wan", tmp_path / str(number), pair) for number, pair in enumerate(pairs))


@pytest.mark.parametrize("name", ["MagCache", "SeaCache"])
def test_a_copy_that_runs_the_original_s_blocks_is_one_without_vsa_too(name, tmp_path):
    [(caches, _, _)] = UNCOPIED
    assert name in caches
    stack = stacked("wan", tmp_path, [name, "deepcopy"])
    before = stack.denoise(GRID)
    with torch.no_grad():
        for parameter in stack.model.blocks.parameters():
            parameter.zero_()
    assert stack.denoise(GRID).equal(before)


def fails(family, folder, names):
    """Whether the dense model raises, or computes nothing that is a number."""
    folder.mkdir()
    try:
        return not torch.isfinite(stacked(family, folder, list(names)).denoise((2, 4, 4), 2)).all()
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError, OSError):
        return True


CACHES = [name for name in FEATURES if FEATURES[name].kind == "cache"]


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_does_not_shift_the_dense_steps_or_keep_the_last_size(name, tmp_path):
    stack = stacked("wan", tmp_path, [name])
    dense = {grid: stack.denoise(grid) for grid in (GRID, OTHER)}
    calls = []
    enable_vsa(stack.model, 0.3, dense_steps=1)
    attn = stack.base.blocks[0].attn1
    attn.register_forward_pre_hook(lambda *_: calls.append((stack.step, attn.processor.state.dense_step)))
    sparse = {grid: stack.denoise(grid) for grid in (GRID, OTHER, GRID)}
    for grid in dense:
        torch.testing.assert_close(sparse[grid][0], dense[grid][0], atol=1e-4, rtol=0)
        assert relative_error(sparse[grid][1:], dense[grid][1:]) > 1e-3
        fresh = stacked("wan", tmp_path, [name])
        enable_vsa(fresh.model, 0.3, dense_steps=1)
        assert fresh.denoise(grid).equal(sparse[grid])
    assert calls
    assert all(dense_step == (step == 0) for step, dense_step in calls)
