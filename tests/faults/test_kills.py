"""A process that is killed while it saves leaves either the old or the new, whole."""

import json
import os
import random
import time

import pytest

from crashes import killed_after, killed_at
from two_saves import KINDS, RATIOS, came_back, gates_that_came_back, save
from vsa_diffusers import VSAConfig, save_gates
from vsa_diffusers.directories import read_directory, replaced_directory


@pytest.mark.parametrize("trials", [8, pytest.param(800, marks=pytest.mark.slow)])
def test_killed_at_a_random_moment_a_directory_is_the_old_or_the_new(tmp_path, generations, trials):
    dice = random.Random(0)
    found = {"old": 0, "new": 0, "ended": 0}
    for trial in range(trials):
        kind = list(KINDS)[trial % len(KINDS)]
        folder, models = tmp_path / kind, generations[kind]
        if not folder.exists():
            save(folder, models, 0, kind)
            (folder / "transformer" / "theirs.safetensors").write_bytes(b"theirs")
        old = came_back(folder, models)
        began = time.perf_counter()
        save(tmp_path / "timed", models, 0, kind)
        seconds = dice.uniform(0, 1.3 * (time.perf_counter() - began))
        found["ended"] += killed_after(seconds, lambda f=folder, m=models, o=old, k=kind: save(f, m, 1 - o, k))
        found["old" if came_back(folder, models) == old else "new"] += 1
        assert (folder / "transformer" / "theirs.safetensors").read_bytes() == b"theirs"
    print(f"{trials} kills: {found}")
    assert found["old"] + found["new"] == trials


def test_killed_before_any_change_of_the_file_system_a_directory_is_the_old_or_the_new(folder):
    def write(which):
        with replaced_directory(folder, "index.json", {"which": which}) as new:
            (new / "part").mkdir()
            for name in ("part/a", "part/b", f"only_{which}"):
                (new / name).write_text(str(which) * 100)

    def read():
        def content(saved):
            return saved.facts["which"], [saved.file(name).read_text() for name in saved.names]

        which, texts = read_directory(folder, "index.json", content)
        assert texts == [str(which) * 100] * 3
        return which

    write(0)
    (folder / "part" / "theirs").write_text("theirs")
    found, operation, ended = [], 0, False
    while not ended:
        old = read()
        ended = killed_at(operation, lambda old=old: write(1 - old))
        found.append("old" if read() == old else "new")
        operation += 1
    print(f"{operation} calls of a save of a directory")
    assert len(found) > 30
    assert {"old", "new"} <= set(found)
    write(0)
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*")) == [
        "index.json", "only_0", "part", "part/a", "part/b", "part/theirs",
    ]  # fmt: skip


@pytest.mark.parametrize("what", ["gates", "config"])
def test_killed_before_any_change_a_single_file_is_the_old_or_the_new(folder, generations, what, monkeypatch):
    monkeypatch.setattr("vsa_diffusers.files._SECONDS_TO_LOCK", 0)
    models = generations["full"]

    def write(which):
        if what == "gates":
            save_gates(models[which], folder)
        else:
            VSAConfig(RATIOS[which]).save_pretrained(folder)

    def read():
        if what == "config":
            return RATIOS.index(VSAConfig.from_pretrained(folder).top_k_ratio)
        return gates_that_came_back(folder, models)

    write(0)
    found, operation, ended = set(), 0, False
    while not ended:
        old = read()
        ended = killed_at(operation, lambda old=old: write(1 - old))
        found.add("old" if read() == old else "new")
        operation += 1
    print(f"{operation} calls of a save of {what}")
    assert found == {"old", "new"}


def test_what_killed_processes_left_behind_is_swept_away(folder, monkeypatch):
    monkeypatch.setattr("vsa_diffusers.files._SECONDS_TO_LOCK", 0)
    for operation in range(6):
        killed_at(operation, lambda: VSAConfig().save_pretrained(folder))
    time.sleep(0.01)
    VSAConfig().save_pretrained(folder)
    assert [file.name for file in folder.iterdir()] == ["vsa_config.json"]


def test_a_reader_beside_a_writer_always_sees_one_save_whole(tmp_path, generations):
    models = generations["lora"]
    save(tmp_path, models, 0, "lora")
    child = os.fork()
    if child == 0:
        for turn in range(20):
            save(tmp_path, models, (turn + 1) % 2, "lora")
        os._exit(0)
    seen = []
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        seen.append(came_back(tmp_path, models))
    assert seen


def test_two_writers_at_once_leave_one_save_whole(tmp_path, generations):
    models = generations["lora"]
    children = []
    for which in (0, 1):
        child = os.fork()
        if child == 0:
            for _ in range(5):
                save(tmp_path, models, which, "lora")
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert came_back(tmp_path, models) in (0, 1)
    assert json.loads((tmp_path / "vsa_index.json").read_text())["format"] == 1
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, RuntimeError])
def test_an_error_while_saving_leaves_the_old_and_no_litter(tmp_path, generations, monkeypatch, error):
    models = generations["full"]
    save(tmp_path / "saved", models, 0, "full")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def broken(*args, **kwargs):
        raise error

    monkeypatch.setattr(VSAConfig, "save_pretrained", broken)
    for folder in ("saved", "new/and/deep"):
        with pytest.raises(error):
            save(tmp_path / folder, models, 1, "full")
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]
    assert gates_that_came_back(tmp_path / "saved", models) == 0
