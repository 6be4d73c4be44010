"""What the measurement of several ranks has to find, and what of it one process finds, too, by name."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.distributed as dist

from vsa_diffusers import VSAConfig, enable_vsa
from vsa_diffusers.bench import scaling, scaling_training
from vsa_diffusers.parallel import Exchange

TOKENS, CHANNELS, LAYERS, FLOAT = 150, 64, 2, 4  # of Wan's tiny model
HEADS = 2


def sent_bytes(gpus: int, rank: int, tensors: int) -> int:
    """What a rank sends in one forward, where heads fill up to the ranks and tokens are split unevenly."""
    share = -(-HEADS // gpus)
    own = TOKENS // gpus + (rank < TOKENS % gpus)
    width = share * (CHANNELS // HEADS) * FLOAT
    return LAYERS * width * (tensors * own * (gpus - 1) + TOKENS - own)


def forwards_are_measured(gpus: tuple[int, ...], models: tuple[str, ...] = ("wan1.3b-480p", "hunyuan-720p")) -> None:
    ranks = dist.get_world_size()
    rows = scaling.main(["--tiny", "--uneven", "--models", *models, "--runs=1"])
    wan = [row for row in rows if row["model"] == models[0]]
    attention = ("dense", "merge 0.2", "gate 0.2")
    expected = [(what, 1, "alone") for what in attention]
    for number in gpus:
        guidance = "guidance" if number == 2 else "guidance, Ulysses inside"
        expected += [(what, number, way) for way in ("Ulysses", guidance) for what in attention]
    assert [(row["what"], row["gpus"], row["way"]) for row in wan] == expected
    assert len(rows) == len(expected) + (len(models) - 1) * 3 * (1 + len(gpus))
    for row in rows:
        assert len(row["ranks"]) == ranks
        assert ("error" in row) == (row["gpus"] > 1)
        assert row.get("error", 0) < 1e-4, row
        assert (row["what"] == "dense") == (not row["ranks"][0]["tiles"])
        if row["way"] == "Ulysses":
            assert all(each["attention"] > each["exchange"] > 0 for each in row["ranks"])
    for row in wan:
        if row["way"] == "Ulysses":
            tensors, number = 4 if row["what"].startswith("gate") else 3, row["gpus"]
            told = [each["sent_bytes"] for each in row["ranks"]]
            assert told == [sent_bytes(number, rank % number, tensors) for rank in range(ranks)], told
            tiles = [each["tiles"] for each in row["ranks"]]
            if tiles[0]:
                # Filled heads are worked on like any other.
                filled = [max(0, min(1, rank % number - HEADS + 1)) for rank in range(ranks)]
                assert [each["filled_heads"] for each in tiles] == filled
                assert row["tile_imbalance"] == 0


def alone_equals_a_forward_of_one_process() -> None:
    """The output that the others are compared with is itself that of the model with VSA and nothing else."""
    outputs = []
    measure = scaling.measure

    def keep(*args):
        found, output = measure(*args)
        outputs.append(output)
        return found, output

    scaling.measure = keep
    try:
        scaling.main(["--tiny", "--models", "wan1.3b-480p", "--runs=1", "--what", "merge", "--no-guidance"])
    finally:
        scaling.measure = measure
    alone, together = outputs
    size = scaling.SIZES["wan1.3b-480p"]
    torch.manual_seed(0)
    model = size.build("cpu", torch.float32, True)
    inputs = size.make_inputs(model.config, "cpu", torch.float32, True)
    enable_vsa(model, config=VSAConfig(0.2, combine="merge"))
    with torch.no_grad():
        expected = model(**inputs, return_dict=False)[0]
    torch.testing.assert_close(alone, expected)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)


def a_wrong_exchange_shows() -> None:
    original = Exchange.to_tokens

    def mixed_up(self, *args, **kwargs):
        return original(self, *args, **kwargs).flip(2)

    Exchange.to_tokens = mixed_up
    try:
        rows = scaling.main(["--tiny", "--models", "wan1.3b-480p", "--runs=1", "--what", "merge", "--no-guidance"])
    finally:
        Exchange.to_tokens = original
    assert rows[-1]["error"] > 1e-3, rows[-1]["error"]
    assert not rows[-1]["equal"]


def a_number_that_does_not_divide_raises() -> None:
    with pytest.raises(ValueError, match="--gpus 3 does not divide the"):
        scaling.main(["--tiny", "--gpus", "3"])


def a_step_of_training_is_measured(what: str) -> None:
    """Loss and gradient of the sharded step are those of one process that averages over the videos."""
    ranks = dist.get_world_size()
    [row] = scaling.main(["--tiny", "--train", "--what", what, "--layers=1", "--runs=2"])
    size = scaling.shortened(scaling.SIZES["wan14b-480p"], 1)
    model = scaling_training.build(size, "cpu", torch.float32, True, gates=what == "gate")
    if what != "dense":
        enable_vsa(model, config=VSAConfig(0.125, combine=what))
    losses = [
        scaling_training.loss_of(
            model, scaling_training.make_batch(size, model.config, "cpu", torch.float32, True, seed)
        )
        for seed in range(ranks // 2)
    ]
    torch.stack(losses).mean().backward()
    losses = [each.item() for each in losses]
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    norm = math.sqrt(sum(float(each.square().sum()) for each in gradients))
    assert row["layers"] == 1
    assert row["error"] < 1e-5
    for rank, each in enumerate(row["ranks"]):
        first, second = each["steps"]
        assert first["loss"] == pytest.approx(losses[rank // 2], rel=1e-5)
        assert each["forward_loss"] == pytest.approx(losses[rank // 2], rel=1e-5)
        assert first["gradient_norm"] == pytest.approx(norm, rel=1e-4)
        assert second["loss"] != first["loss"]


TRAINS = {
    f"a step of training is measured, {what}": functools.partial(a_step_of_training_is_measured, what)
    for what in ("merge", "gate")
}
if not hasattr(torch.cpu.Stream, "record_event"):
    TRAINS = {}  # PyTorch's FSDP runs on processors as of 2.13
TWO = {
    "scaling is measured": functools.partial(forwards_are_measured, (2,)),
    "scaling compares with one process": alone_equals_a_forward_of_one_process,
    "scaling sees a wrong exchange": a_wrong_exchange_shows,
    "a number of GPUs that does not divide raises": a_number_that_does_not_divide_raises,
    **dict(list(TRAINS.items())[:1]),  # eight processes have both
}
EIGHT = {"scaling is measured": functools.partial(forwards_are_measured, (2, 4, 8)), **TRAINS}
