"""`vsa_status`: what it says of a pipeline, and what it has counted."""

import copy
import dataclasses
import json
import pickle
import threading
from html.parser import HTMLParser

import pytest
import rich.console
import torch
import torch._dynamo.testing
from diffusers import AutoencoderKL, FirstBlockCacheConfig

from tiny_models import RECIPES, call, run
from tiny_pipelines_video import TINY, PipelineRecipe, embeddings, wan, wan22
from vsa_diffusers import VSAAttnProcessor, VSAConfig, add_gate_compress, disable_vsa, enable_vsa, vsa_status
from vsa_diffusers.calls import Tally
from vsa_diffusers.record import DENSE_STEP, MOST_KINDS, OTHER, Record
from vsa_diffusers.wording import grouped, settings

WAN = RECIPES[0]
LTX = next(recipe for recipe in RECIPES if recipe.name == "ltx")
GRID = (5, 10, 12)
STEPS = dict(num_inference_steps=4, guidance_scale=1.0, output_type="latent")


def status(model):
    [transformer] = vsa_status(model).transformers
    return transformer


def counts(model):
    now = status(model)
    return now.forwards, now.sparse_calls, dict(now.dense_calls), now.unseen_calls


def without_grid(inputs):
    return inputs | dict(num_frames=1, height=1, width=1, video_coords=torch.rand(2, 3, 5 * 10 * 12))


@pytest.fixture(scope="module")
def ran():
    """A pipeline after a run with dense steps and a dense layer, with gates that were never trained."""
    pipe = PipelineRecipe("WanPipeline", wan(), dict).build()
    add_gate_compress(pipe.transformer)
    enable_vsa(pipe, 0.3, block_size=(2, 4, 4), dense_steps=1, dense_layers=(0,))
    pipe(**embeddings(), **TINY | STEPS)
    return pipe


