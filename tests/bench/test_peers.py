import importlib.machinery
import sys
import time
import types

import peer_packages
import pytest
import torch

from vsa_diffusers.bench import peers, report, subjects
from vsa_diffusers.bench.layers import Settings, measure_shape
from vsa_diffusers.bench.shapes import parse
from vsa_diffusers.cli.bench import PEERS as NAMES
from vsa_diffusers.cli.bench import Peer as PeerOption

PARTIAL = "2x2x6x7x9x64"  # tiles with fewer tokens on every axis
on_cpu = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="runs where torch sees no GPU (CUDA_VISIBLE_DEVICES= pytest): with one, other things are measured",
)


def install(monkeypatch, module):
    """Make `module` importable under its name."""
    module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def rows_of(*names, ratios=(0.5,), shape=PARTIAL, backward=False):
    settings = Settings(ratios=ratios, combines=["gate"], backward=backward, peers=names)
    return [row for row in measure_shape(parse(shape), settings) if "peer" in row]


def difference(peer, shape, ratio):
    """How far the output of a peer is from ours with the same gate."""
    shape = parse(shape)
    inputs = shape.inputs("cpu", torch.float32)
    expected = subjects.ours(inputs, shape, ratio, "gate", "torch")()
    return float((peer(inputs, shape, "cpu")(ratio) - expected).norm() / expected.norm())


def test_the_command_line_offers_every_peer():
    assert {each.value for each in PeerOption} == {"all", "none", *peers.PEERS}
    assert ", ".join(peers.PEERS) == NAMES


def test_without_names_what_is_installed_is_measured_on_a_gpu(monkeypatch):
    for name in {peer.module for peer in peers.PEERS.values()}:
        monkeypatch.setitem(sys.modules, name, None)
    assert peers.chosen(None, "cuda") == []
    install(monkeypatch, peer_packages.sageattention())
    assert peers.chosen(None, "cuda") == ["sageattention"]
    assert peers.chosen(None, "cpu") == []
    assert peers.chosen(["all"], "cpu") == list(peers.PEERS)
    assert peers.chosen(["none"], "cuda") == []
    with pytest.raises(ValueError, match=r"peers has 'flash', which is unknown; choose of all, none, attn-gym, "):
        peers.chosen(["flash"], "cuda")


@on_cpu
def test_a_peer_that_is_asked_for_and_not_there_is_a_row_that_says_so(monkeypatch):
    for peer in peers.PEERS.values():
        monkeypatch.setitem(sys.modules, peer.module, None)
    rows = rows_of("all")
    assert [row["what"] for row in rows] == list(peers.PEERS)
    assert {row["skipped"] for row in rows if row["what"].startswith("comfy-kitchen")} == {
        "it is not installed: pip install comfy-kitchen"
    }


@on_cpu
def test_a_peer_that_fails_in_its_own_way_is_a_row_with_its_reason(monkeypatch):
    class CompilationError(Exception):
        pass

    def sageattn(*args, **kwargs):
        raise CompilationError("at 1:2:\n  what it does not know")

    broken = types.ModuleType("sageattention")
    broken.sageattn = sageattn
    install(monkeypatch, broken)
    assert [row["skipped"] for row in rows_of("sageattention")] == ["at 1:2: what it does not know"]


@on_cpu
def test_fastvideo_gets_the_tokens_of_a_partial_tile_first(monkeypatch):
    install(monkeypatch, peer_packages.fastvideo_kernel())
    rows = rows_of("fastvideo-kernel", ratios=(0.5, 0.2))
    assert [row["ratio"] for row in rows] == [0.5, 0.2]
    assert all(row["difference"] < 1e-5 and row["ms"] > 0 for row in rows)


