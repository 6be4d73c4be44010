"""What `save_vsa` writes comes back on stock pipelines with `load_vsa`, or is refused before anything has changed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from tiny_models import RECIPES, run
from tiny_pipelines_video import TEXT, PipelineRecipe, embeddings, wan, wan22
from tiny_text_pipeline import tiny_pipeline
from vsa_diffusers import VSAConfig, add_gate_compress, enable_vsa, load_vsa, save_vsa
from vsa_diffusers.pipeline import enabled_config

WAN = RECIPES[0]
GRID = (5, 10, 12)
CALL = dict(prompt="a red ring", height=64, width=96, num_frames=9, num_inference_steps=2, output_type="pt")


def fine_tuned(model, lora=False, gates=True):
    """As training would leave it: every parameter that learns is another one."""
    torch.manual_seed(3)
    if gates:
        add_gate_compress(model)
    if lora:
        model.add_adapter(LoraConfig(r=2, target_modules=["attn1.to_q", "attn1.to_out.0"], lora_alpha=6))
    for name, parameter in model.named_parameters():
        if not lora or "lora_" in name or "to_gate_compress" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return enable_vsa(model, 0.3, block_size=(2, 2, 2), combine="gate" if gates else "merge", dense_layers=(0,))


@pytest.mark.parametrize(
    ("kind", "gates"), [("full", True), ("full", False), ("lora", True), ("lora", False), ("gates", True)]
)
def test_a_saved_model_comes_back_on_a_stock_one(tmp_path, kind, gates):
    model = WAN.build()
    stock = {name: value.clone() for name, value in model.state_dict().items()}
    fine_tuned(model, lora=kind == "lora", gates=gates)
    if kind == "gates":
        model.load_state_dict(stock, strict=False)
    assert save_vsa(model, tmp_path, contents="gates" if kind == "gates" else "auto") == tmp_path
    fresh = load_vsa(WAN.build(), tmp_path)
    assert run(fresh, WAN, GRID).equal(run(model, WAN, GRID))
    assert enabled_config(fresh) == enabled_config(model)
    assert {file.suffix for file in tmp_path.rglob("*") if file.is_file()} <= {".json", ".safetensors", ".md"}


def test_a_lora_needs_no_adapter_methods_of_the_model(tmp_path):
    recipe = next(recipe for recipe in RECIPES if recipe.name == "allegro")
    model = recipe.build()
    assert not hasattr(model, "add_adapter")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["attn1.to_q"], init_lora_weights=False), model, "mine")
    save_vsa(enable_vsa(model, 0.3), tmp_path)
    fresh = load_vsa(recipe.build(), tmp_path)
    assert run(fresh, recipe, GRID).equal(run(model, recipe, GRID))
    assert not run(fresh, recipe, GRID).equal(run(enable_vsa(recipe.build(), 0.3), recipe, GRID))


def test_a_repository_on_the_hub_is_downloaded(tmp_path, monkeypatch):
    model = fine_tuned(WAN.build())
    save_vsa(model, tmp_path)
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **_: asked.append(repo) or str(tmp_path))
    assert run(load_vsa(WAN.build(), "somebody/something"), WAN, GRID).equal(run(model, WAN, GRID))
    assert asked == ["somebody/something"]


FRESH = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from diffusers import WanPipeline
from vsa_diffusers import load_vsa
videos = {{}}
for name in ("full", "lora"):
    pipe = load_vsa(WanPipeline.from_pretrained({folder!r} + "/pipe"), {folder!r} + "/" + name)
    videos[name] = pipe(**{call!r}, generator=torch.Generator().manual_seed(0)).frames
save_file(videos, {folder!r} + "/videos.safetensors")
"""


