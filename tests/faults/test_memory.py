"""Memory stays flat: over enabling and disabling, over calls of changing sizes, and over runs of a pipeline."""

import gc
import logging
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tiny_models import RECIPES, run
from tiny_pipelines_video import TINY, PipelineRecipe, embeddings, wan
from vsa_diffusers import VSAAttnProcessor, disable_vsa, enable_vsa, set_top_k_ratio

WAN = RECIPES[0]
STATM = Path("/proc/self/statm")
PAGE = 4096


@dataclass(frozen=True)
class Memory:
    """What is alive: objects that the garbage collector knows, bytes that Python allocated, and resident bytes."""

    objects: int
    traced: int
    resident: int

    @classmethod
    def now(cls):
        for _ in range(2):  # finalizers may leave more
            gc.collect()
        resident = int(STATM.read_text().split()[1]) * PAGE if STATM.exists() else 0
        return cls(len(gc.get_objects()), tracemalloc.get_traced_memory()[0], resident)


def growth(work, warm, times):
    """What `times` calls of `work`, each with its number, leave behind after `warm` of them."""
    # From the beginning: what takes an older entry's place in a table is no growth, but the older one must be known.
    tracemalloc.start()
    try:
        for number in range(warm + 1):
            work(number)
        before = Memory.now()
        for number in range(warm + 1, warm + times):
            work(number)
        after = Memory.now()
    finally:
        tracemalloc.stop()
    grown = Memory(*(getattr(after, name) - getattr(before, name) for name in vars(after)))
    print(f"{times} calls of {work.__name__} after {warm}: {grown}")
    return grown


def size(number, different):
    """The latent grid of a call, among so many (at most 2 000) `different` ones, small and large in turn."""
    number = number * 997 % different
    return 1 + number % 5, 2 * (2 + number // 5 % 20), 2 * (2 + number // 100 % 20)


def enabling(model):
    def enable_and_disable(number):
        enable_vsa(model, 0.1 + number % 9 / 10, dense_steps=number % 2)
        set_top_k_ratio(model, 0.5)
        disable_vsa(model)

    return enable_and_disable


def enabling_again(model):
    def enable_again(number):
        enable_vsa(model, 0.1 + number % 9 / 10, block_size=(1, 2, 2 + number % 3))

    return enable_again


def setting_processors(model):
    processor, stock = VSAAttnProcessor(top_k_ratio=0.3), model.attn_processors

    def set_processors(number):
        model.set_attn_processor(processor if number % 2 else VSAAttnProcessor.for_transformer(model, top_k_ratio=0.3))
        run(model, WAN, (1, 4, 4))
        model.set_attn_processor(dict(stock))
        run(model, WAN, (1, 4, 4))

    return set_processors


def changing_sizes(different):
    def make(model):
        enable_vsa(model, 0.3)

        def call_with_another_size(number):
            run(model, WAN, size(number, different))

        return call_with_another_size

    return make


def training_on_changing_sizes(different):
    def make(model):
        enable_vsa(model, 0.3).train().enable_gradient_checkpointing()

        def forward_and_backward(number):
            torch.manual_seed(1)
            model(**WAN.inputs(size(number, different)), return_dict=False)[0].square().mean().backward()
            model.zero_grad()

        return forward_and_backward

    return make


def running_a_pipeline(_):
    pipe = enable_vsa(PipelineRecipe("WanPipeline", wan(), dict).build(), 0.3, dense_steps=1)
    options = TINY | dict(num_inference_steps=2, guidance_scale=1.0, output_type="latent")

    def run_pipeline(number):
        pipe(**embeddings(), **options | dict(height=32 + 16 * (number % 3)))

    return run_pipeline


def making_pipelines(model):
    def enable_on_a_new_model(number):
        run(enable_vsa(WAN.build(), 0.3), WAN, (1, 4, 4))

    return enable_on_a_new_model


# What is done, how often to begin with, and how often then; the rest for longer alone.
CASES = {
    "enable and disable": (enabling, 10, 50),
    "changing sizes": (changing_sizes(10), 10, 30),
    "training on changing sizes": (training_on_changing_sizes(5), 5, 10),
    "pipeline runs": (running_a_pipeline, 2, 8),
}
# The look-up tables of the package are full after some hundreds of sizes.
LONG = {
    "enable and disable": (enabling, 100, 10_000),
    "enable again": (enabling_again, 100, 2000),
    "set processors": (setting_processors, 50, 300),
    "changing sizes": (changing_sizes(2000), 1000, 2000),
    "training on changing sizes": (training_on_changing_sizes(300), 300, 300),
    "pipeline runs": (running_a_pipeline, 20, 100),
    "new models": (making_pipelines, 20, 300),
}


def assert_flat(make, warm, times):
    grown = growth(make(WAN.build()), warm, times)
    # What Python and PyTorch themselves keep: some objects, and the look-up tables of sizes anew.
    assert grown.objects < 30 + times // 8
    assert grown.traced < 250_000 + 20 * times
    # The allocator keeps some of what it was given back.
    assert grown.resident < 64 * 2**20


@pytest.fixture(autouse=True)
def no_messages(caplog):
    """pytest keeps the records of all of them."""
    caplog.set_level(logging.CRITICAL, "vsa_diffusers")


@pytest.mark.parametrize("name", CASES)
def test_memory_is_flat(name):
    assert_flat(*CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_memory_stays_flat_over_thousands(name):
    assert_flat(*LONG[name])


def test_a_leak_would_be_seen():
    kept = []

    def leak(number):
        kept.append([number])

    assert growth(leak, 5, 100).objects > 50  # not all 99: what other tests left may go meanwhile
