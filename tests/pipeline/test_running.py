"""What processors know of the forward that is running belongs to that forward alone."""

import copy
import io
import logging
import multiprocessing
import pickle
import threading

import diffusers
import pytest
import torch
import torch._dynamo.testing
from torch.utils.checkpoint import checkpoint

from oracle import relative_error
from tiny_models import RECIPES, run
from tiny_pipelines_video import TINY, PipelineRecipe, embeddings, wan
from vsa_diffusers import (
    VSAAttnProcessor,
    add_gate_compress,
    disable_vsa,
    enable_vsa,
    load_gates,
    save_gates,
    set_top_k_ratio,
)
from vsa_diffusers.processor import FamilyAttnProcessor

WAN = RECIPES[0]
GRID, OTHER = (5, 10, 12), (3, 20, 10)
assert 5 * 5 * 6 == 3 * 10 * 5  # the same number of tokens, patches being 1 x 2 x 2
RUN = dict(num_inference_steps=3, guidance_scale=1.0, output_type="latent")
SIZES = [dict(height=32, width=32, num_frames=5), dict(height=64, width=48, num_frames=9)]


def together(*functions):
    """Runs them in threads that begin at once, and returns what they return."""
    results, barrier = [None] * len(functions), threading.Barrier(len(functions))

    def work(place):
        barrier.wait()
        try:
            results[place] = functions[place]()
        except Exception as error:
            results[place] = error

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def pipelines(**options):
    first = PipelineRecipe("WanPipeline", wan(), dict).build()
    enable_vsa(first, 0.3, block_size=(2, 2, 2), **options)
    second = diffusers.WanPipeline.from_pipe(first, scheduler=diffusers.UniPCMultistepScheduler(flow_shift=3.0))
    second.set_progress_bar_config(disable=True)
    prompt = embeddings()
    return [
        lambda pipe=pipe, size=size: (
            pipe(**prompt, **TINY | RUN | size, generator=torch.Generator().manual_seed(0)).frames
        )
        for pipe, size in zip((first, second), SIZES, strict=True)
    ]


# Bit for bit with the "native" attention only: "_native_math" and its kin choose PyTorch's kernel for the whole process
# while they run, and thereby the rounding of another thread's attention.
@pytest.mark.parametrize("dense_steps", [0, 1])
def test_pipelines_in_threads_over_one_transformer_are_each_as_if_alone(dense_steps):
    calls = pipelines(dense_steps=dense_steps)
    alone = [call() for call in calls]
    for _ in range(5):
        for ours, own in zip(together(*calls), alone, strict=True):
            assert ours.equal(own), f"differs by {(ours - own).abs().max()} where there is {own.abs().max()}"


def test_compiled_and_in_threads_at_once_is_right():
    torch._dynamo.reset()
    model = enable_vsa(WAN.build(), 0.5)
    inputs = [WAN.inputs(grid) for grid in (GRID, (6, 12, 14))]  # threads would share the random numbers, too

    def work(given):
        with torch.no_grad():
            return [model(**given, return_dict=False)[0] for _ in range(3)]

    expected = [work(given)[0] for given in inputs]
    model.compile(backend="eager", fullgraph=True)
    for given in inputs:
        work(given)
    for outputs, right in zip(together(*[lambda given=given: work(given) for given in inputs]), expected, strict=True):
        for output in outputs:
            torch.testing.assert_close(output, right, atol=1e-5, rtol=0)


@pytest.mark.parametrize("grid", [GRID, OTHER])
def test_a_forward_without_hooks_never_sees_the_last_grid(grid, caplog):
    model = WAN.build()
    dense = run(model, WAN, grid)
    enable_vsa(model, 0.3)
    run(model, WAN, GRID)
    torch.manual_seed(1)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "vsa_diffusers"):
        output = model.forward(**WAN.inputs(grid), return_dict=False)[0]
    assert output.equal(dense)
    assert "blocks.0.attn1 runs dense: no hooks of the transformer ran" in caplog.text


def test_a_compiled_forward_without_hooks_never_sees_the_last_grid():
    torch._dynamo.reset()
    model = WAN.build()
    dense = run(model, WAN, OTHER)
    enable_vsa(model, 0.3)
    for block in model.blocks:
        block.compile(backend="eager")
    run(model, WAN, GRID)
    torch.manual_seed(1)
    with torch.no_grad():
        output = model.forward(**WAN.inputs(OTHER), return_dict=False)[0]
    torch.testing.assert_close(output, dense, atol=1e-5, rtol=0)


def saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [
    lambda model: pickle.loads(pickle.dumps(model)),
    copy.deepcopy,
    saved_and_loaded,
], ids=["pickle", "deepcopy", "torch.save"])  # fmt: skip
def test_a_sparse_model_with_dense_steps_can_be_copied(copied):
    model = enable_vsa(WAN.build(), 0.3, dense_steps=1)
    expected = run(model, WAN, GRID)
    twin = copied(model)
    assert run(twin, WAN, GRID).equal(expected)
    set_top_k_ratio(twin, 1.0)
    assert relative_error(run(twin, WAN, GRID), expected) > 1e-4
    assert run(model, WAN, GRID).equal(expected)
    assert run(disable_vsa(twin), WAN, GRID).equal(run(WAN.build(), WAN, GRID))


def test_a_sparse_model_goes_to_another_process():
    model = enable_vsa(WAN.build(), 0.3, dense_steps=1)
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        output = pool.apply(_run_elsewhere, (model,))
    torch.testing.assert_close(output, run(model, WAN, GRID), atol=1e-6, rtol=0)


def _run_elsewhere(model):
    torch.set_num_threads(1)
    return run(model, WAN, GRID)


def gradients(model, grids, together=False, checkpointed=False):
    """Gradients of the sum of the outputs' squares, by one backward pass for all grids or one for each."""
    model.train().zero_grad()
    if checkpointed:
        model.enable_gradient_checkpointing()
    losses = []
    for grid in grids:
        torch.manual_seed(1)
        losses.append(model(**WAN.inputs(grid), return_dict=False)[0].square().mean())
        if not together:
            losses.pop().backward()
    if together:
        sum(losses).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_checkpointing_runs_blocks_again_on_their_own_grid(compiled):
    torch._dynamo.reset()
    grids = [GRID, (3, 8, 14)]
    expected = gradients(enable_vsa(WAN.build(), 0.3), grids)
    model = enable_vsa(WAN.build(), 0.3)
    if compiled:
        for block in model.blocks:
            block.compile(backend="eager")
    for name, gradient in gradients(model, grids, checkpointed=True).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("compiled", [False, True])
def test_sizes_that_wait_for_one_backward_pass_are_told_apart(compiled):
    torch._dynamo.reset()
    grids = [GRID, OTHER, (3, 8, 14)]
    expected = gradients(enable_vsa(WAN.build(), 0.3), grids)
    model = enable_vsa(WAN.build(), 0.3)
    if compiled:
        for block in model.blocks:
            block.compile(backend="eager")
    for name, gradient in gradients(model, grids, together=True, checkpointed=True).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4, msg=name)


def checkpointed_by_hand(model):
    """A transformer that calls torch's checkpointing itself, as a user's own may."""
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda *args, forward=forward, **kwargs: checkpoint(
            forward, *args, use_reentrant=False, **kwargs
        )
    return model


def test_checkpointing_that_diffusers_does_not_know_finds_the_grid():
    grids = [GRID, (3, 8, 14)]
    expected = gradients(enable_vsa(WAN.build(), 0.3), grids)
    for together_ in (False, True):
        model = checkpointed_by_hand(enable_vsa(WAN.build(), 0.3))
        for name, gradient in gradients(model, grids, together=together_).items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4, msg=name)


def test_checkpointing_that_diffusers_does_not_know_is_refused_where_two_forwards_may_be_meant():
    model = checkpointed_by_hand(enable_vsa(WAN.build(), 0.3))
    with pytest.raises(RuntimeError, match=r"150 tokens again.* call backward\(\) after each forward"):
        gradients(model, [GRID, OTHER], together=True)


def test_disabling_gives_the_transformer_its_own_checkpointing_back():
    model = enable_vsa(WAN.build(), 0.3)
    model.enable_gradient_checkpointing()
    own = model._gradient_checkpointing_func
    gradients(model, [GRID])
    assert model._gradient_checkpointing_func is not own
    assert disable_vsa(model)._gradient_checkpointing_func is own


