"""`enable_vsa` and `disable_vsa` on pipelines: what they change, what they refuse, and what they leave behind."""

import copy
import logging
import types

import pytest
import torch
import torch._dynamo.testing
from diffusers import (
    AutoencoderKL,
    UNet2DModel,
)

from oracle import relative_error
from tiny_models import RECIPES, run
from vsa_diffusers import (
    VSA_DEFAULT,
    VSAAttnProcessor,
    VSAConfig,
    add_gate_compress,
    disable_vsa,
    enable_vsa,
    set_top_k_ratio,
    video_sparse_attention,
)
from vsa_diffusers.models import attention_modules
from vsa_diffusers.pipeline import enabled_config
from vsa_diffusers.processor import FamilyAttnProcessor
from vsa_diffusers.tiles import fitting_block_size

WAN, LTX = RECIPES[0], next(recipe for recipe in RECIPES if recipe.name == "ltx")
GRID = (5, 10, 12)


class Pipe:
    """The part of a pipeline that counts here: named components as attributes."""

    def __init__(self, **components):
        self.components = components
        self.__dict__.update(components)


def state_of(model):
    return (
        {name: id(module.processor) for name, module in attention_modules(model).items()},
        len(model._forward_pre_hooks),
        sorted(model.__dict__),
        list(model.state_dict()),
    )


def is_sparse(model):
    return [isinstance(m.processor, FamilyAttnProcessor) for m in attention_modules(model).values()]


def test_every_transformer_of_a_pipeline_is_served_and_missing_ones_are_skipped():
    pipe = Pipe(transformer=WAN.build(), transformer_2=WAN.build(), vae=torch.nn.Linear(1, 1), tokenizer=None)
    assert enable_vsa(pipe, top_k_ratio=0.2) is pipe
    assert sum(is_sparse(pipe.transformer)) == sum(is_sparse(pipe.transformer_2)) == 2
    assert disable_vsa(pipe) is pipe
    assert not any(is_sparse(pipe.transformer) + is_sparse(pipe.transformer_2))
    only_second = Pipe(transformer=None, transformer_2=WAN.build())
    enable_vsa(only_second)
    assert any(is_sparse(only_second.transformer_2))


def test_enabling_again_reconfigures_and_disabling_twice_is_harmless():
    model = WAN.build()
    before = state_of(model)
    enable_vsa(model, 0.2)
    enable_vsa(model, 0.7, block_size=(2, 4, 8), modules=["blocks.0.*"])
    processors = [
        m.processor for m in attention_modules(model).values() if isinstance(m.processor, FamilyAttnProcessor)
    ]
    assert [(p.name, p.config.top_k_ratio, p.config.block_size) for p in processors] == [
        ("blocks.0.attn1", 0.7, (2, 4, 8))
    ]
    assert not isinstance(processors[0].original, FamilyAttnProcessor)
    disable_vsa(model)
    disable_vsa(model)
    assert state_of(model) == before


def test_after_another_resolution_a_call_gives_what_it_gives_first_of_all():
    grids = (GRID, (3, 8, 20), (7, 12, 8), GRID)
    model = WAN.build()
    dense = {grid: run(model, WAN, grid) for grid in grids}
    enable_vsa(model, 1.0)
    for grid in grids:
        torch.testing.assert_close(run(model, WAN, grid), dense[grid], atol=1e-4, rtol=0)
    enable_vsa(model, 0.3)
    for grid in grids:
        first = run(enable_vsa(WAN.build(), 0.3), WAN, grid)
        assert run(model, WAN, grid).equal(first)
        assert relative_error(first, dense[grid]) > 1e-4


def test_two_models_in_one_process_do_not_touch_each_other():
    sparse, sparser, dense = WAN.build(), WAN.build(), WAN.build()
    enable_vsa(sparse, 0.6)
    alone = run(sparse, WAN, GRID)
    enable_vsa(sparser, 0.1, block_size=(2, 4, 4))
    run(sparser, WAN, (3, 12, 8))
    assert run(sparse, WAN, GRID).equal(alone)
    assert relative_error(run(sparser, WAN, GRID), alone) > 1e-4
    disable_vsa(sparser)
    assert run(sparser, WAN, GRID).equal(run(dense, WAN, GRID))
    assert run(sparse, WAN, GRID).equal(alone)


