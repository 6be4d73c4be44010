"""Checkpoints are whole at any moment, and a training goes on from nothing but its own."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file, save_file
from vsa_training.averages import learning_parameters
from vsa_training.trainer import Trainer

from training_material import random_material, training_options

STEP = 6
CHANGES = dict(use_ema=True, max_train_steps=STEP, checkpointing_steps=2, validation_shards=1)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return random_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def trained(material, tmp_path_factory):
    """The folder of a finished training, with checkpoints 2, 4 and 6."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("trained")
    Trainer(training_options(material, folder, **CHANGES)).train()
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it, to be damaged."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def resumed(material, run, **changes) -> Trainer:
    return Trainer(training_options(material, run, **CHANGES | changes))


def fill(trainer: Trainer, value: float) -> None:
    """Give everything that a checkpoint holds this value."""
    with torch.no_grad():
        for parameter in (*learning_parameters(trainer.model), *trainer.ema.shadow_params):
            parameter.fill_(value)
        for optimizer in trainer.checkpoints.optimizers:
            for state in optimizer.state.values():
                for tensor in state.values():
                    tensor.fill_(value)
    trainer.ema.optimization_step = int(value)


def content(trainer: Trainer) -> set[float]:
    """All values of what was put back."""
    states = [state for each in trainer.checkpoints.optimizers for state in each.state.values()]
    moments = [tensor for state in states for tensor in state.values()]
    tensors = [*learning_parameters(trainer.model), *trainer.ema.shadow_params, *moments]
    return {value for tensor in tensors for value in tensor.unique().tolist()} | {float(trainer.ema.optimization_step)}


