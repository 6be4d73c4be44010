"""A reader sees one save whole, at whichever moment another process replaces what it reads."""

import io
import os
import re
import shutil
from threading import Lock

import pytest
import torch
from safetensors.torch import load_file, save_file

from two_saves import RATIOS, came_back, gates_that_came_back, number_of, save
from vsa_diffusers import VSAConfig
from vsa_diffusers.config import INDEX_NAME
from vsa_diffusers.converting import convert
from vsa_diffusers.directories import _finish
from vsa_diffusers.files import read_tensors

CHANGES = ("moved", "replaced")


class At:
    """Do something before the process asks for the `operation`th time what is in a folder."""

    def __init__(self, patch, folder, operation, action):
        self.folder, self.left, self.action, self.lock = str(folder), operation, action, Lock()
        # safetensors opens a file itself for the header, and has PyTorch open it again for the values.
        for module, name in ((os, "stat"), (io, "open"), (torch.UntypedStorage, "from_file")):
            patch.setattr(module, name, self._counting(getattr(module, name)))

    def _counting(self, original):
        def call(path, *args, **kwargs):
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.folder):
                with self.lock:
                    self.left -= 1
                    now = self.left == -1
                if now:
                    self.action()
            return original(path, *args, **kwargs)

        return call

    @property
    def happened(self):
        return self.left < 0


def config_that_came_back(folder, models):
    return RATIOS.index(VSAConfig.from_pretrained(folder).top_k_ratio)


def converted(folder, models):
    told = convert(folder, folder.parent / "converted", to="fastvideo")
    found = {}
    for file in (folder.parent / "converted" / "transformer").glob("*.safetensors"):
        found |= {re.sub(r"\.(to_gate)", r".attn1.\1", key): value for key, value in load_file(file).items()}
    which = number_of(found, models, found)
    assert f"{1 - RATIOS[which]:g} here" in told.said
    return which


CASES = [
    (came_back, "gates", "moved"),
    (converted, "full", "moved"),
    *((reader, "gates", change) for reader in (gates_that_came_back, config_that_came_back) for change in CHANGES),
    *(
        pytest.param(reader, kind, change, marks=pytest.mark.slow)
        for reader, kinds in (
            (came_back, ("full", "shards", "lora")),
            (gates_that_came_back, ("lora",)),
            (converted, ("shards",)),
        )
        for kind in kinds
        for change in CHANGES
    ),
    pytest.param(came_back, "gates", "replaced", marks=pytest.mark.slow),
    pytest.param(converted, "full", "replaced", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("reader", "kind", "change"), CASES)
def test_a_directory_that_changes_at_any_moment_is_read_as_one_save(
    folder, generations, monkeypatch, reader, kind, change
):
    """Changes are that a save's files are moved to their names, and that there is another save."""
    models, folder = generations[kind], folder / "saved"

    def begin():
        with monkeypatch.context() as patch:
            if change == "moved":
                patch.setattr("vsa_diffusers.directories._finish", lambda path, manifest: None)
            save(folder, models, 0, kind)

    def go_on():
        _finish(folder, INDEX_NAME) if change == "moved" else save(folder, models, 1, kind)

    operation, happened, seen = 0, True, set()
    while happened:
        shutil.rmtree(folder, ignore_errors=True)
        begin()
        with monkeypatch.context() as patch:
            at = At(patch, folder, operation, go_on)
            seen.add(reader(folder, models))
            happened = at.happened
        operation += 1
    print(f"{operation - 1} moments of {reader.__name__} of {kind}")
    assert operation > 10
    assert seen == ({0} if change == "moved" else {0, 1})


@pytest.mark.parametrize("operation", range(6))
def test_a_safetensors_file_that_is_replaced_while_it_is_opened_is_the_old_or_the_new(folder, monkeypatch, operation):
    old, new, place = {"a": torch.zeros(2, 3), "b": torch.ones(5)}, {"b": torch.rand(2, 3)}, folder / "weights"
    save_file(old, place)
    save_file(new, folder / "new")
    at = At(monkeypatch, place, operation, lambda: os.replace(folder / "new", place))
    found = read_tensors(place)
    assert any(found.keys() == one.keys() and all(found[key].equal(one[key]) for key in one) for one in (old, new))
    assert at.happened == (operation < 4)


def test_a_safetensors_file_that_is_removed_while_it_is_opened_is_missing(folder, monkeypatch):
    save_file({"a": torch.zeros(2)}, folder / "weights")
    At(monkeypatch, folder / "weights", 2, (folder / "weights").unlink)
    with pytest.raises(FileNotFoundError, match="weights"):
        read_tensors(folder / "weights")


def test_a_safetensors_file_that_is_replaced_all_the_time_is_refused(folder, monkeypatch):
    place, original = folder / "weights", torch.UntypedStorage.from_file

    def replace_and_open(*args, **kwargs):
        save_file({"a": torch.zeros(2)}, folder / "new")
        os.replace(folder / "new", place)
        return original(*args, **kwargs)

    save_file({"a": torch.zeros(2)}, place)
    monkeypatch.setattr(torch.UntypedStorage, "from_file", replace_and_open)
    with pytest.raises(ValueError, match="weights is being written to all the time"):
        read_tensors(place)