def test_a_backward_pass_in_another_thread_finds_the_grid():
    model = enable_vsa(WAN.build(), 0.3)
    expected = gradients(model, [GRID])
    model.enable_gradient_checkpointing()
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(**WAN.inputs(GRID), return_dict=False)[0].square().mean()
    together(loss.backward)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-4, msg=name)


def test_twenty_ratios_make_one_graph():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = enable_vsa(WAN.build(), 1.0, block_size=(1, 2, 2))
    model.compile(backend=counter, fullgraph=True)
    for n in range(1, 21):
        set_top_k_ratio(model, n / 20)
        output = run(model, WAN, GRID)
        set_top_k_ratio(eager := enable_vsa(WAN.build(), 1.0, block_size=(1, 2, 2)), n / 20)
        torch.testing.assert_close(output, run(eager, WAN, GRID), atol=1e-5, rtol=0)
    assert counter.frame_count <= 2


def test_a_ratio_for_every_layer_makes_one_graph_for_all_blocks():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = WAN.build()
    config = {f"blocks.{n}.attn1": dict(top_k_ratio=(n + 1) / 10, block_size=(1, 2, 2)) for n in range(2)}
    enable_vsa(model, config=config)
    expected = run(model, WAN, GRID)
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(run(model, WAN, GRID), expected, atol=1e-5, rtol=0)
    assert counter.frame_count <= 2


def test_processors_of_ones_own_that_were_set_since_are_told_once(caplog):
    model = enable_vsa(WAN.build(), 0.3)
    model.blocks[1].attn1.set_processor(type(model.blocks[0].attn2.processor)())
    with caplog.at_level(logging.WARNING, "vsa_diffusers"):
        run(model, WAN, GRID)
        run(model, WAN, GRID)
    [line] = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "1 of 2 sparse modules had their processor replaced" in line
    assert "blocks.1.attn1 (WanAttnProcessor)" in line


class Own:
    """A user's attention processor."""

    def __call__(self, attn, hidden_states, *_, **__):
        return hidden_states


def test_a_processor_of_ones_own_that_gives_way_is_told(caplog):
    model = WAN.build()
    model.blocks[1].attn1.set_processor(Own())
    enable_vsa(model, 0.3)
    assert "blocks.1.attn1 (Own)" in caplog.text
    assert disable_vsa(model).blocks[1].attn1.processor.__class__ is Own


def test_an_interrupt_while_enabling_leaves_nothing_behind(monkeypatch):
    model = enable_vsa(WAN.build(), 0.3)
    before = [block.attn1.processor for block in model.blocks]
    expected = run(model, WAN, GRID)

    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("vsa_diffusers.running.ForwardHooks.register", interrupted)
        with pytest.raises(KeyboardInterrupt):
            enable_vsa(WAN.build(), 0.9)
    calls = iter([None, KeyboardInterrupt])
    put = vars(__import__("vsa_diffusers.pipeline", fromlist=["_put"]))["_put"]

    def put_one(attn, processor):
        if next(calls, None) is KeyboardInterrupt:
            raise KeyboardInterrupt
        put(attn, processor)

    with monkeypatch.context() as patch:
        patch.setattr("vsa_diffusers.pipeline._put", put_one)
        with pytest.raises(KeyboardInterrupt):
            enable_vsa(model, 0.9)
    assert [block.attn1.processor for block in model.blocks] == before
    assert run(model, WAN, GRID).equal(expected)
    assert run(disable_vsa(model), WAN, GRID).equal(run(WAN.build(), WAN, GRID))


def test_nothing_is_left_of_an_interrupted_first_enabling(monkeypatch):
    model = WAN.build()
    before = sorted(vars(model)), [type(block.attn1.processor) for block in model.blocks]

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("vsa_diffusers.running.ForwardHooks.register", interrupted)
    with pytest.raises(KeyboardInterrupt):
        enable_vsa(model, 0.9)
    assert (sorted(vars(model)), [type(block.attn1.processor) for block in model.blocks]) == before
    assert not any(isinstance(block.attn1.processor, FamilyAttnProcessor) for block in model.blocks)