@on_cpu
def test_a_dense_peer_is_one_row_and_leaves_the_inputs_to_others(monkeypatch):
    install(monkeypatch, peer_packages.sageattention())
    (row,) = rows_of("sageattention", ratios=(0.5, 0.2))
    assert row["ratio"] is None
    assert row["difference"] < 1e-5
    shape = parse(PARTIAL)
    inputs = shape.inputs("cpu", torch.float32)
    before = [x.clone() for x in inputs]
    peers.Sage(inputs, shape, "cpu")(1.0)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@on_cpu
def test_what_a_peer_compiles_in_its_first_call_is_not_in_its_time(monkeypatch):
    monkeypatch.setattr("vsa_diffusers.bench.measure.CPU_LONG_MS", 200.0)
    module = peer_packages.sageattention()
    computes = module.sageattn
    calls = []

    def compiles_first(*args, **kwargs):
        calls.append(1)
        time.sleep(0.3 * (len(calls) == 1))
        return computes(*args, **kwargs)

    module.sageattn = compiles_first
    install(monkeypatch, module)
    assert rows_of("sageattention")[0]["ms"] < 200


def test_comfy_kitchen_does_not_stand_for_its_kernels_where_they_do_not_run():
    query = torch.zeros(1, 64, 1, 128, dtype=torch.bfloat16)
    backends = {"cuda": {"unavailable_reason": "no cubin"}}
    package = types.SimpleNamespace(
        sol_attn_is_available=lambda device: False,
        registry=types.SimpleNamespace(list_backends=lambda: backends),
    )
    with pytest.raises(RuntimeError, match="cannot run here: no cubin"):
        peers._check_kernels_of_sol(package, query)
    package.sol_attn_is_available = lambda device: True
    peers._check_kernels_of_sol(package, query)
    with pytest.raises(RuntimeError, match="take head_dim 128 in bf16 or fp16, not 64"):
        peers._check_kernels_of_sol(package, query[..., :64])


def test_peers_are_not_in_the_verdict():
    dense, ours = (
        {"what": w, "ratio": r, "ms": ms, "speedup": 10 / ms} for w, r, ms in [("x", None, 10), ("y", 0.5, 5)]
    )
    faster = [{"what": "z", "ratio": ratio, "ms": 1.0, "speedup": 10.0, "peer": "z 1.0"} for ratio in (None, 0.5)]
    assert report.verdict([dense, ours, *faster]) == report.verdict([dense, ours])


@on_cpu
@pytest.mark.parametrize("shape", ["1x2x4x4x7x128", "2x1x4x4x3x128"])
def test_comfy_kitchen_computes_what_ours_does_where_it_keeps_every_tile(shape):
    pytest.importorskip("comfy_kitchen", reason="runs with comfy-kitchen installed: pip install comfy-kitchen")
    # Beside its share, a tile keeps its neighbours: of two tiles both.
    assert difference(peers.SolVSA, shape, 0.99) < 1e-5


@on_cpu
@pytest.mark.slow
@pytest.mark.parametrize("peer", [peers.FlexVSA, peers.CompiledFlexVSA])
@pytest.mark.parametrize("shape", [PARTIAL, "1x2x8x8x12x64"])
def test_attention_gym_computes_what_ours_does(peer, shape):
    pytest.importorskip("attn_gym", reason="runs with attn-gym installed: pip install attn-gym")
    for ratio in (0.5, 0.2):
        assert difference(peer, shape, ratio) < 1e-5


@on_cpu
@pytest.mark.slow
def test_no_ratio_is_one_too_many_for_what_compiles_each(monkeypatch):
    pytest.importorskip("attn_gym", reason="runs with attn-gym installed: pip install attn-gym")
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    shape = parse("1x1x4x4x8x64")
    inputs = shape.inputs("cpu", torch.float32)
    peer = peers.CompiledFlexVSA(inputs, shape, "cpu")
    for ratio in (1.0, 0.5):
        expected = subjects.ours(inputs, shape, ratio, "gate", "torch")()
        torch.testing.assert_close(peer(ratio), expected, rtol=1e-4, atol=1e-4)
