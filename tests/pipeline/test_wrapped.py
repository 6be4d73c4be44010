"""VSA on what people put around a transformer, and processors that are set by hand."""

import gc
import types
import weakref

import pytest
import torch
import torch.distributed as dist

from oracle import relative_error
from tiny_models import RECIPES, run
from vsa_diffusers import VSAAttnProcessor, disable_vsa, enable_vsa
from vsa_diffusers.pipeline import unwrap
from vsa_diffusers.processor import FamilyAttnProcessor

WAN, LTX2 = RECIPES[0], next(recipe for recipe in RECIPES if recipe.name == "ltx2")
GRID = (5, 10, 12)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def peft_model(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))


WRAPPERS = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "DDP": torch.nn.parallel.DistributedDataParallel,
    "DataParallel": torch.nn.DataParallel,
    "compiled DDP": lambda model: torch.compile(torch.nn.parallel.DistributedDataParallel(model), backend="eager"),
    "DDP of a compiled": lambda model: torch.nn.parallel.DistributedDataParallel(torch.compile(model, backend="eager")),
    "peft": peft_model,
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if "compile" in name else ()) for name in WRAPPERS],
)
def test_a_wrapped_transformer_is_served(name, one_process):
    torch._dynamo.reset()
    wrapped = WRAPPERS[name](WAN.build())
    dense = run(wrapped, WAN, GRID)
    assert enable_vsa(wrapped, 1.0) is wrapped
    assert isinstance(unwrap(wrapped).blocks[0].attn1.processor, FamilyAttnProcessor)
    exact = run(wrapped, WAN, GRID)
    sparse = run(enable_vsa(wrapped, 0.3), WAN, GRID)
    assert relative_error(exact, dense) < 1e-4 < relative_error(sparse, dense)
    torch.testing.assert_close(run(disable_vsa(wrapped), WAN, GRID), dense, atol=1e-5, rtol=0)


def test_fsdp_is_served(one_process):
    model = WAN.build()
    expected = run(enable_vsa(model, 0.3), WAN, GRID)
    disable_vsa(model)
    torch.distributed.fsdp.fully_shard(model)
    found = run(enable_vsa(model, 0.3), WAN, GRID)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_one_processor_tells_video_layers_by_their_place():
    model, other = LTX2.build(), enable_vsa(LTX2.build(), 0.3)
    model.set_attn_processor(VSAAttnProcessor(top_k_ratio=0.3))
    assert run(model, LTX2, GRID).equal(run(other, LTX2, GRID))


def test_one_processor_that_sees_no_transformer_says_what_to_do():
    attn = WAN.build().blocks[0].attn1
    attn.set_processor(VSAAttnProcessor(top_k_ratio=0.2))
    with pytest.raises(ValueError, match=r"cannot tell what grid WanAttention attends over.*pass video_shape="):
        attn(torch.randn(1, 150, 64))


def test_one_processor_used_again_lets_old_modules_go():
    processor = VSAAttnProcessor(top_k_ratio=0.3)
    model = WAN.build()
    model.set_attn_processor(processor)
    run(model, WAN, GRID)
    gone = weakref.ref(model.blocks[0].attn1)
    del model
    gc.collect()
    assert gone() is None
    model = WAN.build()
    model.set_attn_processor(processor)
    assert run(model, WAN, GRID).equal(run(enable_vsa(WAN.build(), 0.3), WAN, GRID))


def test_hooks_of_processors_set_by_hand_leave_with_them():
    model = WAN.build()
    stock = model.attn_processors
    before = run(model, WAN, GRID)
    for make in (lambda: VSAAttnProcessor.for_transformer(model, top_k_ratio=0.3), VSAAttnProcessor):
        model.set_attn_processor(make())
        assert not run(model, WAN, GRID).equal(before)
        model.set_attn_processor(dict(stock))
        assert run(model, WAN, GRID).equal(before)
        assert run(model, WAN, GRID).equal(before)
        assert not model._forward_pre_hooks
        assert not model._forward_hooks


def test_processors_set_by_hand_take_dense_steps_per_transformer():
    model = WAN.build()
    dense = run(model, WAN, GRID)
    model.set_attn_processor(VSAAttnProcessor.for_transformer(model, top_k_ratio=0.3, dense_steps=1))
    timesteps, outputs = [2, 1, 0], []
    for i, t in enumerate(timesteps):  # noqa: B007 - read by the transformer's hooks
        outputs.append(run(model, WAN, GRID))
    assert [output.equal(dense) for output in outputs] == [True, False, False]


def test_enabling_over_a_processor_set_by_hand_keeps_it_for_later():
    model = WAN.build()
    dense = run(model, WAN, GRID)
    mine = VSAAttnProcessor(top_k_ratio=0.1)
    model.set_attn_processor(mine)
    run(model, WAN, GRID)
    enable_vsa(model, 0.9, dense_steps=1.0)
    timesteps = [0]
    for i, t in enumerate(timesteps):  # noqa: B007 - read by the transformer's hooks
        torch.testing.assert_close(run(model, WAN, GRID), dense, atol=1e-5, rtol=0)
    assert disable_vsa(model).blocks[0].attn1.processor is mine


def test_the_reasons_that_are_remembered_are_few(monkeypatch):
    model = enable_vsa(WAN.build(), 0.3)
    wrong = types.SimpleNamespace(
        grid=lambda *_: ((1, 2, 3), None), segments=lambda *_: None, prepare=lambda transformer: None
    )
    monkeypatch.setattr(model._vsa_installation.hooks, "family", wrong)
    for height in range(8, 60, 2):
        run(model, WAN, (1, height, 8))
    record = model._vsa_installation.hooks.record
    assert set(record.reasons) == set(record.dense) == {"tokens"}
    assert record._told == {("tokens", f"blocks.{n}.attn1") for n in range(2)}


def test_processors_of_their_own_for_each_module_share_the_hooks():
    model, other = WAN.build(), enable_vsa(WAN.build(), 0.3)
    model.set_attn_processor({name: VSAAttnProcessor(top_k_ratio=0.3) for name in model.attn_processors})
    for _ in range(2):
        assert run(model, WAN, GRID).equal(run(other, WAN, GRID))


def test_enabling_over_a_processor_that_was_never_called():
    model, other = WAN.build(), enable_vsa(WAN.build(), 0.3)
    mine = VSAAttnProcessor(top_k_ratio=0.1)
    model.set_attn_processor(mine)
    assert run(enable_vsa(model, 0.3), WAN, GRID).equal(run(other, WAN, GRID))
    assert disable_vsa(model).blocks[0].attn1.processor is mine
    model.set_attn_processor(VSAAttnProcessor.for_transformer(model, top_k_ratio=0.3))
    assert run(model, WAN, GRID).equal(run(other, WAN, GRID))
