"""Damaged, lying and hostile files are refused by name, quickly, and change nothing."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from damage import damaged, other_kinds
from tiny_fine_tuned import WAN, fine_tuned
from vsa_diffusers import VSAConfig, load_gates, load_vsa, save_vsa

SECONDS = 20  # far more than any of these needs, and far less than what would hang
KINDS = {"full": dict(max_shard_size="60KB"), "lora": {}, "gates": dict(contents="gates")}
FILES = [
    ("gates", "vsa_index.json"),
    ("gates", "vsa_config.json"),
    ("gates", "transformer/vsa_gates.safetensors"),
    ("lora", "transformer/adapter_config.json"),
    ("lora", "transformer/pytorch_lora_weights.safetensors"),
    ("full", "transformer/diffusion_pytorch_model.safetensors.index.json"),
    ("full", "transformer/diffusion_pytorch_model-00001-of-*.safetensors"),
]
TIMES = [1, pytest.param(60, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for kind, options in KINDS.items():
        save_vsa(fine_tuned(WAN.build(), lora=kind == "lora"), folder / kind, **options)
    return folder


class Victim:
    """A stock model on which every try must fail without a trace."""

    def __init__(self):
        self.model = WAN.build()
        self.before = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.attributes = {name: set(vars(module)) for name, module in self.model.named_modules()}
        self.tries = 0

    def refuses(self, load, what, names):
        began = time.perf_counter()
        try:
            load(self.model)
        except (ValueError, OSError) as error:
            told = str(error)
        else:
            pytest.fail(f"{what} was loaded")
        assert time.perf_counter() - began < SECONDS, what
        assert any(name in told for name in names), f"{what}: {told}"
        assert told[-1] in ".'", f"{what}: {told}"
        after = self.model.state_dict()
        assert after.keys() == self.before.keys(), what
        assert all(after[key].equal(value) for key, value in self.before.items()), what
        assert {name: set(vars(module)) for name, module in self.model.named_modules()} == self.attributes, what
        self.tries += 1


def loads_as_before(content, changed):
    """Whether a damage to white space alone left the same JSON."""
    try:
        return json.loads(changed) == json.loads(content)
    except (ValueError, RecursionError):
        return False


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize(("kind", "name"), FILES)
def test_every_damage_to_a_saved_directory_is_refused_by_name(saved, tmp_path, kind, name, times):
    saved = Path(shutil.copytree(saved, tmp_path / "copy"))
    [file], victim = (saved / kind).glob(name), Victim()
    content = file.read_bytes()
    for what, changed in damaged(file, times=times):
        # Without "files" it is an index of the version before, which named none.
        if changed == content or loads_as_before(content, changed) or what == "without files":
            continue
        file.write_bytes(changed)
        victim.refuses(lambda model: load_vsa(model, saved / kind), f"{name}: {what}", [str(saved / kind)])
        file.write_bytes(content)
    for what in other_kinds(file):
        victim.refuses(lambda model: load_vsa(model, saved / kind), f"{name}: {what}", [str(saved / kind)])
    print(f"{victim.tries} damages to {name} refused")
    assert victim.tries > 25
    load_vsa(victim.model, saved / kind)


def test_damage_to_single_files_is_refused_by_name(saved, tmp_path):
    saved = Path(shutil.copytree(saved, tmp_path / "copy"))
    gates, config = saved / "gates/transformer/vsa_gates.safetensors", saved / "gates/vsa_config.json"
    for file, load in (
        (gates, lambda model: load_gates(model, gates)),
        (config, lambda model: VSAConfig.from_pretrained(saved / "gates")),
    ):
        victim, content, tolerated = Victim(), file.read_bytes(), 0
        for what, changed in damaged(file):
            file.write_bytes(changed)
            if loads_as_before(content, changed):
                continue
            optional = ("byte", "without", "dense_", "modules", "top_k", "video_shape", "block_size = None")
            if what.startswith(optional) or changed == b"{}":
                # The file may still be one, since nothing but its content tells.
                tolerated += 1
            else:
                victim.refuses(load, f"{file.name}: {what}", [str(file), str(file.parent)])
        file.write_bytes(content)
        for what in other_kinds(file):
            victim.refuses(load, f"{file.name}: {what}", [str(file), str(file.parent)])
        assert victim.tries > 2 * tolerated / 3


def hostile_index(**changes):
    return lambda index: index | changes


def component(**changes):
    return lambda index: index | {"components": {"transformer": index["components"]["transformer"] | changes}}


@pytest.mark.parametrize("with_files", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (component(contents="everything"), "has contents 'everything' for transformer"),
        (component(contents=["full"]), 'has no "components" with class, contents and gates'),
        (component(gates=1), 'has no "components" with class, contents and gates'),
        (component(**{"class": None}), 'has no "components" with class, contents and gates'),
        (lambda index: index | {"components": {"../gates": index["components"]["transformer"]}}, "names '../gates'"),
        (lambda index: index | {"components": {"/etc": index["components"]["transformer"]}}, "names '/etc'"),
        (hostile_index(components={}), 'has no "components"'),
        (hostile_index(format=2), "has format 2, but this version reads 1"),
        (hostile_index(format="1"), "has format '1'"),
        (hostile_index(files={"../../passwd": {}}), "names '../../passwd', which is no file inside"),
        (hostile_index(files={"/etc/passwd": {}}), "names '/etc/passwd', which is no file inside"),
        (hostile_index(files=["vsa_config.json"]), 'has "files" that are no JSON object'),
        (hostile_index(files={"vsa_config.json": None}), "lacks"),
    ],
)
def test_an_index_that_lies_is_refused_with_its_path(saved, tmp_path, with_files, change, message):
    index = json.loads((saved / "gates/vsa_index.json").read_text())
    if not with_files:
        del index["files"]
    shutil.copytree(saved / "gates", tmp_path, dirs_exist_ok=True)
    (tmp_path / "vsa_index.json").write_text(json.dumps(change(index)))
    victim = Victim()
    with pytest.raises(ValueError) as error:
        load_vsa(victim.model, tmp_path)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(r=10**12), "is not the file"),
        (dict(target_modules="(a+)+$"), "is not the file"),
        (dict(exclude_modules="(.*)*(.*)*(.*)*x"), "is not the file"),
        (dict(rank_pattern={"(.*.*.*.*.*.*)+x": 3}), "is not the file"),
        (dict(alpha_pattern={"(.*.*.*.*.*.*)+x": 3}), "alpha_pattern that is no dict of plain module names"),
        (dict(alpha_pattern=[1]), "alpha_pattern that is no dict of plain module names"),
        (dict(megatron_core="antigravity", megatron_config={"a": 1}), "is not the file"),
        (dict(auto_mapping={"parent_library": "antigravity"}), "is not the file"),
        (dict(base_model_name_or_path="/dev/zero"), "is not the file"),
        (dict(init_lora_weights="pissa_niter_1000000"), "init_lora_weights='pissa_niter_1000000'"),
        (dict(layer_replication=[[0, 10**9]]), "layer_replication"),
        (dict(peft_type="IA3"), "peft_type='IA3'"),
        (dict(lora_alpha="6"), "lora_alpha='6'"),
        (dict(lora_alpha=True), "lora_alpha=True"),
        (dict(lora_dropout=1.5), "lora_dropout=1.5"),
        (dict(use_dora="yes"), "use_dora='yes'"),
        (dict(what_is_this=[1]), "what_is_this=[1]"),
    ],
)
@pytest.mark.parametrize("with_files", [True, False])
def test_a_hostile_adapter_config_neither_hangs_nor_runs_nor_decides(saved, tmp_path, change, message, with_files):
    model = fine_tuned(WAN.build(), lora=True)
    save_vsa(model, tmp_path)
    file = tmp_path / "transformer/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    if not with_files:
        index = json.loads((tmp_path / "vsa_index.json").read_text())
        (tmp_path / "vsa_index.json").write_text(json.dumps({key: index[key] for key in ("format", "components")}))
    fresh, began = WAN.build(), time.perf_counter()
    if with_files or message != "is not the file":
        with pytest.raises(ValueError) as error:
            load_vsa(fresh, tmp_path)
        assert message in str(error.value)
        assert str(file) in str(error.value)
    else:
        load_vsa(fresh, tmp_path)
        weights = {key.replace(".vsa.", ".default."): value for key, value in fresh.state_dict().items()}
        assert all(weights[key].equal(value) for key, value in model.state_dict().items() if "lora_" in key)
    assert time.perf_counter() - began < SECONDS


def test_ranks_that_no_file_could_hold_take_no_memory(saved, tmp_path):
    saved = Path(shutil.copytree(saved, tmp_path / "copy"))
    file = saved / "lora/transformer/pytorch_lora_weights.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    key = next(key for key in header if ".lora_B." in key)
    header[key]["shape"][1] = 2**40
    lying = json.dumps(header).encode()
    file.write_bytes(len(lying).to_bytes(8, "little") + lying + content[8 + length :])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load_vsa(WAN.build(), saved / "lora")
    file.write_bytes(content)
    assert torch.isfinite(load_vsa(WAN.build(), saved / "lora").proj_out.weight).all()