def test_it_says_what_is_sparse_how_and_what_ran(ran):
    now = status(ran)
    assert (now.name, now.model, now.family, now.enabled_by) == (
        "transformer", "WanTransformer3DModel", "Wan", "enable_vsa",
    )  # fmt: skip
    [group] = now.sparse
    assert group.modules == ("blocks.1.attn1",)
    assert (group.config.top_k_ratio, group.config.combine, group.config.selection) == (0.3, "merge", "quarters")
    assert now.dense == ("blocks.0.attn1",)
    assert now.gates == (2, 0)
    [grid] = now.grids
    assert grid.tokens == torch.tensor(grid.video_shape).prod()
    assert grid.kept == -(-3 * grid.tiles // 10)
    assert (now.forwards, now.sparse_calls, now.dense_calls, now.unseen_calls) == (4, 3, {DENSE_STEP: 1}, 0)
    assert now.implementation == "torch"
    assert "16 bits on a GPU, and query is torch.float32 on cpu" in now.obstacle


def test_it_is_ready_for_json(ran):
    values = vsa_status(ran).to_dict()
    assert json.loads(json.dumps(values)) == values
    transformer = values["transformers"]["transformer"]
    assert transformer["sparse"][0]["settings"]["block_size"] == [2, 4, 4]
    assert transformer["dense_calls"] == {DENSE_STEP: 1}


class Cells(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, _):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_print_rich_and_a_notebook_show_the_same_rows(ran):
    now = vsa_status(ran)
    rows = list(now.transformers[0].rows())
    cells = Cells(now._repr_html_())
    assert cells.open == []
    assert cells.texts[1:] == [cell for row in rows for cell in row]
    console = rich.console.Console(width=500, record=True)
    with console.capture() as captured:
        console.print(now)
    for label, text in rows:
        assert label in str(now)
        assert text in captured.get()
    assert str(now) == repr(now)


def test_a_transformer_on_which_vsa_is_not_enabled_is_said_to_be_so():
    model = WAN.build()
    for now in (vsa_status(model), vsa_status(disable_vsa(enable_vsa(model, 0.3)))):
        assert not now.enabled
        assert "not enabled; call enable_vsa(pipe)" in str(now)
        assert now.transformers[0].dense == ("blocks.0.attn1", "blocks.1.attn1")


def test_what_vsa_does_not_serve_is_said_to_be_so():
    now = vsa_status(AutoencoderKL(block_out_channels=(32,), norm_num_groups=8))
    assert now.transformers == ()
    assert "AutoencoderKL has no supported video transformer" in " ".join(str(now).split())
    assert Cells(now._repr_html_()).texts == [now.reason]
    with pytest.raises(TypeError, match="neither a diffusers pipeline nor a transformer"):
        vsa_status("Wan")


def test_before_the_first_call_it_says_what_to_expect():
    now = status(enable_vsa(WAN.build().bfloat16(), 0.3))
    assert (now.implementation, now.sparse_calls, now.grids) == ("torch", 0, ())
    assert dict(now.rows())["runs in"].startswith("expected: PyTorch, not the Triton kernels: they need")
    impossible = dict(status(enable_vsa(WAN.build().bfloat16(), 0.3, implementation="triton")).rows())["runs in"]
    assert impossible.startswith('implementation="triton": the kernels cannot run here')


def test_compiled_calls_are_counted_like_others_and_make_no_graph_of_their_own():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = enable_vsa(WAN.build(), 0.3)
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    for _ in range(4):
        run(model, WAN, GRID)
        vsa_status(model)
    assert counts(model) == (4, 8, {}, 0)
    assert counter.frame_count == 1


def test_dense_steps_of_compiled_code_are_counted_though_it_does_not_say_them():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    model = enable_vsa(WAN.build(), 0.3, dense_steps=2)
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    timesteps = torch.arange(4)
    for i, t in enumerate(timesteps):  # noqa: B007
        run(model, WAN, GRID)
    assert counts(model) == (4, 4, {DENSE_STEP: 4}, 0)
    assert counter.frame_count == 2


@pytest.fixture(params=["eager", "compiled"])
def gated(request):
    """A model of three layers with trained gates, the last two sparse after two dense steps."""
    torch._dynamo.reset()
    model = dataclasses.replace(WAN, config=WAN.config | {"num_layers": 3}).build()
    add_gate_compress(model)
    for block in model.blocks:
        torch.nn.init.normal_(block.attn1.to_gate_compress.weight)
    enable_vsa(model, 0.3, dense_steps=2, dense_layers=(0,))
    if request.param == "compiled":
        for block in model.blocks:
            block.compile(backend="eager", fullgraph=True)
    return model


def test_dense_calls_with_the_coarse_branch_of_a_gate_are_no_sparse_ones(gated):
    timesteps = torch.arange(5)
    for i, t in enumerate(timesteps):  # noqa: B007
        run(gated, WAN, GRID)
    assert counts(gated) == (5, 6, {DENSE_STEP: 4}, 0)
    now = status(gated)
    assert [group.modules for group in now.sparse] == [("blocks.1.attn1", "blocks.2.attn1")]
    assert now.dense == ("blocks.0.attn1",)
    assert now.gates == (3, 3)


def test_a_model_whose_layers_all_stay_dense_with_their_gates_has_no_sparse_call():
    model = WAN.build()
    add_gate_compress(model)
    for block in model.blocks:
        torch.nn.init.normal_(block.attn1.to_gate_compress.weight)
    enable_vsa(model, 0.3, dense_layers=(0,))
    model.blocks[1].attn1.set_processor(type(model.blocks[0].attn2.processor)())
    run(model, WAN, GRID)
    now = status(model)
    assert (now.enabled_by, now.sparse, now.dense) == ("enable_vsa", (), ("blocks.0.attn1",))
    assert counts(model) == (1, 0, {}, 0)


def test_calls_without_a_grid_are_counted_with_the_reason():
    model = enable_vsa(LTX.build(), 0.3)
    with torch.no_grad():
        for _ in range(2):
            model(**without_grid(LTX.inputs(GRID)))
    forwards, sparse, dense, unseen = counts(model)
    assert (forwards, sparse, unseen) == (2, 0, 0)
    [(reason, count)] = dense.items()
    assert reason.startswith("the video shape could not be read")
    assert count == 4


def test_calls_that_a_cache_leaves_out_are_not_counted_as_made():
    pipe = enable_vsa(PipelineRecipe("WanPipeline", wan(), dict).build(), 0.3)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    pipe(**embeddings(), **TINY | STEPS)
    assert counts(pipe) == (4, 5, {}, 3)
    assert "3: in compiled code, or left out by a cache or LayerSkip" in str(vsa_status(pipe))


def test_a_backward_pass_that_runs_blocks_again_counts_nothing():
    model = enable_vsa(WAN.build(), 0.3).train()
    model.enable_gradient_checkpointing()
    call(model, WAN, GRID).square().mean().backward()
    assert counts(model) == (1, 2, {}, 0)


def test_a_forward_that_fails_ends_its_count():
    model = enable_vsa(WAN.build(), 0.3)
    handle = model.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model, WAN, GRID)
    handle.remove()
    run(model, WAN, GRID)
    assert counts(model) == (2, 3, {}, 1)


