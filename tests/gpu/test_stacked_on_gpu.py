"""What people stack on a pipeline that only a GPU can do: CUDA graphs, offloading with streams, quantised weights."""

import importlib.util

import diffusers
import pytest
import torch
import torch._dynamo
import torch._inductor.config
from diffusers.models.attention_dispatch import AttentionBackendName
from torch._dynamo.utils import counters

from oracle import relative_error
from tiny_models import RECIPES
from tiny_pipelines_video import PipelineRecipe, embeddings, wan
from vsa_diffusers import disable_vsa, enable_vsa

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a machine with a CUDA GPU"),
]
CUDA = torch.device("cuda")
WAN = RECIPES[0]
GRID, OTHER = (5, 18, 20), (6, 16, 24)
# A whole tiny model in bf16 or fp16, against the same model dense; measured without a GPU: 3e-3.
TOLERANCE = 2e-2


def build(dtype=torch.bfloat16, device=CUDA):
    return WAN.build().to(dtype).to(device)


@torch.no_grad()
def run(model, grid=GRID, dtype=torch.bfloat16):
    torch.manual_seed(1)
    inputs = {name: value.to(CUDA) for name, value in WAN.inputs(grid).items()}
    inputs |= {name: value.to(dtype) for name, value in inputs.items() if value.is_floating_point()}
    return model(**inputs, return_dict=False)[0].float().clone()


def assert_exact_and_sparse(work, target, tolerance=TOLERANCE):
    """What `work` returns is dense at ratio 1.0, something else below, and dense again without VSA."""
    dense = work()
    enable_vsa(target, 1.0)
    exact = relative_error(work(), dense)
    enable_vsa(target, 0.2)
    sparse = relative_error(work(), dense)
    disable_vsa(target)
    assert relative_error(work(), dense) < tolerance
    assert exact < tolerance
    assert sparse > 1.5 * exact


