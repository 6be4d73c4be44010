import copy
import json
import pickle

import numpy as np
import pytest
import torch

from tiny_models import RECIPES
from vsa_diffusers import VSA_DEFAULT, VSAConfig
from vsa_diffusers.config import make_config, module_configs, resolve_config
from vsa_diffusers.models import attention_modules, require_family

VIDEO = [f"blocks.{layer}.attn1" for layer in range(4)]
OTHER = [f"blocks.{layer}.attn2" for layer in range(4)]


def resolve(config):
    return module_configs(config, VIDEO, OTHER)


def test_a_config_survives_its_json(tmp_path):
    config = VSAConfig(
        top_k_ratio=0.2,
        block_size=[3, 5, 4],
        combine="merge",
        video_shape=(21, 30, 52),
        dense_steps=0.25,
        dense_layers=[0, -1],
        modules=["blocks.*"],
        selection="quarters",
    )
    assert config.block_size == (3, 5, 4)
    config.save_pretrained(tmp_path / "new")
    assert VSAConfig.from_pretrained(tmp_path / "new") == config
    assert VSAConfig.from_dict(config.to_dict()) == config
    assert VSAConfig.from_dict({}) == VSAConfig()


def test_a_block_that_is_left_open_stays_open_in_json_and_one_that_was_saved_stays_what_it_was(tmp_path):
    VSAConfig().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "vsa_config.json").read_text())["block_size"] is None
    assert VSAConfig.from_pretrained(tmp_path).block_size is None
    (tmp_path / "vsa_config.json").write_text('{"block_size": [4, 4, 4], "combine": "merge"}')
    assert VSAConfig.from_pretrained(tmp_path).block_size == (4, 4, 4)


def test_a_pattern_may_leave_the_block_open_again():
    config = {"default": {"block_size_3d": [2, 4, 8]}, "*": {}, "blocks.1.*": {"block_size": None}}
    blocks = [each.block_size for each in resolve(json.loads(json.dumps(config))).values()]
    assert blocks == [(2, 4, 8), None, (2, 4, 8), (2, 4, 8)]


def test_modules_and_dense_layers_choose_where():
    assert list(resolve(VSAConfig())) == VIDEO
    assert list(resolve(VSAConfig(modules=["blocks.1.*", "*.3.attn1"]))) == [VIDEO[1], VIDEO[3]]
    assert list(resolve(VSAConfig(dense_layers=(0, -1)))) == VIDEO[1:3]


def test_patterns_that_match_nothing_name_the_closest_that_works():
    for config in (VSAConfig(modules=["blok*"]), {"blok*": {"top_k_ratio": 0.3}}):
        with pytest.raises(
            ValueError,
            match=r"'blok\*', which matches no video self-attention; use '\*\.attn1': there are 4, blocks.0.attn1 to",
        ):
            resolve(config)
    with pytest.raises(ValueError, match=r"use '\*\.self_attn'"):
        module_configs({"self_attention": {}}, ["a.attn1", "a.self_attn"], [])
    with pytest.raises(ValueError, match=r"use 'attn': there are 1"):
        module_configs({"*attention*": {}}, ["attn"], [])


def ltx2_modules(config):
    """Sparse ones of an LTX-2 transformer."""
    transformer = next(each for each in RECIPES if each.name == "ltx2").build()
    family = require_family(transformer)
    video = list(family.video_modules(transformer))
    return list(module_configs(config, video, [name for name in attention_modules(transformer) if name not in video]))


def test_the_pattern_forms_of_the_original_example_fit_ltx2():
    by_kind = {
        "*.attn1": {"method": "vsa", "top_k_ratio": 0.5, "block_size_3d": [4, 4, 4]},
        "*.attn2": {"enable": False},
        "*.audio_attn*": {"enable": False},
        "*.audio_to_video*": {"enable": False},
        "*.video_to_audio*": {"enable": False},
    }
    sparse = ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
    by_any = {
        "*attn*": by_kind["*.attn1"] | {"video_shape": (16, 28, 48), "enable": True},
        "default": {"enable": False},
    }
    for config in (by_kind, by_any, VSA_DEFAULT):
        assert ltx2_modules(config) == sparse
    with pytest.raises(ValueError, match=r"'\*attention\*', which matches no video self-attention; use '\*\.attn1'"):
        ltx2_modules({"*attention*": by_kind["*.attn1"]})