def test_counts_of_threads_add_up():
    model = enable_vsa(WAN.build(), 0.3)
    threads = [
        threading.Thread(target=lambda grid=grid: [run(model, WAN, grid) for _ in range(10)])
        for grid in (GRID, (3, 20, 10), (6, 12, 14))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts(model) == (30, 60, {}, 0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_goes_on_counting_by_itself(copied):
    model = enable_vsa(WAN.build(), 0.3)
    run(model, WAN, GRID)
    twin = copied(model)
    run(twin, WAN, GRID)
    assert (counts(model)[:2], counts(twin)[:2]) == ((1, 2), (2, 4))


def test_two_experts_and_wrapped_ones_are_told_apart():
    pipe = enable_vsa(PipelineRecipe("WanPipeline", wan22(), dict).build(), 0.3)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    pipe.transformer_2 = torch.nn.DataParallel(pipe.transformer_2)
    now = vsa_status(pipe)
    assert [each.name for each in now.transformers] == ["transformer", "transformer_2"]
    assert [each.enabled_by for each in now.transformers] == ["enable_vsa"] * 2


@pytest.mark.parametrize("for_all", [True, False])
def test_processors_that_were_set_by_hand_are_seen(for_all):
    model = WAN.build()
    one = VSAAttnProcessor(top_k_ratio=0.3)
    model.set_attn_processor(one if for_all else VSAAttnProcessor.for_transformer(model, top_k_ratio=0.3))
    for _ in range(2):
        now = status(model)
        assert (now.enabled_by, now.dense) == ("set_attn_processor", ())
        assert [name for group in now.sparse for name in group.modules] == ["blocks.0.attn1", "blocks.1.attn1"]
        run(model, WAN, GRID)
    assert counts(model)[1] == (2 if for_all else 4)
    model.set_attn_processor(WAN.build().attn_processors)
    assert not vsa_status(model).enabled


def test_processors_that_were_replaced_since_are_named():
    model = enable_vsa(WAN.build(), 0.3)
    model.blocks[1].attn1.set_processor(type(model.blocks[0].attn2.processor)())
    now = status(model)
    assert now.replaced == {"blocks.1.attn1": "WanAttnProcessor"}
    assert [group.modules for group in now.sparse] == [("blocks.0.attn1",)]


def test_reasons_without_end_are_not_remembered_without_end():
    record = Record()
    for n in range(100):
        tally = Tally()
        tally.add_dense(f"kind {n}", f"reason {n}", "attn")
        record.add("model", tally, {})
    assert len(record.dense) == len(record.reasons) == MOST_KINDS + 1
    assert record.dense[OTHER] == 100 - MOST_KINDS
    assert record.reasons[OTHER] == "reason 99"


def test_processors_say_what_they_are():
    model = enable_vsa(WAN.build(), 0.3, block_size=(4, 4, 4))
    assert repr(model.blocks[1].attn1.processor) == (
        "WanVSAProcessor(blocks.1.attn1, top_k_ratio=0.3, combine='merge', selection='quarters', "
        "block_size=(4, 4, 4), schedule='front', dense calls by WanAttnProcessor)"
    )
    assert repr(VSAAttnProcessor(top_k=3, block_size=(4, 4, 4))) == (
        "VSAAttnProcessor(top_k=3, combine='auto', selection='auto', block_size=(4, 4, 4))"
    )


def test_a_field_that_the_config_gets_later_is_shown_where_it_is_set():
    @dataclasses.dataclass(frozen=True)
    class Later(VSAConfig):
        curve: str = "flat"

    assert "curve" not in settings(Later())
    assert settings(Later(curve="steep"))["curve"] == "steep"


@pytest.mark.parametrize(("names", "expected"), [
    ([f"blocks.{n}.attn1" for n in range(30)], "blocks.0-29.attn1"),
    ([f"blocks.{n}.attn1" for n in (7, 0, 2, 3)], "blocks.{0,2-3,7}.attn1"),
    (["attention", "a.0.x.1", "a.1.x.1"], "attention, a.0-1.x.1"),
    ([], ""),
])  # fmt: skip
def test_names_of_one_kind_are_put_together(names, expected):
    assert grouped(names) == expected