def killed_while_saving(trainer: Trainer, kill) -> bool:
    """Save in a child process that `kill(child)` may end; returns whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            kill(None)
            trainer.checkpoints.save(STEP, trainer._fingerprint())
        finally:
            os._exit(0)
    kill(child)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def at_call(count: int):
    """Ends the child at its `count`-th call that changes or syncs a folder."""

    def kill(child):
        if child is not None:
            return
        left = count

        def dying(call):
            def called(*args, **kwargs):
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return called

        for name in ("replace", "rename", "fsync", "unlink", "rmdir", "mkdir"):
            setattr(os, name, dying(getattr(os, name)))

    return kill


def after(seconds: float):
    """Ends the child after so long."""

    def kill(child):
        if child is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)

    return kill


def at_random_moments(trainer: Trainer, seed: int, count: int) -> list:
    """So many kills, each at some moment of the time that a save takes on this machine."""
    began = time.perf_counter()
    assert not killed_while_saving(trainer, lambda child: None)
    seconds, dice = time.perf_counter() - began, random.Random(seed)
    return [after(dice.uniform(0, seconds)) for _ in range(count)]


def kill_again_and_again(material, run, kills) -> tuple[int, set[float]]:
    """Number of kills, and what was found after them; each save would put another value in place of all values."""
    trainer = resumed(material, run)
    found, killed, value = {1.0}, 0, 1.0
    fill(trainer, value)
    trainer.checkpoints.save(STEP, trainer._fingerprint())
    for kill in kills:
        fill(trainer, value + 1)
        killed += killed_while_saving(trainer, kill)
        step = trainer.checkpoints.load(trainer.checkpoints.choose("latest"), trainer._fingerprint())
        [here] = content(trainer)
        assert step == STEP
        assert here in (value, value + 1)
        found.add(here)
        value = here
    return killed, found


def test_a_checkpoint_that_is_saved_again_is_the_old_or_the_new_one_wherever_the_save_is_killed(material, run):
    killed, found = kill_again_and_again(material, run, map(at_call, (10, 12, 15, 16, 20, 27, 29)))
    assert killed == 7
    assert 1 < len(found) < 8  # some saves got through, and others did not


def test_a_checkpoint_outlives_kills_at_random_moments(material, run):
    killed, _ = kill_again_and_again(material, run, at_random_moments(resumed(material, run), 0, 8))
    assert killed >= 1


@pytest.mark.slow
def test_a_checkpoint_outlives_hundreds_of_kills(material, run):
    kills = [*map(at_call, range(1, 41)), *at_random_moments(resumed(material, run), 1, 200)]
    killed, found = kill_again_and_again(material, run, kills)
    print(f"{killed} of {len(kills)} saves killed, {len(found)} checkpoints found")
    assert killed >= 120
    assert len(found) >= 20


def test_a_first_save_that_was_killed_is_skipped_by_name(material, run, capsys):
    trainer = resumed(material, run)
    shutil.rmtree(run / "checkpoint-0000006")
    assert killed_while_saving(trainer, at_call(12))
    assert trainer.checkpoints.choose("latest") == run / "checkpoint-0000004"
    assert f"{run / 'checkpoint-0000006'} was never written to the end" in capsys.readouterr().out
    trainer.checkpoints.save(8, trainer._fingerprint())
    assert not (run / "checkpoint-0000006").exists()


def test_a_full_disk_leaves_the_old_checkpoint(material, run):
    trainer = resumed(material, run)
    fill(trainer, 1.0)
    trainer.checkpoints.save(STEP, trainer._fingerprint())
    fill(trainer, 2.0)
    files = sorted(path.relative_to(run) for path in run.rglob("*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for largest in (0, 2000, 50_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))
        try:
            with pytest.raises(OSError, match=r"checkpoint-0000006 could not be written .*checkpoint-0000006 is whole"):
                trainer.checkpoints.save(STEP, trainer._fingerprint())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == files
    trainer.checkpoints.load(run / "checkpoint-0000006", trainer._fingerprint())
    assert content(trainer) == {1.0}


def rewritten(path: Path, change) -> None:
    """Change a checkpoint's tensors and keep its manifest true, so that only what it holds is wrong."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    manifest = path.with_name("state.json")
    state = json.loads(manifest.read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    state["files"][path.name] = {"size": path.stat().st_size, "sha256": digest}
    manifest.write_text(json.dumps(state))


def first(tensors: dict) -> str:
    return next(name for name, tensor in tensors.items() if tensor.ndim == 2)


def halve(tensors):
    for name in sorted(tensors)[::2]:
        del tensors[name]


def cut(tensors):
    name = first(tensors)
    tensors[name] = tensors[name][: len(tensors[name]) // 2].clone()


def mistype(tensors):
    tensors[first(tensors)] = tensors[first(tensors)].half()


def poison(tensors):
    tensors[first(tensors)][0, 0] = float("nan")


def add(tensors):
    tensors["more"] = torch.zeros(1)


@pytest.mark.parametrize("name", ["weights", "ema", "optimizer"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (halve, "missing keys"),
        (dict.clear, "missing keys"),
        (cut, "1 other sizes"),
        (mistype, "1 other types"),
        (poison, "1 NaN or infinity"),
        (add, r"1 unexpected keys: \['more'\]"),
    ],
    ids=["halved", "empty", "cut", "mistyped", "NaN", "more"],
)
def test_tensors_that_are_not_the_trainings_are_refused(material, run, name, change, message):
    path = run / "checkpoint-0000006" / f"{name}.safetensors"
    rewritten(path, change)
    with pytest.raises(ValueError, match=message) as error:
        resumed(material, run)
    assert str(path) in str(error.value)
    assert "Other checkpoints to go on from: checkpoint-0000002, checkpoint-0000004." in str(error.value)


def test_a_mixture_of_two_checkpoints_is_refused(material, run):
    for name in ("weights.safetensors", "ema.safetensors", "optimizer.safetensors"):
        kept = (run / "checkpoint-0000006" / name).read_bytes()
        shutil.copy(run / "checkpoint-0000004" / name, run / "checkpoint-0000006" / name)
        with pytest.raises(ValueError, match=rf"checkpoint-0000006/{name} is not the file that state.json was saved"):
            resumed(material, run)
        (run / "checkpoint-0000006" / name).write_bytes(kept)
    assert resumed(material, run).step == 6


@pytest.mark.parametrize("name", ["weights.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("share", [0, 0.5, None], ids=["empty", "truncated", "missing"])
def test_a_damaged_file_is_refused_by_name(material, run, name, share):
    path = run / "checkpoint-0000006" / name
    whole = path.read_bytes()
    path.unlink()
    if share is not None:
        path.write_bytes(whole[: int(share * len(whole))])
    if (name, share) == ("state.json", None):
        assert resumed(material, run).step == 4
        return
    with pytest.raises(ValueError, match=r"checkpoint-0000006") as error:
        resumed(material, run)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, "has format 1"),
        ({"step": "6"}, "has step='6', where a int was expected"),
        ({"step": -1}, "has step=-1"),
        ({"step": True}, "has step=True"),
        ({"ema_step": None}, "has ema_step=None, where a int was expected"),
        ({"ema_step": -3}, "has ema_step=-3"),
        ({"learning_rates": {"count": 6}}, "learning_rates="),
        ({"learning_rates": {"count": 6.5, "stretches": [[0, 6, 2]]}}, "learning_rates="),
        ({"learning_rates": {"count": 6, "stretches": []}}, "learning_rates="),
        ({"optimizer": []}, r"has optimizer=\[\]"),
        ({"scaler": {"scale": 1.0}}, "has scaler="),
        ({"without_moments": None}, "has without_moments=None"),
        ({"fingerprint": []}, r"has fingerprint=\[\]"),
        ({"files": {"../weights.safetensors": {}}}, "no file inside"),
    ],
)
def test_a_state_that_is_no_state_is_refused(material, run, changes, message):
    path = run / "checkpoint-0000006" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message) as error:
        resumed(material, run)
    assert str(path) in str(error.value)