def test_a_fresh_process_makes_the_same_video(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    expected = {}
    for name in ("full", "lora"):
        pipe = type(tiny_pipeline()).from_pretrained(tmp_path / "pipe")
        stock = pipe(**CALL, generator=torch.Generator().manual_seed(0)).frames
        fine_tuned(pipe.transformer, lora=name == "lora")
        save_vsa(pipe, tmp_path / name)
        expected[name] = pipe(**CALL, generator=torch.Generator().manual_seed(0)).frames
        assert (expected[name] - stock).abs().max() > 1e-3
    script = FRESH.format(tests=str(Path(__file__).parents[1] / "support"), folder=str(tmp_path), call=CALL)
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)
    videos = load_file(tmp_path / "videos.safetensors")
    for name, video in videos.items():
        torch.testing.assert_close(video, expected[name], atol=1e-5, rtol=0)


def test_both_transformers_of_a_pipeline_come_back(tmp_path):
    recipe = PipelineRecipe("WanPipeline", wan22(), lambda: TEXT | embeddings())
    pipe = recipe.build()
    for part in (pipe.transformer, pipe.transformer_2):
        fine_tuned(part)
    save_vsa(enable_vsa(pipe, 0.3, combine="gate", dense_steps=1), tmp_path)
    fresh = load_vsa(recipe.build(), tmp_path)
    assert recipe.run(fresh).equal(recipe.run(pipe))
    with pytest.raises(ValueError, match="holds transformer, transformer_2, but pipe has transformer"):
        load_vsa(PipelineRecipe("WanPipeline", wan(), dict).build(), tmp_path)


def test_a_lora_is_one_that_the_pipeline_itself_can_load(tmp_path):
    model = fine_tuned(WAN.build(), lora=True)
    save_vsa(model, tmp_path)
    pipe = tiny_pipeline()
    pipe.load_lora_weights(tmp_path / "transformer", weight_name="pytorch_lora_weights.safetensors")
    loaded = pipe.transformer.state_dict()
    for key, value in model.state_dict().items():
        if "lora_" in key:
            assert loaded[key.replace(".default.", ".default_0.")].equal(value)


def test_changes_dtype_and_shards(tmp_path):
    model = fine_tuned(WAN.build())
    save_vsa(model, tmp_path, dtype=torch.float16, max_shard_size="60KB")
    shards = list((tmp_path / "transformer").glob("diffusion_pytorch_model-*.safetensors"))
    assert len(shards) > 1
    assert load_file(shards[0]).popitem()[1].dtype == torch.float16
    fresh = load_vsa(WAN.build(), tmp_path, top_k_ratio=0.5)
    assert enabled_config(fresh).top_k_ratio == 0.5
    assert fresh.dtype == torch.float32
    enable_vsa(model, config=enabled_config(fresh))
    torch.testing.assert_close(run(fresh, WAN, GRID), run(model, WAN, GRID), atol=0.05, rtol=0.05)


def test_saving_again_leaves_nothing_of_the_first_time(tmp_path):
    save_vsa(fine_tuned(WAN.build()), tmp_path)
    save_vsa(fine_tuned(WAN.build(), lora=True, gates=False), tmp_path)
    assert sorted(file.name for file in (tmp_path / "transformer").glob("*.safetensors")) == [
        "pytorch_lora_weights.safetensors"
    ]


