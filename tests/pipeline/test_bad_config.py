"""Bad arguments of `VSAConfig`, the pattern form, and what stands beside it: each refused by name."""

import decimal

import numpy as np
import torch

from bad_arguments import assert_refused, bad, table
from vsa_diffusers import VSAConfig
from vsa_diffusers.config import make_config, module_configs, resolve_config

VIDEO = [f"blocks.{layer}.attn1" for layer in range(4)]
OTHER = [f"blocks.{layer}.attn2" for layer in range(4)]
NAN, INFINITY = float("nan"), float("inf")


def patterns(config):
    return module_configs(config, VIDEO, OTHER)


def beside(config, **arguments):
    """As `enable_vsa` calls it."""
    return module_configs(resolve_config(config, arguments), VIDEO, OTHER)


def from_dict(values):
    return VSAConfig.from_dict(values)


FIELDS = [
    bad("top_k_ratio=0 ", VSAConfig, top_k_ratio=0),
    bad("top_k_ratio=-0.1", VSAConfig, top_k_ratio=-0.1),
    bad("top_k_ratio=1.01", VSAConfig, top_k_ratio=1.01),
    bad("top_k_ratio=20", VSAConfig, top_k_ratio=20),
    bad("top_k_ratio=nan", VSAConfig, top_k_ratio=NAN),
    bad("top_k_ratio=nan", VSAConfig, top_k_ratio=np.float32("nan")),
    bad("top_k_ratio=inf", VSAConfig, top_k_ratio=INFINITY),
    bad("top_k_ratio=True", VSAConfig, top_k_ratio=True),
    bad("top_k_ratio=True", VSAConfig, top_k_ratio=np.True_),
    bad("top_k_ratio='half'", VSAConfig, top_k_ratio="half"),
    bad("top_k_ratio='0.2'", VSAConfig, top_k_ratio="0.2"),
    bad("top_k_ratio=None", VSAConfig, top_k_ratio=None),
    bad("top_k_ratio=[0.2]", VSAConfig, top_k_ratio=[0.2]),
    bad("top_k_ratio=[0.25, 0.5]", VSAConfig, top_k_ratio=torch.tensor([0.25, 0.5])),
    bad("top_k_ratio=Decimal", VSAConfig, top_k_ratio=decimal.Decimal("0.2")),
    bad("top_k_ratio=(0.2+0j)", VSAConfig, top_k_ratio=0.2 + 0j),
    bad("top_k=0", VSAConfig, top_k=0),
    bad("top_k=-3", VSAConfig, top_k=-3),
    bad("top_k=2.5", VSAConfig, top_k=2.5),
    bad("top_k=nan", VSAConfig, top_k=NAN),
    bad("top_k=inf", VSAConfig, top_k=INFINITY),
    bad("top_k=True", VSAConfig, top_k=True),
    bad("top_k='8'", VSAConfig, top_k="8"),
    bad("top_k=8 and top_k_ratio=0.2 both say", VSAConfig, top_k=8, top_k_ratio=0.2),
    bad("block_size=(4, 4)", VSAConfig, block_size=(4, 4)),
    bad("block_size=()", VSAConfig, block_size=()),
    bad("block_size=64", VSAConfig, block_size=64),
    bad("block_size=(4, 4, 0)", VSAConfig, block_size=(4, 4, 0)),
    bad("block_size=(4, 4, -4)", VSAConfig, block_size=(4, 4, -4)),
    bad("block_size=(4, 4, 2.5)", VSAConfig, block_size=(4, 4, 2.5)),
    bad("block_size=(4, 4, nan)", VSAConfig, block_size=(4, 4, NAN)),
    bad("block_size=(4, 4, inf)", VSAConfig, block_size=(4, 4, INFINITY)),
    bad("block_size=(4, 4, True)", VSAConfig, block_size=(4, 4, True)),
    bad("block_size=('4', '4', '4')", VSAConfig, block_size=("4", "4", "4")),
    bad("block_size=(16, 4, 4)", VSAConfig, block_size=(16, 4, 4)),
    bad("block_size='444'", VSAConfig, block_size="444"),
    bad("block_size=[[4, 4, 4]]", VSAConfig, block_size=np.full((1, 3), 4)),
    bad('block_size="auto"', VSAConfig, block_size="auto", combine="gate"),
    bad("combine='mean'", VSAConfig, combine="mean"),
    bad("combine=None", VSAConfig, combine=None),
    bad("combine=['gate']", VSAConfig, combine=["gate"]),
    bad("combine=['gate', 'sum']", VSAConfig, combine=np.array(["gate", "sum"])),
    bad("combine='Merge'", VSAConfig, combine="Merge"),
    bad("selection='max'", VSAConfig, selection="max"),
    bad("selection=4", VSAConfig, selection=4),
    bad("implementation='cuda'", VSAConfig, implementation="cuda"),
    bad("implementation=None", VSAConfig, implementation=None),
    bad("video_shape=(4, 0, 4)", VSAConfig, video_shape=(4, 0, 4)),
    bad("video_shape=(4, 8)", VSAConfig, video_shape=(4, 8)),
    bad("video_shape=(4, 8, False)", VSAConfig, video_shape=(4, 8, False)),
    bad("video_shape='21x30x52'", VSAConfig, video_shape="21x30x52"),
    bad("video_shape=1024", VSAConfig, video_shape=1024),
    bad("dense_steps=-1", VSAConfig, dense_steps=-1),
    bad("dense_steps=1.5", VSAConfig, dense_steps=1.5),
    bad("dense_steps=-0.2", VSAConfig, dense_steps=-0.2),
    bad("dense_steps=nan", VSAConfig, dense_steps=NAN),
    bad("dense_steps=True", VSAConfig, dense_steps=True),
    bad("dense_steps=None", VSAConfig, dense_steps=None),
    bad("dense_steps='2'", VSAConfig, dense_steps="2"),
    bad("dense_steps=[2]", VSAConfig, dense_steps=[2]),
    bad("dense_layers='0'", VSAConfig, dense_layers="0"),
    bad("dense_layers=0", VSAConfig, dense_layers=0),
    bad("dense_layers=None", VSAConfig, dense_layers=None),
    bad("dense_layers=(0.5,)", VSAConfig, dense_layers=(0.5,)),
    bad("dense_layers=(True,)", VSAConfig, dense_layers=(True,)),
    bad("dense_layers=('0',)", VSAConfig, dense_layers=("0",)),
    bad("dense_layers={0", VSAConfig, dense_layers={0, 1}),
    bad("modules='blocks.*'", VSAConfig, modules="blocks.*"),
    bad("modules=()", VSAConfig, modules=()),
    bad("modules=('',)", VSAConfig, modules=("",)),
    bad("modules=(0,)", VSAConfig, modules=(0,)),
    bad("modules={'*': True}", VSAConfig, modules={"*": True}),
    bad("perhaps 'top_k_ratio' is meant", make_config, None, {"topk_ratio": 0.2}),
    bad("perhaps 'dense_steps' is meant", make_config, VSAConfig(), {"dense_step": 2}),
    bad("unknown keys ['ratio']; known are", from_dict, {"ratio": 0.2}),
    bad("unknown keys [1, 'x']", from_dict, {"x": 1, 1: 2}),
    bad("from_dict(None) must get a dict", from_dict, None),
    bad("from_dict([0.2]) must get a dict", from_dict, [0.2]),
    bad("top_k_ratio=nan", from_dict, {"top_k_ratio": NAN}),
]