def test_the_default_pattern_form_serves_every_video_self_attention():
    before = copy.deepcopy(VSA_DEFAULT)
    assert resolve(VSA_DEFAULT) == dict.fromkeys(VIDEO, VSAConfig(top_k_ratio=0.5, block_size=(4, 4, 4)))
    assert before == VSA_DEFAULT


def test_the_pattern_form_of_the_documentation():
    config = {
        "*.attn1": {
            "method": "vsa", "top_k_ratio": 0.3, "block_size_3d": [4, 4, 4], "video_shape": (16, 28, 48),
            "enable": True,
        },
        "*.attn2": {"enable": False},
        "default": {"enable": False},
    }  # fmt: skip
    expected = VSAConfig(top_k_ratio=0.3, block_size=(4, 4, 4), video_shape=(16, 28, 48))
    assert resolve(config) == dict.fromkeys(VIDEO, expected)
    assert resolve({"sparse_cfg": config}) == dict.fromkeys(VIDEO, expected)


def test_later_patterns_override_earlier_ones_key_by_key():
    config = {
        "default": {"top_k_ratio": 0.4},
        "*.attn1": {"block_size_3d": [2, 4, 8]},
        "blocks.1.*": {"top_k_ratio": 0.1, "selection": "quarters"},
        "blocks.2.*": {"enable": False},
    }
    resolved = resolve(config)
    assert list(resolved) == [VIDEO[0], VIDEO[1], VIDEO[3]]
    assert resolved[VIDEO[0]] == VSAConfig(top_k_ratio=0.4, block_size=(2, 4, 8))
    assert resolved[VIDEO[1]] == VSAConfig(top_k_ratio=0.1, block_size=(2, 4, 8), selection="quarters")


def test_numbers_of_numpy_are_numbers_and_survive_json(tmp_path):
    config = VSAConfig(
        top_k=np.int64(8), block_size=np.array([3, 5, 4]), video_shape=(np.int32(21), 30, 52),
        dense_steps=np.int16(2), dense_layers=np.array([0, -1]),
    )  # fmt: skip
    plain = VSAConfig(top_k=8, block_size=(3, 5, 4), video_shape=(21, 30, 52), dense_steps=2, dense_layers=(0, -1))
    assert config == plain
    assert hash(config) == hash(plain)
    assert json.loads(json.dumps(config.to_dict())) == plain.to_dict()
    config.save_pretrained(tmp_path)
    assert VSAConfig.from_pretrained(tmp_path) == plain
    shares = VSAConfig(top_k_ratio=np.float32(0.2), dense_steps=np.float64(0.25))
    assert shares == VSAConfig(top_k_ratio=0.2, dense_steps=0.25)
    assert {type(value) for value in (shares.top_k_ratio, shares.dense_steps)} == {float}
    assert VSAConfig(top_k_ratio=torch.tensor(0.25), dense_layers=torch.tensor([1])) == VSAConfig(
        0.25, dense_layers=(1,)
    )


def test_a_config_can_be_hashed_pickled_copied_and_compared():
    config = VSAConfig(0.2, block_size=[3, 5, 4], modules=["blocks.*"], dense_layers=[0], video_shape=[4, 8, 8])
    assert {config: "sparse"}[VSAConfig.from_dict(config.to_dict())] == "sparse"
    for twin in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), copy.copy(config)):
        assert twin == config
        assert hash(twin) == hash(config)
    assert config != VSAConfig(0.2, block_size=[3, 5, 4], modules=["blocks.*"], dense_layers=[0])


def test_every_pattern_may_have_dense_steps_of_its_own():
    config = {"default": {"enable": True, "dense_steps": 2}, "blocks.1.*": {"dense_steps": 0.5}, "blocks.2.*": {}}
    steps = {name: each.dense_steps for name, each in resolve(config).items()}
    assert steps == dict(zip(VIDEO, (2, 0.5, 2, 2), strict=True))