def test_an_exception_inside_a_forward_leaves_no_state_behind(monkeypatch):
    model = WAN.build()
    enable_vsa(model, 0.3)
    expected = run(model, WAN, GRID)
    with monkeypatch.context() as patch:
        patch.setattr(model.blocks[1], "forward", types.MethodType(lambda *_, **__: 1 / 0, model.blocks[1]))
        with pytest.raises(ZeroDivisionError):
            run(model, WAN, (3, 12, 8))
    assert run(model, WAN, GRID).equal(expected)
    disable_vsa(model)
    assert run(model, WAN, GRID).equal(run(WAN.build(), WAN, GRID))


def test_a_copied_model_is_independent_of_its_origin():
    model = WAN.build()
    enable_vsa(model, 0.3)
    twin = copy.deepcopy(model)
    expected = run(model, WAN, GRID)
    run(model, WAN, (3, 12, 8))
    assert run(twin, WAN, GRID).equal(expected)
    disable_vsa(twin)
    assert any(is_sparse(model))
    assert not any(is_sparse(twin))


def test_a_processor_that_the_user_set_meanwhile_is_kept():
    model = WAN.build()
    enable_vsa(model)
    mine = type(model.blocks[0].attn2.processor)()
    model.blocks[0].attn1.set_processor(mine)
    disable_vsa(model)
    assert model.blocks[0].attn1.processor is mine
    assert not any(is_sparse(model))


def test_the_config_argument_takes_all_forms():
    for config in (
        VSAConfig(top_k_ratio=0.3),
        {"*": {"top_k_ratio": 0.3}},
        {"sparse_cfg": {"*": {"top_k_ratio": 0.3}}},
    ):
        model = WAN.build()
        enable_vsa(model, config=config)
        output = run(model, WAN, GRID)
        enable_vsa(model, 0.3)
        assert output.equal(run(model, WAN, GRID))
    enable_vsa(model, config=VSA_DEFAULT)
    assert sum(is_sparse(model)) == 2


def test_the_selection_reaches_the_operator(monkeypatch):
    seen = set()

    def spy(*args, **options):
        seen.add(options["selection"])
        return video_sparse_attention(*args, **options)

    monkeypatch.setattr("vsa_diffusers.processor.video_sparse_attention", spy)
    model = enable_vsa(WAN.build(), 0.3, selection="mean")
    mean = run(model, WAN, GRID)
    quarters = run(enable_vsa(model, 0.3, selection="quarters"), WAN, GRID)
    assert seen == {"mean", "quarters"}
    assert not quarters.equal(mean)


def test_the_selection_is_by_quarters_unless_gates_were_trained():
    model = WAN.build()
    assert run(enable_vsa(model, 0.3), WAN, GRID).equal(run(enable_vsa(model, 0.3, selection="quarters"), WAN, GRID))
    add_gate_compress(model)
    torch.nn.init.ones_(model.blocks[0].attn1.to_gate_compress.bias)
    chosen = [block.attn1.processor.config for block in enable_vsa(model, 0.3).blocks]
    assert [(each.combine, each.selection) for each in chosen] == [("gate", "mean"), ("merge", "quarters")]
    gates = [block.attn1.processor.config for block in enable_vsa(model, 0.3, combine="gate").blocks]
    assert {each.selection for each in gates} == {"mean"}