@pytest.mark.parametrize("make", [
    lambda model: VSAAttnProcessor.for_transformer(model, top_k_ratio=0.3),
    lambda model: VSAAttnProcessor(top_k_ratio=0.3),
], ids=["one for each", "one for all"])  # fmt: skip
def test_a_processor_reads_the_grid_of_every_call(make):
    model, other = WAN.build(), enable_vsa(WAN.build(), 0.3)
    model.set_attn_processor(make(model))
    for grid in (GRID, OTHER, (3, 8, 14), GRID):
        assert run(model, WAN, grid).equal(run(other, WAN, grid))


def trained(model):
    with torch.no_grad():
        for block in model.blocks:
            block.attn1.to_gate_compress.bias.fill_(0.7)
    return model


def gated():
    model = WAN.build()
    add_gate_compress(model)
    return model


GATES_LATER = {
    "trained": lambda model, path: trained(model),
    "load_gates": lambda model, path: load_gates(model, save_gates(trained(gated()), path)),
    "load_state_dict": lambda model, path: model.load_state_dict(trained(gated()).state_dict()),
}


@pytest.mark.parametrize("later", GATES_LATER)
@pytest.mark.parametrize(
    ("by_hand", "compiled"),
    [(False, False), (False, True), (True, False), pytest.param(True, True, marks=pytest.mark.slow)],
)
def test_gates_that_come_after_enabling_are_used(later, compiled, by_hand, tmp_path, caplog):
    expected = run(enable_vsa(trained(gated()), 0.3), WAN, GRID)
    model = gated()
    if by_hand:
        model.set_attn_processor(VSAAttnProcessor.for_transformer(model, top_k_ratio=0.3))
    else:
        enable_vsa(model, 0.3)
    if compiled:
        torch._dynamo.reset()
        model.compile(backend="eager")
    assert relative_error(run(model, WAN, GRID), expected) > 1e-2
    GATES_LATER[later](model, tmp_path)
    with caplog.at_level(logging.INFO, "vsa_diffusers"):
        torch.testing.assert_close(run(model, WAN, GRID), expected, atol=1e-5, rtol=0)
        run(model, WAN, GRID)
    assert caplog.text.count("2 modules use them now") == 1


def blocks_of(model):
    return [block.attn1.processor.config.block_size for block in model.blocks]


@pytest.mark.parametrize("combine", ["gate", "sum", "sparse", "merge"])
def test_a_block_left_open_fits_the_video_with_merge_and_is_that_of_trained_gates_else(combine):
    model = enable_vsa(gated(), 0.3, combine=combine)
    block = "auto" if combine == "merge" else (4, 4, 4)
    assert blocks_of(model) == [block] * 2
    assert run(model, WAN, GRID).equal(run(enable_vsa(gated(), 0.3, combine=combine, block_size=block), WAN, GRID))


def test_a_gate_that_is_trained_takes_its_module_alone_to_the_block_of_trained_gates():
    def gate_of_one(model):
        torch.nn.init.constant_(model.blocks[1].attn1.to_gate_compress.bias, 0.7)
        return model

    model = enable_vsa(gated(), 0.3)
    assert run(model, WAN, GRID).equal(run(enable_vsa(gated(), 0.3, block_size="auto"), WAN, GRID))
    expected = enable_vsa(gate_of_one(gated()), 0.3)
    assert blocks_of(expected) == ["auto", (4, 4, 4)]
    for ratio in (0.3, 0.6):
        set_top_k_ratio(model, ratio), set_top_k_ratio(expected, ratio)
        assert run(gate_of_one(model), WAN, GRID).equal(run(expected, WAN, GRID))
    assert blocks_of(model) == blocks_of(expected)


def test_gates_trained_in_the_loop_come_right_under_gradient_checkpointing():
    def step(model):
        torch.manual_seed(1)
        model.zero_grad()
        model(**WAN.inputs(GRID), return_dict=False)[0].square().mean().backward()
        return {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
        }

    model = enable_vsa(gated(), 0.3)
    model.enable_gradient_checkpointing()
    step(model)
    found = step(trained(model))
    for name, expected in step(enable_vsa(trained(gated()), 0.3)).items():
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-4, msg=name)


def test_gates_that_a_fitted_block_cannot_use_are_told(caplog):
    model = enable_vsa(gated(), 0.3, block_size="auto")
    expected = run(model, WAN, GRID)
    trained(model)
    assert run(model, WAN, GRID).equal(expected)
    assert 'blocks.0.attn1 has trained gates now, which block_size="auto" cannot use' in caplog.text
