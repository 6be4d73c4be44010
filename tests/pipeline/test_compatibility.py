"""VSA under what else people use: schedulers, guiders, adapters in their forms, backends, export, files of all kinds.

What is stacked on a transformer by itself, and in pairs, is in `test_stacked.py`.
"""

import inspect

import diffusers
import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from diffusers import guiders
from diffusers.hooks import LayerSkipConfig
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep
from peft import LoraConfig
from torch.distributed.fsdp import FullyShardedDataParallel

from oracle import relative_error
from positions import assert_all_steps_are_known, recorded_positions
from tiny_models import RECIPES, run
from tiny_pipelines_video import TINY, WAN16, PipelineRecipe, embeddings, transformer, unipc, wan
from vsa_diffusers import disable_vsa, enable_vsa
from vsa_diffusers.layer_skip import register_processor

WAN = RECIPES[0]
GRID, OTHER = (5, 10, 12), (3, 12, 14)
SHORT = TINY | dict(height=64, width=64, num_inference_steps=3)
SMALL_TILES = dict(block_size=(2, 2, 2))


def assert_exact_and_sparse(work, target, tolerance=1e-4):
    """What `work` returns is dense at ratio 1.0, and something else below; and dense again afterwards."""
    dense = work()
    assert torch.isfinite(dense).all()
    exact = relative_error(with_ratio(work, target, 1.0), dense)
    assert exact < tolerance
    assert relative_error(with_ratio(work, target, 0.3), dense) > max(1e-3, 2 * exact)
    disable_vsa(target)
    assert relative_error(work(), dense) < 1e-6


def with_ratio(work, target, ratio):
    enable_vsa(target, ratio, **SMALL_TILES)
    return work()


FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
# Those that WanPipeline runs with; the others lack `sigmas` or `set_begin_index`, which it asks for.
SCHEDULERS = [
    "CMStochasticIterativeScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "FlowMapEulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler",
    "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LTXEulerAncestralRFScheduler", "SASolverScheduler", "UniPCMultistepScheduler",
]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if hasattr(diffusers, name)])
def test_a_scheduler_is_exact_and_its_steps_are_known(name):
    cls = getattr(diffusers, name)
    takes = inspect.signature(cls).parameters
    options = {key: value for key, value in FLOW.items() if key in takes and "use_flow_sigmas" in takes}
    pipe = PipelineRecipe("WanPipeline", wan(scheduler=lambda: cls(**options)), dict).build()

    def work():
        torch.manual_seed(1)
        return pipe(**embeddings(), **SHORT, guidance_scale=1.0, output_type="latent").frames

    with recorded_positions(pipe) as positions:
        assert_exact_and_sparse(work, pipe, 1e-5)
    assert_all_steps_are_known(positions)
    assert positions[0].total == 3


# Each in a form that differs from plain guidance. Left out: what diffusers' own Wan cannot run, or runs unchanged.
GUIDERS = {
    "ClassifierFreeGuidance": dict,
    "ClassifierFreeZeroStarGuidance": dict,
    "AdaptiveProjectedGuidance": lambda: dict(eta=0.0),
    "AdaptiveProjectedMixGuidance": dict,
    "TangentialClassifierFreeGuidance": dict,
    "AutoGuidance": lambda: dict(auto_guidance_config=LayerSkipConfig([1], fqn="blocks", dropout=0.3)),
    "SkipLayerGuidance": lambda: dict(
        skip_layer_config=LayerSkipConfig([1], fqn="blocks"), skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
    ),
    "PerturbedAttentionGuidance": lambda: dict(
        perturbed_guidance_config=LayerSkipConfig(
            [1], fqn="blocks", skip_attention=False, skip_attention_scores=True, skip_ff=False
        ),
        perturbed_guidance_start=0.0, perturbed_guidance_stop=1.0,
    ),
}  # fmt: skip


@pytest.fixture
def stock_processor_known(monkeypatch):
    """Diffusers does not know Wan's own processor, which the dense run of perturbed attention needs."""
    AttentionProcessorRegistry._register()
    monkeypatch.setattr(AttentionProcessorRegistry, "_registry", dict(AttentionProcessorRegistry._registry))
    register_processor(WanAttnProcessor, lambda attn: ("hidden_states",))


def modular_pipeline(name):
    pipe = WanCoreDenoiseStep().init_pipeline()
    pipe.set_progress_bar_config(disable=True)
    guider = getattr(guiders, name)(**GUIDERS[name]())
    pipe.update_components(transformer=transformer("WanTransformer3DModel", WAN16), scheduler=unipc(), guider=guider)

    def work():
        torch.manual_seed(1)
        return pipe(**embeddings(), **SHORT, output="latents")

    return pipe, work