@pytest.fixture
def fresh():
    """Compiled code and what was counted of it, from nothing to nothing."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


COMPILED = {
    "whole": lambda model: model.compile(fullgraph=True),
    "dynamic": lambda model: model.compile(fullgraph=True, dynamic=True),
    "blocks": lambda model: model.compile_repeated_blocks(fullgraph=True),
    "CUDA graphs": lambda model: model.compile(fullgraph=True, mode="reduce-overhead"),
    "CUDA graphs of blocks": lambda model: model.compile_repeated_blocks(fullgraph=True, mode="reduce-overhead"),
}


@pytest.mark.parametrize("form", COMPILED)
def test_a_compiled_model_is_exact_for_changing_sizes(form, fresh):
    dense = {grid: run(build(), grid) for grid in (GRID, OTHER)}
    model = enable_vsa(build(), 1.0)
    COMPILED[form](model)
    # A graph is recorded at the second call of a size, and replayed from the third.
    for grid in (GRID,) * 4 + (OTHER,) * 4 + (GRID,) * 2:
        torch.compiler.cudagraph_mark_step_begin()
        assert relative_error(run(model, grid), dense[grid]) < TOLERANCE
    assert counters["inductor"]["cudagraph_skips"] == 0
    enable_vsa(model, 0.2)
    sparse = [run(model) for _ in range(4)]
    assert all(relative_error(each, sparse[0]) < 1e-3 for each in sparse)
    assert relative_error(sparse[0], dense[GRID]) > 1e-3


@pytest.mark.parametrize("ratio", [1.0, 0.2])
def test_a_cuda_graph_made_by_hand_replays_the_kernels_on_new_inputs(ratio):
    model = enable_vsa(build(), ratio)
    inputs = {name: value.to(CUDA) for name, value in WAN.inputs(GRID).items()}
    inputs |= {name: value.bfloat16() for name, value in inputs.items() if value.is_floating_point()}
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(**inputs, return_dict=False)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(**inputs, return_dict=False)[0]
        for seed in range(3):
            latents = torch.randn(inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(seed))
            inputs["hidden_states"].copy_(latents)
            graph.replay()
            replayed = output.clone()
            assert relative_error(replayed, model(**inputs, return_dict=False)[0]) < 1e-3


def test_a_forward_on_a_stream_of_its_own_is_the_same():
    model = enable_vsa(build(), 0.2)
    expected = run(model)
    stream = torch.cuda.Stream()
    for _ in range(5):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            output = run(model)
        torch.cuda.current_stream().wait_stream(stream)
        assert output.equal(expected)


OFFLOADS = {
    "model": lambda pipe, _: pipe.enable_model_cpu_offload(),
    "sequential": lambda pipe, _: pipe.enable_sequential_cpu_offload(),
    "group of blocks": lambda pipe, _: group_offload(pipe, "block_level", num_blocks_per_group=1),
    "group of leaves": lambda pipe, _: group_offload(pipe, "leaf_level"),
    "group of blocks, streams": lambda pipe, _: group_offload(
        pipe, "block_level", num_blocks_per_group=1, use_stream=True
    ),
    "group of leaves, streams": lambda pipe, _: group_offload(pipe, "leaf_level", use_stream=True),
    "group of leaves, recorded streams": lambda pipe, _: group_offload(
        pipe, "leaf_level", use_stream=True, record_stream=True, non_blocking=True
    ),
    "group of leaves, streams, disk": lambda pipe, folder: group_offload(
        pipe, "leaf_level", use_stream=True, offload_to_disk_path=str(folder)
    ),
}


def group_offload(pipe, offload_type, **options):
    pipe.vae.to(CUDA)
    pipe.transformer.enable_group_offload(CUDA, torch.device("cpu"), offload_type, **options)


@pytest.mark.parametrize("order", ["offload first", "VSA first"])
@pytest.mark.parametrize("name", OFFLOADS)
def test_an_offloaded_pipeline_is_exact(name, order, tmp_path):
    prompt = {key: value.bfloat16().to(CUDA) for key, value in embeddings().items()}

    def pipeline(ratio, offloaded):
        pipe = PipelineRecipe("WanPipeline", wan(), dict).build().to(torch.bfloat16)
        steps = [
            lambda: OFFLOADS[name](pipe, tmp_path) if offloaded else pipe.to(CUDA),
            lambda: ratio and enable_vsa(pipe, ratio),
        ]
        for step in steps if order == "offload first" else reversed(steps):
            step()
        return pipe

    def video(pipe):
        return pipe(
            **prompt, height=144, width=160, num_frames=17, num_inference_steps=3, guidance_scale=3.0,
            output_type="latent", generator=torch.Generator().manual_seed(0),
        ).frames.float().cpu()  # fmt: skip

    dense = video(pipeline(None, offloaded=False))
    sparse = video(pipeline(0.2, offloaded=False))
    exact = pipeline(1.0, offloaded=True)
    for _ in range(2):
        assert relative_error(video(exact), dense) < TOLERANCE
    assert relative_error(video(pipeline(0.2, offloaded=True)), sparse) < 1e-3


def test_layerwise_casting_to_fp8_is_exact():
    model = build()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert_exact_and_sparse(lambda: run(model), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_exact(dtype):
    model = build(torch.float32)

    def work():
        with torch.autocast("cuda", dtype):
            return run(model, dtype=torch.float32)

    assert_exact_and_sparse(work, model)


def test_half_precision_is_exact():
    model = build(torch.float16)
    assert_exact_and_sparse(lambda: run(model, dtype=torch.float16), model)


BITSANDBYTES = {
    "8 bits": lambda: diffusers.BitsAndBytesConfig(load_in_8bit=True),
    "4 bits, fp4": lambda: diffusers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16),
    "4 bits, nf4": lambda: diffusers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
}


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_bitsandbytes_is_exact(name, tmp_path):
    pytest.importorskip("bitsandbytes", reason="runs where bitsandbytes is installed: pip install bitsandbytes")
    WAN.build().save_pretrained(tmp_path)
    model = diffusers.WanTransformer3DModel.from_pretrained(
        tmp_path, quantization_config=BITSANDBYTES[name](), dtype=torch.bfloat16, device_map="cuda"
    )
    assert type(model.blocks[0].attn1.to_q).__name__ in ("Linear8bitLt", "Linear4bit")
    # In 8 bits activations are rounded, too, by steps that enlarge what differs in the last place.
    assert_exact_and_sparse(lambda: run(model), model, 0.05 if name == "8 bits" else TOLERANCE)


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchao_is_exact(name):
    quantization = pytest.importorskip(
        "torchao.quantization", reason="runs where torchao is installed: pip install torchao"
    )
    model = build()
    plain = run(model)
    quantization.quantize_(model, getattr(quantization, name)())
    assert relative_error(run(model), plain) > 1e-3
    assert_exact_and_sparse(lambda: run(model), model)


@pytest.mark.parametrize("backend", [each.value for each in AttentionBackendName if not each.value.endswith("hub")])
def test_an_attention_backend_serves_what_is_dense_or_is_refused_as_without_vsa(backend):
    outcomes = []
    for ratio in (None, 1.0):
        model = build() if ratio is None else enable_vsa(build(), ratio)
        try:
            model.set_attention_backend(backend)
            outcomes.append(run(model))
        except (RuntimeError, ValueError) as error:
            outcomes.append(type(error))
    dense, exact = outcomes
    if isinstance(dense, type):
        assert exact is dense
    else:
        assert relative_error(exact, dense) < TOLERANCE


@pytest.mark.parametrize("device_map", ["cuda", "balanced"])
def test_a_pipeline_loaded_by_device_map_is_exact(device_map, tmp_path):
    PipelineRecipe("WanPipeline", wan(), dict).build().save_pretrained(tmp_path)
    missing = dict(text_encoder=None, tokenizer=None, transformer_2=None)
    pipe = diffusers.WanPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map=device_map, **missing)
    pipe.set_progress_bar_config(disable=True)
    prompt = {key: value.bfloat16().to(CUDA) for key, value in embeddings().items()}

    def work():
        return pipe(
            **prompt, height=144, width=160, num_frames=17, num_inference_steps=2, guidance_scale=1.0,
            output_type="latent", generator=torch.Generator().manual_seed(0),
        ).frames.float().cpu()  # fmt: skip

    assert_exact_and_sparse(work, pipe)


def test_the_kernels_ran_and_not_the_pytorch_implementation(monkeypatch):
    assert importlib.util.find_spec("triton") is not None

    def refuse(*_):
        raise AssertionError("the PyTorch implementation was called")

    monkeypatch.setattr("vsa_diffusers.torch_impl.forward", refuse)
    run(enable_vsa(build(), 0.2))