def edit(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


TEXT_BIAS = "condition_embedder.text_embedder.linear_1.bias"
LORA_KEY = "transformer.blocks.0.attn1.to_q.lora_A.weight"
GATE_KEY = "blocks.1.attn1.to_gate_compress.bias"


@pytest.mark.parametrize(
    ("lora", "file", "change", "message"),
    [
        (False, "diffusion_pytorch_model", lambda t: t.pop(TEXT_BIAS), f"1 missing keys: ['{TEXT_BIAS}']"),
        (False, "diffusion_pytorch_model", lambda t: t.update(a=torch.ones(1)), "1 unexpected keys: ['a']"),
        (False, "diffusion_pytorch_model", lambda t: t.update({TEXT_BIAS: torch.ones(1)}), f"{TEXT_BIAS}: (1,), needs"),
        (False, "vsa_gates", lambda t: t.pop(GATE_KEY), "needs {'weight': (64, 64), 'bias': (64,)}"),
        (True, "pytorch_lora_weights", lambda t: t.pop(LORA_KEY), f"1 missing keys: ['{LORA_KEY}']"),
        (True, "pytorch_lora_weights", lambda t: t.update(b=torch.ones(1)), "1 unexpected keys: ['b']"),
        (True, "pytorch_lora_weights", lambda t: t.update({LORA_KEY: torch.ones(1, 64)}), "(1, 64), needs (2, 64)"),
    ],
)
def test_files_that_do_not_fit_are_refused_and_change_nothing(tmp_path, lora, file, change, message):
    save_vsa(fine_tuned(WAN.build(), lora=lora), tmp_path)
    edit(tmp_path / "transformer" / f"{file}.safetensors", change)
    model = WAN.build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_vsa(model, tmp_path)
    assert message in str(error.value)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(after[key].equal(value) for key, value in before.items())
    assert not hasattr(model, "_vsa_installation")


def test_directories_and_models_that_do_not_fit_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"lacks vsa_index.json or vsa_config.json, so save_vsa did not write it"):
        load_vsa(WAN.build(), tmp_path)
    save_vsa(fine_tuned(WAN.build()), tmp_path)
    other = next(recipe for recipe in RECIPES if recipe.name == "ltx").build()
    with pytest.raises(
        ValueError, match="was saved from WanTransformer3DModel, but pipe has LTXVideoTransformer3DModel"
    ):
        load_vsa(other, tmp_path)
    with pytest.raises(ValueError, match="parameters without values, as offloading leaves them"):
        load_vsa(WAN.build().to("meta"), tmp_path)
    with pytest.raises(ValueError, match=r"unknown keys \['ratio'\]"):
        load_vsa(WAN.build(), tmp_path, ratio=0.1)
    (tmp_path / "transformer" / "vsa_gates.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks vsa_gates.safetensors, which vsa_index.json promises"):
        load_vsa(WAN.build(), tmp_path)
    index = json.loads((tmp_path / "vsa_index.json").read_text())
    (tmp_path / "vsa_index.json").write_text(json.dumps(index | {"format": 2}))
    with pytest.raises(ValueError, match="has format 2, but this version reads 1"):
        load_vsa(WAN.build(), tmp_path)


def test_an_adapter_of_the_same_name_is_in_the_way(tmp_path):
    save_vsa(fine_tuned(WAN.build(), lora=True), tmp_path)
    model = load_vsa(WAN.build(), tmp_path)
    with pytest.raises(ValueError, match='already has an adapter "vsa"'):
        load_vsa(model, tmp_path)


def test_what_cannot_be_saved_is_told(tmp_path):
    with pytest.raises(ValueError, match="VSA is not enabled on WanTransformer3DModel"):
        save_vsa(WAN.build(), tmp_path)
    model = fine_tuned(WAN.build(), lora=True, gates=False)
    with pytest.raises(ValueError, match='contents="full", but WanTransformer3DModel has the adapter'):
        save_vsa(model, tmp_path, contents="full")
    with pytest.raises(ValueError, match='contents="gates", but WanTransformer3DModel has none'):
        save_vsa(model, tmp_path, contents="gates")
    with pytest.raises(ValueError, match="saves one peft adapter, but WanTransformer3DModel has none"):
        save_vsa(fine_tuned(WAN.build()), tmp_path, contents="lora")
    pattern = enable_vsa(WAN.build(), config={"*.attn1": {"top_k_ratio": 0.3}})
    with pytest.raises(ValueError, match="VSA was enabled with the pattern form"):
        save_vsa(pattern, tmp_path)
    assert list(tmp_path.iterdir()) == []
    save_vsa(pattern, tmp_path, config=VSAConfig(top_k_ratio=0.3))