@pytest.mark.parametrize("name", GUIDERS)
def test_a_guider_of_a_modular_pipeline_is_exact_and_its_steps_are_known(name, stock_processor_known):
    pipe, work = modular_pipeline(name)
    with recorded_positions(pipe) as positions:
        assert_exact_and_sparse(work, pipe)
    assert_all_steps_are_known(positions)
    _, plain = modular_pipeline("ClassifierFreeGuidance")
    assert (relative_error(work(), plain()) > 1e-3) == (name != "ClassifierFreeGuidance")


def adapter(name, rank=2, targets=("to_q", "to_v")):
    torch.manual_seed(len(name))
    return LoraConfig(r=rank, target_modules=list(targets), init_lora_weights=False)


def save_adapter(folder, name, **options):
    """A LoRA file as training leaves it."""
    model = WAN.build()
    model.add_adapter(adapter(name, **options), name)
    model.save_lora_adapter(folder / name, adapter_name=name)
    return folder / name


def load_adapter(model, folder, name, **options):
    model.load_lora_adapter(folder, adapter_name=name, prefix=None, use_safetensors=True, **options)


@pytest.mark.parametrize("order", ["adapter first", "VSA first"])
def test_a_lora_file_is_used_whenever_it_is_loaded(order, tmp_path):
    folder = save_adapter(tmp_path, "one")
    dense = WAN.build()
    plain = run(dense, WAN, GRID)
    load_adapter(dense, folder, "one")
    adapted = run(dense, WAN, GRID)
    assert relative_error(adapted, plain) > 1e-3
    model = WAN.build()
    steps = [lambda: load_adapter(model, folder, "one"), lambda: enable_vsa(model, 1.0)]
    for step in steps if order == "adapter first" else reversed(steps):
        step()
    assert relative_error(run(model, WAN, GRID), adapted) < 1e-5
    assert relative_error(run(enable_vsa(model, 0.3), WAN, GRID), adapted) > 1e-3
    enable_vsa(model, 1.0).unload_lora()
    assert relative_error(run(model, WAN, GRID), plain) < 1e-5


def test_weights_of_several_adapters_change_under_vsa():
    models = [WAN.build(), enable_vsa(WAN.build(), 1.0)]
    for model in models:
        model.add_adapter(adapter("one"), "one")
        model.add_adapter(adapter("second", rank=3), "second")
    outputs = []
    for names, weights in ([["one"], [1.0]], [["second"], [0.5]], [["one", "second"], [0.7, -0.4]]):
        for model in models:
            model.set_adapters(names, weights)
        dense, exact = (run(model, WAN, GRID) for model in models)
        assert relative_error(exact, dense) < 1e-5
        outputs.append(dense)
    for model in models:
        model.delete_adapters("second")
    assert relative_error(run(models[1], WAN, GRID), run(models[0], WAN, GRID)) < 1e-5
    assert relative_error(outputs[0], outputs[1]) > 1e-3
    assert relative_error(outputs[0], outputs[2]) > 1e-3


def test_an_adapter_fused_and_unfused_under_vsa_leaves_the_model_as_it_was():
    model, dense = enable_vsa(WAN.build(), 1.0), WAN.build()
    before = run(model, WAN, GRID)
    for each in (model, dense):
        each.add_adapter(adapter("one"), "one")
        each.fuse_lora(lora_scale=0.8, adapter_names=["one"])
    fused = run(model, WAN, GRID)
    assert relative_error(fused, run(dense, WAN, GRID)) < 1e-5
    assert relative_error(fused, before) > 1e-3
    model.unfuse_lora()
    model.disable_adapters()
    assert relative_error(run(model, WAN, GRID), before) < 1e-5


@pytest.mark.parametrize("compiled", [False, True])
def test_an_adapter_is_swapped_while_running(compiled, tmp_path):
    torch._dynamo.reset()
    files = [save_adapter(tmp_path, "one"), save_adapter(tmp_path, "second", rank=3)]
    counter = torch._dynamo.testing.CompileCounter()
    model, dense = enable_vsa(WAN.build(), 1.0), WAN.build()
    for each in (model, dense):
        each.enable_lora_hotswap(target_rank=3)
        load_adapter(each, files[0], "swapped")
    if compiled:
        model.compile_repeated_blocks(backend=counter)
    outputs = []
    for file in (*files, files[0]):
        for each in (model, dense):
            load_adapter(each, file, "swapped", hotswap=True)
        outputs.append(run(model, WAN, GRID))
        assert relative_error(outputs[-1], run(dense, WAN, GRID)) < 1e-5
    assert relative_error(outputs[0], outputs[1]) > 1e-3
    assert relative_error(outputs[0], outputs[2]) < 1e-5
    assert counter.frame_count == compiled