PATTERNS = [
    bad("config={} has no patterns", patterns, {}),
    bad("config={} has no patterns", patterns, {"sparse_cfg": {}}),
    bad("config['sparse_cfg']=None must be a dict", patterns, {"sparse_cfg": None}),
    bad("config has unknown keys ['export']", patterns, {"sparse_cfg": {"*": {}}, "export": 1}),
    bad("must be a VSAConfig or a dict of patterns", patterns, None),
    bad("must be a VSAConfig or a dict of patterns", patterns, 0.2),
    bad("must be a VSAConfig or a dict of patterns", patterns, "*.attn1"),
    bad("must be a VSAConfig or a dict of patterns", patterns, [("*", {})]),
    bad("config has the pattern 1", patterns, {1: {}}),
    bad("config has the pattern ''", patterns, {"": {}}),
    bad("config['*.attn1']=0.3 must be a dict", patterns, {"*.attn1": 0.3}),
    bad("config['default']=False must be a dict", patterns, {"default": False}),
    bad("put 'dense_steps' into an entry, such as 'default'", patterns, {"*": {}, "dense_steps": 2}),
    bad("config['*']['enable']='no' must be True or False", patterns, {"*": {"enable": "no"}}),
    bad("config['*']['enable']=1 must be True or False", patterns, {"*": {"enable": 1}}),
    bad("config['*']['enable']=None must be True or False", patterns, {"*": {"enable": None}}),
    bad("config['default']['enable']='false'", patterns, {"default": {"enable": "false"}}),
    bad("config['*']['method']='svg' is unknown", patterns, {"*": {"method": "svg"}}),
    bad("config['*']['method']=None is unknown", patterns, {"*": {"method": None}}),
    bad("perhaps 'top_k_ratio' is meant", patterns, {"*": {"top_k_rate": 0.1}}),
    bad("config['*'] has unknown keys ['modules']", patterns, {"*": {"modules": ["*"]}}),
    bad("config['*'] has unknown keys [3]", patterns, {"*": {3: 4}}),
    bad("config['*'] has both 'top_k' and 'top_k_ratio'", patterns, {"*": {"top_k": 8, "top_k_ratio": 0.5}}),
    bad(
        "config['*'] has both 'block_size' and 'block_size_3d'",
        patterns,
        {"*": {"block_size": [4, 4, 4], "block_size_3d": [2, 4, 8]}},
    ),
    bad("config['*']: top_k_ratio=2 ", patterns, {"*": {"top_k_ratio": 2}}),
    bad("config['*']: top_k_ratio=nan", patterns, {"*": {"top_k_ratio": NAN}}),
    bad("config['*']: top_k_ratio=True", patterns, {"*": {"top_k_ratio": True}}),
    bad("config['*']: dense_steps=1.5", patterns, {"*": {"dense_steps": 1.5}}),
    bad("config['*']: dense_layers=0 ", patterns, {"*": {"dense_layers": 0}}),
    bad("config['*']['dense_layers']=(4,) names layer 4, but there are 4", patterns, {"*": {"dense_layers": [4]}}),
    bad("config['blocks.1.*']['dense_layers']=(1,)", patterns, {"blocks.1.*": {"dense_layers": [1]}}),
    bad("'blok*', which matches no video self-attention", patterns, {"blok*": {}}),
    bad("'blok*', which matches no video self-attention", patterns, {"blok*": {"enable": False}}),
    bad("'*.attn2', which matches no video self-attention", patterns, {"*.attn2": {"top_k_ratio": 0.3}}),
    bad("'blok*', which matches no video self-attention", patterns, VSAConfig(modules=["blok*"])),
    bad("dense_layers=(4,) names layer 4, but there are 4", patterns, VSAConfig(dense_layers=(4,))),
    bad("dense_layers=(-5,) names layer -5", patterns, VSAConfig(dense_layers=(-5,))),
    bad('block_size="auto"', patterns, {"default": {"block_size": "auto"}, "*": {"combine": "gate"}}),
]