REFUSED = {
    "neither": (lambda: "a string", {}, TypeError, "pipe=str is neither a diffusers pipeline nor a transformer"),
    "no video transformer": (
        lambda: Pipe(unet=UNet2DModel(block_out_channels=(32,), down_block_types=("DownBlock2D",),
                                      up_block_types=("UpBlock2D",))),
        {}, ValueError, "Pipe has no supported video transformer (found: UNet2DModel); supported are: ",
    ),
    "not a transformer": (lambda: torch.nn.Linear(2, 2), {}, ValueError, "Linear has no supported video transformer"),
    "gate without gates": (WAN.build, dict(combine="gate"), ValueError, "blocks.0.attn1 has no to_gate_compress"),
    "unknown selection": (WAN.build, dict(selection="best"), ValueError, "selection='best' is unknown"),
    "unknown combine": (WAN.build, dict(combine="mix"), ValueError, "combine='mix' is unknown"),
    "ratio": (WAN.build, dict(top_k_ratio=float("nan")), ValueError, "top_k_ratio=nan"),
    "block": (WAN.build, dict(block_size=(4, 4, 40)), ValueError, "at most 128"),
    "video shape": (WAN.build, dict(video_shape=(1, 2)), ValueError, "video_shape=(1, 2)"),
    "module pattern": (WAN.build, dict(modules=["nothing"]), ValueError, "'nothing', which matches no video"),
    "layer": (WAN.build, dict(dense_layers=[7]), ValueError, "dense_layers=(7,)"),
    "config and arguments": (
        WAN.build, dict(config=VSAConfig(dense_layers=(0,)), dense_layers=(1,)), ValueError,
        "dense_layers=(1,) contradicts dense_layers=(0,) of config",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_call_names_the_mend_and_changes_nothing(name):
    make, arguments, error, message = REFUSED[name]
    target = make()
    model = target.components.get("transformer", torch.nn.Identity()) if isinstance(target, Pipe) else target
    before = state_of(model) if isinstance(model, torch.nn.Module) else None
    with pytest.raises(error) as raised:
        enable_vsa(target, **arguments)
    assert message in str(raised.value)
    assert before is None or state_of(model) == before


def test_a_refused_second_transformer_leaves_the_first_as_it_was():
    first, second = WAN.build(), WAN.build()
    add_gate_compress(first)
    before = state_of(first), state_of(second)
    with pytest.raises(ValueError, match="to_gate_compress"):
        enable_vsa(Pipe(transformer=first, transformer_2=second), combine="gate")
    assert (state_of(first), state_of(second)) == before


def test_a_wrong_video_shape_is_an_error_before_any_attention():
    model = WAN.build()
    enable_vsa(model, 0.3, video_shape=(5, 5, 7))
    with pytest.raises(ValueError, match=r"blocks.0.attn1: video_shape=\(5, 5, 7\) has 175 tokens, but .* sees 150"):
        run(model, WAN, GRID)
    enable_vsa(model, 0.3, video_shape=(5, 5, 6))
    explicit = run(model, WAN, GRID)
    enable_vsa(model, 0.3)
    assert run(model, WAN, GRID).equal(explicit)


def test_the_processor_alone_checks_the_video_shape_that_it_is_given():
    with pytest.raises(ValueError, match="unknown keys"):
        VSAAttnProcessor(ratio=0.2, video_shape=(5, 5, 6))
    model = WAN.build()
    model.set_attn_processor(VSAAttnProcessor(top_k_ratio=0.2, video_shape=(5, 5, 7)))
    with pytest.raises(ValueError, match="has 175 tokens, but the attention sees 150"):
        run(model, WAN, GRID)


def test_the_processor_refuses_attention_it_does_not_know():
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    vae.set_attn_processor(VSAAttnProcessor(top_k_ratio=0.2, video_shape=(1, 4, 4)))
    with pytest.raises(ValueError, match="attn=Attention does not tell VSAAttnProcessor which model family it serves"):
        vae(torch.randn(1, 3, 32, 32))


def test_calls_that_cannot_be_sparse_run_dense_and_say_why_once(caplog):
    model = LTX.build()
    dense = run(model, LTX, GRID)
    enable_vsa(model, 0.3)
    inputs = LTX.inputs

    def without_grid(grid):
        return inputs(grid) | dict(num_frames=1, height=1, width=1, video_coords=torch.rand(2, 3, 5 * 10 * 12))

    odd = copy.copy(LTX)
    object.__setattr__(odd, "inputs", without_grid)
    with caplog.at_level(logging.INFO, "vsa_diffusers"):
        for _ in range(3):
            run(model, odd, GRID)
    lines = [record.message for record in caplog.records if "runs dense" in record.message]
    assert len(lines) == 1
    assert lines[0].startswith("transformer_blocks.0-1.attn1 runs dense: the video shape could not be read")
    assert relative_error(run(model, LTX, GRID), dense) > 1e-4


def test_an_attention_mask_means_dense(caplog):
    model = WAN.build()
    attn = model.blocks[0].attn1
    hidden, mask = torch.randn(1, 150, 64), torch.ones(1, 1, 150, 150, dtype=torch.bool).tril()
    expected = attn(hidden, None, mask)
    enable_vsa(model, 0.1, video_shape=(5, 5, 6))
    with caplog.at_level(logging.WARNING, "vsa_diffusers"):
        assert attn(hidden, None, mask).equal(expected)
    assert "blocks.0.attn1 runs dense: the call has an attention mask" in caplog.text


def test_dense_layers_stay_dense():
    model = WAN.build()
    enable_vsa(model, 0.3, dense_layers=(0,))
    assert not isinstance(model.blocks[0].attn1.processor, FamilyAttnProcessor)
    assert isinstance(model.blocks[1].attn1.processor, FamilyAttnProcessor)


def test_backend_and_parallel_settings_reach_the_dense_processor():
    model = WAN.build()
    enable_vsa(model, 0.3)
    processor = model.blocks[0].attn1.processor
    model.set_attention_backend("native")
    assert processor.original._attention_backend is not None
    assert processor._attention_backend is processor.original._attention_backend
    processor._parallel_config = marker = object()
    assert processor.original._parallel_config is marker


def test_fused_projections_give_the_same():
    model = WAN.build()
    enable_vsa(model, 0.3)
    expected = run(model, WAN, GRID)
    model.fuse_qkv_projections()
    torch.testing.assert_close(run(model, WAN, GRID), expected, atol=1e-5, rtol=0)


def test_lora_adapters_act_on_sparse_attention_and_gates():
    from peft import LoraConfig

    model = WAN.build()
    add_gate_compress(model)
    enable_vsa(model, 0.3, combine="gate")
    expected = run(model, WAN, GRID)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_gate_compress"], init_lora_weights=False))
    assert relative_error(run(model, WAN, GRID), expected) > 1e-4
    model.disable_adapters()
    torch.testing.assert_close(run(model, WAN, GRID), expected, atol=1e-6, rtol=0)


@pytest.fixture
def counter():
    """Counts compiled graphs, where the installed diffusers and torch can compile the dense model at all."""
    torch._dynamo.reset()
    model = WAN.build()
    model.compile(backend="eager", fullgraph=True)
    try:
        run(model, WAN, GRID)
    except torch._dynamo.exc.Unsupported as error:
        why = str(error).splitlines()[0]
        pytest.skip(f"runs with a torch and diffusers that compile the dense model, as in constraints.txt: {why}")
    torch._dynamo.reset()
    return torch._dynamo.testing.CompileCounter()


def test_a_compiled_transformer_has_no_graph_break_and_does_not_recompile_for_new_sizes(counter):
    grids = [GRID, (6, 12, 14), (7, 14, 18), (8, 16, 22)]
    assert len({fitting_block_size((t, h // 2, w // 2)) for t, h, w in grids}) == len(grids)
    model = WAN.build()
    enable_vsa(model, 0.5)
    expected = [run(model, WAN, grid) for grid in grids]
    model.compile(backend=counter, fullgraph=True)
    for grid, output in zip(grids, expected, strict=True):
        torch.testing.assert_close(run(model, WAN, grid), output, atol=1e-5, rtol=0)
    # Once for the first size, and once more with dynamic sizes: as often as the dense model. PyTorch 2.6 takes the
    # sizes of tensors that a module's parts hold for constants.
    assert counter.frame_count == (len(grids) if torch.__version__.startswith("2.6.") else 2)


def test_dense_steps_compile_twice_and_no_more(counter):
    model = enable_vsa(WAN.build(), 0.5, dense_steps=2, schedule="constant")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    timesteps = list(range(12))
    for i, t in enumerate(timesteps):  # noqa: B007 - read by the transformer's hooks
        run(compiled, WAN, GRID)
    assert counter.frame_count == 2


def test_the_ratio_can_change_without_enabling_anew():
    model = enable_vsa(WAN.build(), config=VSAConfig(top_k=3, combine="merge"))
    other = enable_vsa(WAN.build(), 0.2, combine="merge")
    processor = model.blocks[0].attn1.processor
    assert set_top_k_ratio(model, 0.2) is model
    assert model.blocks[0].attn1.processor is processor
    assert run(model, WAN, GRID).equal(run(other, WAN, GRID))
    assert enabled_config(model) == enabled_config(other)
    with pytest.raises(ValueError, match="top_k_ratio=0 must be in"):
        set_top_k_ratio(model, 0)
    with pytest.raises(ValueError, match="VSA is not enabled on WanTransformer3DModel; call enable_vsa first"):
        set_top_k_ratio(disable_vsa(model), 0.2)


@pytest.mark.parametrize("name", ["wan", "ltx", "hunyuan-video", "cosmos-predict2"])
def test_autocast_computes_as_dense_attention_does(name):
    recipe = next(recipe for recipe in RECIPES if recipe.name == name)
    model = recipe.build()
    with torch.autocast("cpu", torch.bfloat16):
        dense = run(model, recipe, GRID).float()
        exact = run(enable_vsa(model, 1.0, combine="merge"), recipe, GRID).float()
        sparse = run(enable_vsa(model, 0.3, combine="merge"), recipe, GRID).float()
    assert relative_error(exact, dense) < 0.03
    assert relative_error(sparse, dense) > relative_error(exact, dense)