def test_dense_layers_of_a_pattern_count_what_it_matches():
    assert list(resolve({"*.attn1": {"dense_layers": [0, -1]}})) == VIDEO[1:3]
    assert list(resolve({"blocks.[23].*": {"dense_layers": [0]}})) == [VIDEO[3]]
    default = {"enable": True, "dense_layers": [0, 1]}
    assert list(resolve({"default": default})) == VIDEO[2:]
    # As with any other key, a later pattern that says nothing leaves it, and one that says something overrides it.
    assert list(resolve({"default": default, "blocks.*": {"top_k_ratio": 0.1}})) == VIDEO[2:]
    assert list(resolve({"default": default, "blocks.0.*": {"dense_layers": []}})) == [VIDEO[0], *VIDEO[2:]]
    assert {each.dense_layers for each in resolve({"default": default}).values()} == {()}


def test_a_later_pattern_may_count_tiles_in_the_other_way():
    config = {
        "default": {"enable": True, "top_k_ratio": 0.3},
        "blocks.0.*": {"top_k": 8},
        "blocks.1.*": {"top_k": None},
    }
    resolved = resolve(config)
    assert resolved[VIDEO[0]] == VSAConfig(top_k=8)
    assert resolved[VIDEO[1]] == resolved[VIDEO[2]] == VSAConfig(top_k_ratio=0.3)
    back = resolve({"default": {"enable": True, "top_k": 8}, "blocks.0.*": {"top_k_ratio": 0.3}})
    assert back[VIDEO[0]] == VSAConfig(top_k_ratio=0.3)
    assert make_config(VSAConfig(top_k=8), {"top_k_ratio": 0.3}) == VSAConfig(0.3)
    assert make_config(VSAConfig(0.3), {"top_k": 8}) == VSAConfig(top_k=8)


@pytest.mark.parametrize("nest", [lambda patterns: patterns, lambda patterns: {"sparse_cfg": patterns}])
def test_arguments_fill_in_what_the_patterns_leave_unset(nest):
    patterns = {"*.attn1": {"top_k_ratio": 0.3}, "blocks.3.*": {"enable": False}}
    before = copy.deepcopy(patterns)
    config = resolve_config(nest(patterns), dict(dense_steps=np.int64(2), dense_layers=(0,), top_k_ratio=0.5))
    assert resolve(config) == dict.fromkeys(VIDEO[1:3], VSAConfig(0.3, dense_steps=2))
    assert patterns == before
    assert resolve(json.loads(json.dumps(config))) == resolve(config)
    # Without a "default", what no pattern names stays dense.
    only = resolve_config(nest({"blocks.1.*": {}}), dict(dense_steps=2))
    assert resolve(only) == {VIDEO[1]: VSAConfig(dense_steps=2)}
    same = resolve_config(nest({"*": {"dense_steps": 2}}), dict(dense_steps=2, implementation="torch"))
    assert resolve(same) == dict.fromkeys(VIDEO, VSAConfig(dense_steps=2, implementation="torch"))


def test_arguments_fill_in_what_a_config_leaves_at_its_defaults():
    assert resolve_config(None, dict(top_k_ratio=0.2, dense_steps=2)) == VSAConfig(0.2, dense_steps=2)
    assert resolve_config(None, dict(top_k=8, implementation="torch")) == VSAConfig(top_k=8, implementation="torch")
    config = VSAConfig(0.2, dense_layers=(0,))
    assert resolve_config(config, {}) == config
    assert resolve_config(config, dict(top_k_ratio=0.2, dense_steps=2, block_size=[4, 4, 4])) == VSAConfig(
        0.2, block_size=(4, 4, 4), dense_layers=(0,), dense_steps=2
    )
    assert resolve_config(VSAConfig(dense_steps=2), dict(top_k=8)) == VSAConfig(top_k=8, dense_steps=2)


def test_unknown_keys_list_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown keys \['ratio'\]; known are .*'top_k_ratio'"):
        VSAConfig.from_dict({"ratio": 0.2})