BESIDE = [
    bad("top_k_ratio=2 ", beside, {"*": {}}, top_k_ratio=2),
    bad("dense_steps=False", beside, {"*": {}}, dense_steps=False),
    bad("perhaps 'dense_layers' is meant", beside, None, dense_layer=(0,)),
    bad("top_k=8 and top_k_ratio=0.2 both say", beside, None, top_k=8, top_k_ratio=0.2),
    bad("top_k_ratio=0.2 contradicts top_k_ratio=0.3 of config", beside, VSAConfig(0.3), top_k_ratio=0.2),
    bad("top_k=8 contradicts top_k_ratio=0.3 of config", beside, VSAConfig(0.3), top_k=8),
    bad("top_k_ratio=0.2 contradicts top_k=8 of config", beside, VSAConfig(top_k=8), top_k_ratio=0.2),
    bad("dense_steps=1 contradicts dense_steps=1.0", beside, VSAConfig(dense_steps=1.0), dense_steps=1),
    bad("combine='sum' contradicts combine='merge'", beside, VSAConfig(combine="merge"), combine="sum"),
    bad("modules=('x',) contradicts modules=('*',)", beside, VSAConfig(modules=["*"]), modules=["x"]),
    bad('block_size="auto"', beside, VSAConfig(combine="gate"), block_size="auto"),
    bad("dense_steps=2 contradicts dense_steps=4 of config['*']", beside, {"*": {"dense_steps": 4}}, dense_steps=2),
    bad("top_k=8 contradicts top_k_ratio=0.5 of config['*']", beside, {"*": {"top_k_ratio": 0.5}}, top_k=8),
    bad("block_size=(2, 4, 8) contradicts", beside, {"*": {"block_size_3d": [4, 4, 4]}}, block_size=(2, 4, 8)),
    bad("block_size=(4, 4, 4) contradicts", beside, VSAConfig(block_size=(2, 4, 8)), block_size=(4, 4, 4)),
    bad("modules=('*',) was given together with config=", beside, {"*": {}}, modules=["*"]),
    bad(
        "dense_layers=(0,) counts all layers, and those of config['blocks.1.*']",
        beside,
        {"blocks.1.*": {"dense_layers": [0]}},
        dense_layers=(0,),
    ),
    bad("dense_layers=(9,) names layer 9", beside, VSAConfig(0.2), dense_layers=(9,)),
    bad("config['default']['dense_layers']=(9,) names layer 9", beside, {"*": {}}, dense_layers=(9,)),
    bad("must be a VSAConfig or a dict of patterns", beside, 0.2, dense_steps=2),
]


@table([*FIELDS, *PATTERNS, *BESIDE])
def test_bad_settings_are_refused_by_name(row):
    assert_refused(row)
