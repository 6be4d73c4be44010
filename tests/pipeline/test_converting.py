"""`convert`: published checkpoints to ours and back without loss, whole or not at all."""

import json

import pytest
import torch
from published_checkpoints import BY_NAME, CONTRACT, renamed, trained, write_fasth3, write_fasth3_lora, write_wan
from safetensors.torch import load_file

from crashes import fails_with_files_limited_to, killed_at
from oracle import relative_error
from tiny_models import run
from vsa_diffusers import VSAConfig, enable_vsa, load_gates, load_vsa, save_vsa
from vsa_diffusers.cli import app
from vsa_diffusers.cli.script import REFUSED
from vsa_diffusers.converting import convert
from vsa_diffusers.pipeline import enabled_config

WAN, H3 = BY_NAME["wan"], BY_NAME["minimax-h3"]
GRID = (5, 10, 12)


def files_of(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def tensors_of(folder):
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("layout", ["diffusers", "mixed", "native"])
@pytest.mark.parametrize("shard_bytes", [10**9, 30_000])
def test_a_published_wan_becomes_ours(tmp_path, layout, shard_bytes):
    source = tmp_path / "Wan2.1-VSA-T2V-14B-720P-Diffusers"
    expected = write_wan(source, layout, index=layout != "mixed")
    told = convert(source, tmp_path / "ours", shard_bytes=shard_bytes)
    assert (told.model, told.gates, told.tensors) == ("WanTransformer3DModel", 2, len(expected.state_dict()))
    assert (told.shards > 1) == (shard_bytes < 10**9)
    model = load_vsa(WAN.build(), tmp_path / "ours")
    assert all(value.equal(expected.state_dict()[key]) for key, value in model.state_dict().items())
    assert enabled_config(model) == VSAConfig(
        0.1, block_size=(4, 4, 4), combine="gate", selection="mean", schedule="constant"
    )


def test_a_tree_of_fasth3_becomes_ours_with_the_sparsity_of_its_contract(tmp_path):
    expected = write_fasth3(tmp_path / "there", CONTRACT)
    told = convert(tmp_path / "there", tmp_path / "ours")
    assert "sparsity 0.8 (top_k_ratio=0.2)" in str(told)
    model = load_vsa(H3.build(), tmp_path / "ours")
    assert run(model, H3, GRID).equal(run(enable_vsa(expected, 0.2), H3, GRID))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["wan", "minimax-h3"])
def test_there_and_back_every_tensor_has_the_same_bits(tmp_path, name, dtype):
    model = trained(name).to(dtype)
    save_vsa(enable_vsa(model, 0.2), tmp_path / "ours")
    told = convert(tmp_path / "ours", tmp_path / "theirs", to="fastvideo", shard_bytes=20_000)
    assert told.shards > 1
    theirs = tensors_of(tmp_path / "theirs")
    on_block = name == "wan"
    assert any(key.startswith("blocks.0.to_gate_compress.") for key in theirs) == on_block
    index = json.loads((tmp_path / "theirs/transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == theirs.keys()
    convert(tmp_path / "theirs", tmp_path / "again", top_k_ratio=0.2)
    before, after = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(value.dtype == dtype and value.equal(after[key]) for key, value in before.items())


def test_gates_alone_are_converted_both_ways(tmp_path):
    model = trained("wan")
    save_vsa(enable_vsa(model, 0.2), tmp_path / "ours", contents="gates")
    convert(tmp_path / "ours", tmp_path / "theirs", to="fastvideo")
    assert all(key.split(".")[2] == "to_gate_compress" for key in tensors_of(tmp_path / "theirs"))
    fresh = WAN.build()
    assert len(load_gates(fresh, tmp_path / "theirs")) == 2
    convert(tmp_path / "theirs", tmp_path / "again")
    assert tensors_of(tmp_path / "ours").keys() == tensors_of(tmp_path / "again").keys()
    assert relative_error(run(load_vsa(WAN.build(), tmp_path / "again"), WAN, GRID), run(WAN.build(), WAN, GRID)) > 1e-3


def test_what_cannot_be_converted_is_refused_and_nothing_is_written(tmp_path):
    write_fasth3_lora(tmp_path / "lora", H3.build(), gates=False)
    WAN.build().save_pretrained(tmp_path / "plain" / "transformer")
    save_vsa(enable_vsa(trained("wan"), 0.2), tmp_path / "ours")
    write_wan(tmp_path / "theirs")
    target = tmp_path / "new" / "folder"
    for source, options, message in [
        ("lora", {}, "holds no gates of Wan, MiniMax-H3 or LTX-2"),
        ("plain", {}, "holds no gates of Wan"),
        ("ours", {}, "was written by save_vsa already"),
        ("theirs", dict(to="fastvideo"), "lacks vsa_index.json, so save_vsa did not write it"),
        ("ours", dict(to="fastvideo", top_k_ratio=0.2), "writes no settings, so top_k_ratio cannot be set"),
        ("theirs", dict(to="comfy"), "to='comfy'"),
        ("theirs", dict(combine="nothing"), "combine='nothing'"),
    ]:
        with pytest.raises(ValueError) as error:
            convert(tmp_path / source, target, **options)
        assert message in str(error.value)
        assert not target.parent.exists()
    with pytest.raises(ValueError, match="is the source; choose another directory"):
        convert(tmp_path / "theirs", tmp_path / "theirs")


@pytest.mark.parametrize("to", ["vsa", "fastvideo"])
def test_a_full_disk_and_a_kill_leave_the_target_as_it_was_or_whole(tmp_path, to):
    for name, seed in (("first", 1), ("second", 2)):
        if to == "vsa":
            write_wan(tmp_path / name, seed=seed)
        else:
            save_vsa(enable_vsa(trained("wan", seed), 0.2), tmp_path / name)
    target = tmp_path / "target"
    convert(tmp_path / "first", target, to=to)
    before = files_of(target)
    largest = max(map(len, before.values()))
    for size in (0, 1000, largest - 1):
        assert fails_with_files_limited_to(size, lambda: convert(tmp_path / "second", target, to=to))
        assert files_of(target) == before
    values = [renamed(trained("wan", seed).state_dict()) for seed in (1, 2)]
    seen = set()
    for operation in (1, 8, 20, 40, 400):
        ended = killed_at(operation, lambda: convert(tmp_path / "second", target, to=to))
        found = load_vsa(WAN.build(), target).state_dict()
        [which] = [n for n, each in enumerate(values) if all(found[key].equal(value) for key, value in each.items())]
        seen.add(which)
    assert ended
    assert seen == {0, 1}


def test_the_command_converts_and_says_what_it_did(tmp_path, capsys):
    write_wan(tmp_path / "FastWan2.1-T2V-1.3B-Diffusers")
    words = ["convert", str(tmp_path / "FastWan2.1-T2V-1.3B-Diffusers"), str(tmp_path / "ours"), "--json"]
    with pytest.raises(SystemExit) as ended:
        app.main(words)
    assert not ended.value.code
    told = json.loads(capsys.readouterr().out)
    assert (told["model"], told["gates"], told["layout"]) == ("WanTransformer3DModel", 2, "vsa")
    with pytest.raises(SystemExit) as ended:
        app.main(["convert", str(tmp_path / "ours"), str(tmp_path / "more")])
    assert ended.value.code == REFUSED
    assert "was written by save_vsa already" in capsys.readouterr().err
