"""What `save_vsa` writes comes back on stock pipelines with `load_vsa`, or is refused before anything has changed."""

import json
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from tiny_fine_tuned import GRID, WAN, fine_tuned
from tiny_models import RECIPES, run
from tiny_pipelines_video import TEXT, PipelineRecipe, embeddings, wan, wan22
from tiny_text_pipeline import tiny_pipeline
from vsa_diffusers import VSAConfig, enable_vsa, load_gates, load_vsa, save_vsa
from vsa_diffusers.pipeline import enabled_config

CALL = dict(prompt="a red ring", height=64, width=96, num_frames=9, num_inference_steps=2, output_type="pt")


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
    assert set(asked) == {"somebody/something"}


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
        assert (expected[name] - stock).abs().max() > 1e-2
    script = FRESH.format(tests=str(Path(__file__).parents[1] / "support"), folder=str(tmp_path), call=CALL)
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)
    videos = load_file(tmp_path / "videos.safetensors")
    for name, video in videos.items():
        # Bit for bit, for both have one thread, the same attention backend, and weights that lie alike in memory (the
        # same files are mapped); otherwise products round in another way, which here becomes some 1e-4.
        assert video.equal(expected[name]), f"differs by {(video - expected[name]).abs().max()}"


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


def test_only_what_save_vsa_wrote_is_replaced_or_removed(tmp_path):
    model = fine_tuned(WAN.build())
    model.save_pretrained(tmp_path / "transformer", max_shard_size="60KB")
    theirs = {file: file.read_bytes() for file in (tmp_path / "transformer").iterdir()}
    assert len(theirs) > 3
    save_vsa(model, tmp_path, contents="gates")
    assert {file: file.read_bytes() for file in theirs} == theirs
    save_vsa(fine_tuned(WAN.build(), lora=True, gates=False), tmp_path)
    assert {file: file.read_bytes() for file in theirs} == theirs
    assert not (tmp_path / "transformer" / "vsa_gates.safetensors").exists()


KINDS = {"full": {}, "shards": dict(max_shard_size="60KB"), "lora": {}, "gates": dict(contents="gates")}


@pytest.mark.parametrize("second", KINDS)
def test_saving_over_any_other_kind_leaves_what_saving_afresh_does(tmp_path, second):
    models = {kind: fine_tuned(WAN.build(), lora=kind == "lora", seed=len(kind)) for kind in KINDS}
    alone = save_vsa(models[second], tmp_path / "alone", **KINDS[second])
    expected = run(load_vsa(WAN.build(), alone), WAN, GRID)
    for first, options in KINDS.items():
        again = save_vsa(models[first], tmp_path / first, **options)
        save_vsa(models[second], again, **KINDS[second])
        files = [sorted(str(file.relative_to(each)) for file in each.rglob("*")) for each in (again, alone)]
        assert files[0] == files[1]
        assert run(load_vsa(WAN.build(), again), WAN, GRID).equal(expected)


def as_the_version_before_wrote_it(folder):
    index = json.loads((folder / "vsa_index.json").read_text())
    (folder / "vsa_index.json").write_text(json.dumps({key: index[key] for key in ("format", "components")}, indent=2))


def test_directories_whose_index_names_no_files_load_and_are_replaced(tmp_path):
    for name, size in (("whole", "5GB"), ("shards", "60KB")):
        model = fine_tuned(WAN.build())
        save_vsa(model, tmp_path / name, max_shard_size=size)
        as_the_version_before_wrote_it(tmp_path / name)
        assert run(load_vsa(WAN.build(), tmp_path / name), WAN, GRID).equal(run(model, WAN, GRID))
        save_vsa(fine_tuned(WAN.build(), lora=True, gates=False), tmp_path / name)
        assert sorted(file.name for file in (tmp_path / name / "transformer").iterdir()) == [
            "adapter_config.json",
            "pytorch_lora_weights.safetensors",
        ]


def test_the_directory_in_the_repository_loads():
    folder = Path(__file__).parents[2] / "examples"
    transformer = WanTransformer3DModel.from_pretrained(folder / "tiny_wan" / "transformer")
    assert enabled_config(load_vsa(transformer, folder / "tiny_wan_vsa")).top_k_ratio == 0.125


def test_a_mixture_of_two_saves_is_refused(tmp_path):
    for name, options in (("one", {}), ("other", dict(seed=5))):
        save_vsa(fine_tuned(WAN.build(), **options), tmp_path / name, config=VSAConfig(0.1 if options else 0.2))
    for file in (
        "vsa_config.json",
        "transformer/vsa_gates.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
    ):
        original = (tmp_path / "one" / file).read_bytes()
        (tmp_path / "one" / file).write_bytes((tmp_path / "other" / file).read_bytes())
        with pytest.raises(ValueError, match=f"{Path(file).name} is not the file that vsa_index.json was saved with"):
            load_vsa(WAN.build(), tmp_path / "one")
        (tmp_path / "one" / file).write_bytes(original)
    load_vsa(WAN.build(), tmp_path / "one")