def test_nothing_has_changed_after_a_refusal(material, run):
    trainer = resumed(material, run)
    fill(trainer, 3.0)
    rewritten(run / "checkpoint-0000006" / "optimizer.safetensors", mistype)
    with pytest.raises(ValueError, match="other types"):
        trainer.checkpoints.load(run / "checkpoint-0000006", trainer._fingerprint())
    assert content(trainer) == {3.0}


def test_beginning_anew_among_checkpoints_is_refused(material, run):
    with pytest.raises(ValueError, match=r"holds checkpoint-0000006 of an earlier training; remove its checkpoints"):
        resumed(material, run, resume_from_checkpoint="none")


def test_a_training_that_went_back_leaves_no_later_checkpoint(material, run, capsys):
    trainer = resumed(material, run, resume_from_checkpoint="checkpoint-0000002", checkpoints_total_limit=2)
    told = "Its first checkpoint removes those of later steps: checkpoint-0000004, checkpoint-0000006."
    assert told in capsys.readouterr().out
    trainer.checkpoints.save(3, trainer._fingerprint())
    assert [path.name for path in trainer.checkpoints.finished()] == ["checkpoint-0000002", "checkpoint-0000003"]


def test_other_clips_are_another_training(material, run, tmp_path):
    random_material(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"training with other options: \{'training clips': "):
        resumed(material, run, data_dir=str(tmp_path / "other" / "latents"))


def test_a_checkpoint_from_before_an_option_goes_on_with_its_default(material, run):
    state = run / "checkpoint-0000006" / "state.json"
    facts = json.loads(state.read_text())
    for name in ("ratio_schedule", "objective", "distill_attention"):
        del facts["fingerprint"][name]
    state.write_text(json.dumps(facts))
    assert resumed(material, run).step == STEP
    with pytest.raises(ValueError, match=r"training with other options: .*'objective': 'diffusion'"):
        resumed(material, run, objective="distill")


def test_what_has_no_moments_yet_is_known(material, tmp_path):
    """A parameter that took part in no step has none, and is not missing."""

    class Unused(Trainer):
        def _train_step(self, batches):
            report = super()._train_step(batches)
            for optimizer in self.checkpoints.optimizers:
                optimizer.state.pop(self.transformer.proj_out.bias, None)
            return report

    Unused(training_options(material, tmp_path, **CHANGES)).train()
    state = json.loads((tmp_path / "checkpoint-0000006" / "state.json").read_text())
    assert state["without_moments"] == ["proj_out.bias"]
    assert resumed(material, tmp_path).step == 6
