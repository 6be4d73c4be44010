import copy

import pytest

from vsa_diffusers import VSA_DEFAULT, VSAConfig
from vsa_diffusers.config import module_configs

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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(top_k_ratio=0), "top_k_ratio=0 "),
        (dict(top_k_ratio=1.01), "top_k_ratio=1.01"),
        (dict(top_k_ratio=float("nan")), "top_k_ratio=nan"),
        (dict(top_k_ratio="half"), "top_k_ratio='half'"),
        (dict(top_k=0), "top_k=0"),
        (dict(top_k=2.5), "top_k=2.5"),
        (dict(block_size=(4, 4)), "block_size="),
        (dict(block_size=(16, 4, 4)), "256 tokens; at most 128"),
        (dict(combine="mean"), "combine='mean' is unknown; choose one of 'auto', 'gate'"),
        (dict(selection="max"), "selection='max' is unknown; choose one of 'auto', 'mean', 'quarters'"),
        (dict(implementation="cuda"), "implementation='cuda' is unknown"),
        (dict(video_shape=(4, 0, 4)), "video_shape="),
        (dict(dense_steps=-1), "dense_steps=-1"),
        (dict(dense_steps=1.5), "dense_steps=1.5"),
        (dict(dense_steps=True), "dense_steps=True"),
        (dict(dense_layers="0"), "dense_layers='0'"),
        (dict(dense_layers=(0.5,)), "dense_layers="),
        (dict(modules="blocks.*"), "modules='blocks.*'"),
    ],
)
def test_a_wrong_field_is_named_with_its_value(fields, message):
    with pytest.raises(ValueError) as error:
        VSAConfig(**fields)
    assert message in str(error.value)


def test_unknown_keys_list_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown keys \['ratio'\]; known are .*'top_k_ratio'"):
        VSAConfig.from_dict({"ratio": 0.2})


def test_modules_and_dense_layers_choose_where():
    assert list(resolve(VSAConfig())) == VIDEO
    assert list(resolve(VSAConfig(modules=["blocks.1.*", "*.3.attn1"]))) == [VIDEO[1], VIDEO[3]]
    assert list(resolve(VSAConfig(dense_layers=(0, -1)))) == VIDEO[1:3]


def test_patterns_that_match_nothing_list_what_exists():
    for config in (VSAConfig(modules=["blok*"]), {"blok*": {"top_k_ratio": 0.3}}):
        with pytest.raises(ValueError, match=r"'blok\*', which matches no video self-attention; there are: blocks.0"):
            resolve(config)
    with pytest.raises(ValueError, match=r"dense_layers=\(4,\) names layer 4, but there are 4"):
        resolve(VSAConfig(dense_layers=(4,)))


def test_the_default_pattern_form_serves_every_video_self_attention():
    before = copy.deepcopy(VSA_DEFAULT)
    assert resolve(VSA_DEFAULT) == dict.fromkeys(VIDEO, VSAConfig(top_k_ratio=0.5))
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
    expected = VSAConfig(top_k_ratio=0.3, video_shape=(16, 28, 48))
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


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"*.attn1": {"ratio": 0.1}}, ValueError, "config['*.attn1'] has unknown keys ['ratio']"),
        ({"*.attn1": {"method": "svg"}}, ValueError, "['method']='svg' is unknown; choose one of 'vsa'"),
        ({"*.attn1": {"top_k_ratio": 2}}, ValueError, "top_k_ratio=2"),
        ({"*.attn1": 0.3}, TypeError, "config['*.attn1']=0.3 must be a dict"),
        ({"*.attn2": {"top_k_ratio": 0.3}}, ValueError, "'*.attn2', which matches no video self-attention"),
        ({"sparse_cfg": {}, "export": 1}, ValueError, "unknown keys ['export']"),
        ([("*", {})], TypeError, "must be a VSAConfig or a dict of patterns"),
    ],
)
def test_a_wrong_pattern_form_is_an_error(config, error, message):
    with pytest.raises(error) as raised:
        resolve(config)
    assert message in str(raised.value)