@pytest.mark.parametrize("where", ["weight", "gate", "lora"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_weights_that_could_not_be_loaded_are_not_saved_and_the_old_stay(tmp_path, where, value):
    name = {"weight": TEXT_BIAS, "gate": GATE_KEY, "lora": "blocks.0.attn1.to_q.lora_A.default.weight"}[where]
    model = fine_tuned(WAN.build(), lora=where == "lora")
    save_vsa(model, tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    model.get_parameter(name).data.view(-1)[1] = value
    key = name.replace(".default", "")
    with pytest.raises(ValueError, match=f"{key} .*(holds NaN or infinity|has values up to 1e.06, but float16 holds)"):
        save_vsa(model, tmp_path, dtype=torch.float16)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_dtype_that_cannot_hold_weights_is_refused(tmp_path, dtype):
    with pytest.raises(ValueError, match=f"dtype={dtype} cannot hold weights"):
        save_vsa(fine_tuned(WAN.build()), tmp_path / "new", dtype=dtype)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(64, dtype=torch.int64), "is int64 instead of floating point"),
        (torch.ones(64, dtype=torch.bool), "is bool instead of floating point"),
        (torch.ones(64, dtype=torch.complex64), "is complex64 instead of floating point"),
        (torch.full((64,), float("nan")), "holds NaN or infinity"),
        (torch.full((64,), -float("inf")), "holds NaN or infinity"),
        (torch.full((64,), 1e6), "has values up to 1e\\+06, but float16 holds"),
    ],
)
def test_values_that_no_weight_can_have_are_refused_by_key(tmp_path, value, message):
    save_vsa(fine_tuned(WAN.build()), tmp_path)
    edit(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", lambda t: t.update({TEXT_BIAS: value}))
    model = WAN.build().to(torch.float16)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"{TEXT_BIAS} in .*diffusion_pytorch_model.safetensors {message}"):
        load_vsa(model, tmp_path)
    assert all(tensor.equal(before[key]) for key, tensor in model.state_dict().items())


def test_what_is_not_here_as_numbers_is_not_saved(tmp_path):
    model = accelerate.cpu_offload(fine_tuned(WAN.build()), torch.device("cpu"))
    with pytest.raises(ValueError, match="on meta, whose values are not here as numbers; save before offloading"):
        save_vsa(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_lora_comes_back_by_its_weights_and_not_by_patterns(tmp_path):
    model = WAN.build()
    config = LoraConfig(
        r=4, lora_alpha=6, rank_pattern={"blocks.0.attn1.to_k": 2}, alpha_pattern={"blocks.1.attn1.to_k": 3},
        target_modules=r".*attn1\.to_(q|k)|proj_out", use_rslora=True, init_lora_weights=False,
    )  # fmt: skip
    model.add_adapter(config)
    save_vsa(enable_vsa(model, 0.3), tmp_path)
    fresh = load_vsa(WAN.build(), tmp_path)
    assert run(fresh, WAN, GRID).equal(run(model, WAN, GRID))
    scalings = [
        [m.scaling[name] for m in each.modules() if hasattr(m, "scaling")]
        for each, name in ((model, "default"), (fresh, "vsa"))
    ]
    assert scalings[0] == scalings[1]
    assert len(set(scalings[0])) == 3


@pytest.mark.parametrize("bad", [dict(bias="all"), dict(init_lora_weights="pissa"), dict(alpha_pattern={"(.*)*k": 3})])
def test_a_lora_that_would_not_come_back_is_not_saved(tmp_path, bad):
    model = WAN.build()
    model.add_adapter(LoraConfig(**dict(r=2, target_modules=["attn1.to_q"]) | bad))
    with pytest.raises(ValueError, match=f"the adapter of WanTransformer3DModel has .*{next(iter(bad))}"):
        save_vsa(enable_vsa(model, 0.3), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("path", ["./gone", "/gone/or/not", "gone", "some/deep/folder", Path("gone/too")])
@pytest.mark.parametrize(
    "load", [lambda p: load_vsa(WAN.build(), p), lambda p: load_gates(WAN.build(), p), VSAConfig.from_pretrained]
)
def test_a_folder_that_does_not_exist_is_told_as_such_and_the_hub_is_not_asked(path, load, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match=f"{path}.*no such directory"):
        load(path)


def test_a_name_that_may_be_a_repository_says_that_it_is_no_directory_either(monkeypatch):
    def offline(repo, **_):
        raise ConnectionError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"'somebody/something': no such directory, and the Hugging Face Hub"):
        load_vsa(WAN.build(), "somebody/something")