@pytest.mark.parametrize("backend", [each.value for each in AttentionBackendName])
def test_an_attention_backend_serves_what_is_dense_or_is_refused_as_without_vsa(backend):
    outcomes = []
    for ratio in (None, 1.0):
        torch._dynamo.reset()
        model = WAN.build() if ratio is None else enable_vsa(WAN.build(), ratio)
        try:
            model.set_attention_backend(backend)
            outcomes.append(run(model, WAN, GRID))
        except RuntimeError as error:
            outcomes.append(str(error))
    dense, exact = outcomes
    assert type(dense) is type(exact)
    if isinstance(dense, str):
        assert exact == dense
    else:
        assert relative_error(exact, dense) < 1e-5


@pytest.mark.parametrize("turn", ["first", "second"])
def test_an_attention_backend_is_the_whole_process_s_and_ends_with_the_test(turn):
    stock = WAN.build()
    native = run(stock, WAN, GRID)
    WAN.build().set_attention_backend("_native_math")
    math = run(stock, WAN, GRID)
    assert not math.equal(native)
    torch.testing.assert_close(math, native, atol=1e-5, rtol=0)


def test_an_exported_model_is_sparse_and_bound_to_its_size():
    model = enable_vsa(WAN.build(), 0.3)
    expected = run(model, WAN, GRID)
    torch.manual_seed(1)
    inputs = WAN.inputs(GRID) | dict(return_dict=False)
    program = torch.export.export(model, (), inputs, strict=False)
    operators = [str(node.target) for node in program.graph.nodes if "vsa" in str(node.target)]
    assert len(operators) == WAN.sparse
    exported = program.module()
    with torch.no_grad():
        assert relative_error(exported(**inputs)[0], expected) < 1e-6
        with pytest.raises((RuntimeError, AssertionError), match=r"[Gg]uard|size|shape"):
            exported(**WAN.inputs(OTHER), return_dict=False)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_a_model_loaded_by_device_map_is_served(device_map, tmp_path):
    WAN.build().save_pretrained(tmp_path)
    model = diffusers.WanTransformer3DModel.from_pretrained(tmp_path, device_map=device_map)
    assert_exact_and_sparse(lambda: run(model, WAN, GRID), model)


@pytest.mark.parametrize("order", ["EMA first", "VSA first"])
def test_averaged_weights_are_used_and_given_back(order):
    models = [WAN.build(), WAN.build()]
    averages = []
    for model, vsa in zip(models, (False, True), strict=True):
        if vsa and order == "VSA first":
            enable_vsa(model, 1.0)
        average = diffusers.training_utils.EMAModel(model.parameters(), decay=0.5)
        average.step(model.parameters())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        for _ in range(3):
            average.step(model.parameters())
        if vsa and order == "EMA first":
            enable_vsa(model, 1.0)
        averages.append(average)
    trained = [run(model, WAN, GRID) for model in models]
    for model, average in zip(models, averages, strict=True):
        average.store(model.parameters())
        average.copy_to(model.parameters())
    averaged = [run(model, WAN, GRID) for model in models]
    for model, average in zip(models, averages, strict=True):
        average.restore(model.parameters())
    assert relative_error(trained[1], trained[0]) < 1e-5
    assert relative_error(averaged[1], averaged[0]) < 1e-5
    assert relative_error(averaged[0], trained[0]) > 1e-3
    assert run(models[1], WAN, GRID).equal(trained[1])


@pytest.mark.parametrize("order", ["FSDP first", "VSA first"])
def test_fsdp_of_the_first_kind_is_served(order, tmp_path):
    expected = run(enable_vsa(WAN.build(), 0.3), WAN, GRID)
    model = WAN.build()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        if order == "VSA first":
            enable_vsa(model, 0.3)
        wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
        if order == "FSDP first":
            enable_vsa(wrapped, 0.3)
        assert relative_error(run(wrapped, WAN, GRID), expected) < 1e-6
    finally:
        dist.destroy_process_group()


def test_gguf_weights_are_served(tmp_path):
    gguf = pytest.importorskip("gguf", reason="runs where gguf is installed: pip install gguf")
    original = WAN.build()
    file = tmp_path / "wan.gguf"
    writer = gguf.GGUFWriter(file, "wan")
    for name, tensor in original.state_dict().items():
        values = tensor.float().numpy()
        if name.startswith("blocks.") and name.endswith("weight") and tensor.ndim == 2:
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    original.save_config(tmp_path / "transformer")
    model = diffusers.WanTransformer3DModel.from_single_file(
        str(file), config=str(tmp_path), subfolder="transformer", dtype=torch.float32,
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
    )  # fmt: skip
    assert type(model.blocks[0].attn1.to_q).__name__ == "GGUFLinear"
    assert 1e-4 < relative_error(run(model, WAN, GRID), run(original, WAN, GRID)) < 0.1
    assert_exact_and_sparse(lambda: run(model, WAN, GRID), model)
