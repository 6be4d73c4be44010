"""A directory that is replaced as one, under a manifest: a JSON file that names the others, their sizes and digests.

1. Everything is written to `.saving-<random>/files` inside the directory, and synced.
2. That folder is renamed to `.saving-<digest of the new manifest>`.
3. The new manifest takes the old one's place: from here on the directory is the new one.
4. The files are moved to their names, and those that only the old manifest named are removed.

So a file of the manifest is in `.saving-<digest of the manifest>` or, once moved, at its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .files import ATTEMPTS, PathLike, check_name, check_regular, identity, locked, parse_json, read_json, sync

Result = TypeVar("Result")

_STAGING = ".saving-"
_OBSOLETE = "obsolete.json"
_MANIFEST = "manifest.json"


@contextmanager
def replaced_directory(
    path: PathLike,
    manifest: str,
    facts: Mapping[str, Any] | None = None,
    owned: Callable[[SavedDirectory], list[str]] = lambda old: [],
) -> Iterator[Path]:
    """Yield an empty folder to write to; when the block ends, its files take the place of those saved before.

    Files of the same names are replaced, those that the old manifest names are removed, all others stay. Killed or out
    of disk at any moment, the directory is what it was or what it shall be, for readers that use `read_directory`.
    After an error it is what it was. One process writes at a time, others wait.

    Args:
        path: the directory; it is created if need be.
        manifest: name of the JSON file that names all others.
        facts: what else the manifest says.
        owned: names of the files that were saved with an old manifest that does not name them.

    Raises:
        ValueError: `path` is a file, or a directory lies where a file would.
    """
    path = Path(path)
    if os.path.lexists(path) and not path.is_dir():
        raise ValueError(f"{path} is not a directory; choose another place to save to.")
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        with locked(path):
            _finish(path, manifest)
            staging = path / f"{_STAGING}{secrets.token_hex(8)}"
            try:
                (staging / "files").mkdir(parents=True)
                yield staging / "files"
                staging = _stage(path, staging, manifest, facts or {}, owned)
                os.replace(staging / _MANIFEST, path / manifest)
                sync(path)
                _finish(path, manifest)
            except BaseException:
                # Where the new manifest got its place, the files in staging are the saved ones.
                if staging != _staging_of(path, manifest):
                    shutil.rmtree(staging, ignore_errors=True)
                raise
    except BaseException:
        for folder in created:
            with suppress(OSError):  # not empty: others put something there
                folder.rmdir()
        raise


@dataclass(frozen=True)
class SavedDirectory:
    """A directory as its manifest describes it.

    Args:
        path: the directory.
        manifest: the manifest's file.
        facts: all that the manifest says.
        staging: where files are that were not moved to their names yet.
    """

    path: Path
    manifest: Path
    facts: Mapping[str, Any]
    staging: Path

    @classmethod
    def read(cls, path: Path, manifest: str) -> SavedDirectory:
        """Raise `ValueError` if the manifest is not one, or names files outside of the directory."""
        content = check_regular(path / manifest).read_bytes()
        facts = parse_json(content, path / manifest)
        saved = cls(path, path / manifest, facts, path / _staging_name(content))
        files = facts.get("files", {})
        if not isinstance(files, dict):
            raise ValueError(f'{saved.manifest} has "files" that are no JSON object; save or download it again.')
        for name in files:
            check_name(name, saved.manifest)
        return saved

    @property
    def names(self) -> list[str]:
        """The files that the manifest names."""
        return list(self.facts.get("files", {}))

    @property
    def names_files(self) -> bool:
        """Whether the manifest was written by a version that names the files."""
        return "files" in self.facts

    def has(self, name: str) -> bool:
        """Whether the manifest names this file, or, where it names none, whether it is there."""
        return name in self.names if self.names_files else (self.path / name).exists()

    def place(self, name: str) -> Path:
        """Where a file would be."""
        staged = self.staging / "files" / name
        return staged if staged.exists() else self.path / name

    def file(self, name: str) -> Path:
        """Where a file of the directory is.

        Raises:
            ValueError: it is missing, or not a file.
        """
        file = self.place(check_name(name, self.manifest))
        if not file.exists() or (self.names_files and name not in self.names):
            raise ValueError(
                f"{(self.path / name).parent} lacks {file.name}, which {self.manifest.name} promises; save or download "
                "it again."
            )
        return check_regular(file)

    def check_digests(self) -> None:
        """Raise `ValueError` unless every file is the one that the manifest was written for."""
        files = {name: self.file(name) for name in self.names}
        for name, entry in _entries(files).items():
            if entry != self.facts["files"][name]:
                raise ValueError(
                    f"{files[name]} is not the file that {self.manifest.name} was saved with: damaged, edited or of "
                    "another save; save or download the directory again."
                )


def read_directory(path: PathLike, manifest: str, read: Callable[[SavedDirectory], Result]) -> Result:
    """What `read` makes of a directory that `replaced_directory` wrote, also while another process replaces it.

    `read` has to open all files that it needs, and may be called again. Digests are compared afterwards, so that `read`
    can say better what is wrong.

    Raises:
        ValueError: there is no manifest, it is not one, or a file is not the one that it was written for; and whatever
            `read` raises.
    """
    path = Path(path)

    def read_and_check() -> Result:
        saved = SavedDirectory.read(path, manifest)
        result = read(saved)
        saved.check_digests()
        return result

    return read_unchanged(path, manifest, read_and_check)


def read_unchanged(path: Path, manifest: str, read: Callable[[], Result]) -> Result:
    """What `read` makes of files of a directory that may have such a manifest, if no other process replaced them.

    Otherwise it is called again, also after an error.

    Raises:
        ValueError: the directory is replaced all the time; and whatever `read` raises.
    """
    for _ in range(ATTEMPTS):
        before, problem = _fingerprint(path, manifest), None
        try:
            result = read()
        except Exception as error:  # libraries raise what they like where a file was moved away
            problem = error
        if before == _fingerprint(path, manifest):
            if problem:
                raise problem
            return result
    raise ValueError(f"{path} is being written to all the time; read it when that has ended.")


def current_file(path: Path, manifest: str, name: str) -> Path:
    """Where a file is of a directory that may have such a manifest; it need not exist. For use in `read_unchanged`."""
    staging = _staging_of(path, manifest)
    staged = staging / "files" / name if staging else path / name
    return staged if staged.exists() else path / name


def _stage(
    path: Path, staging: Path, manifest: str, facts: Mapping[str, Any], owned: Callable[[SavedDirectory], list[str]]
) -> Path:
    """Sync what was written, and put it where the new manifest will look for it; return that place."""
    root = staging / "files"
    files = {file.relative_to(root).as_posix(): file for file in sorted(root.rglob("*")) if file.is_file()}
    for name in files:
        folders = [parent for parent in (path / name).parents if parent.is_relative_to(path)]
        for place, wanted in ((path / name, Path.is_file), *((folder, Path.is_dir) for folder in folders)):
            if os.path.lexists(place) and not wanted(place):
                raise ValueError(f"{place} is in the way of what is to be saved as {name}; move it away.")
    content = (json.dumps({**facts, "files": _entries(files)}, indent=2) + "\n").encode()
    old: list[str] = []
    if (path / manifest).exists():
        # What cannot be read names nothing: its files are left alone, but for those of the same names.
        with suppress(ValueError):
            saved = SavedDirectory.read(path, manifest)
            old = saved.names if saved.names_files else [check_name(name, saved.manifest) for name in owned(saved)]
    obsolete = sorted(set(old) - files.keys() - {manifest})
    (staging / _OBSOLETE).write_text(json.dumps(obsolete))
    (staging / _MANIFEST).write_bytes(content)
    mode = stat.S_IMODE((staging / _OBSOLETE).stat().st_mode)
    for each in (*files.values(), staging / _OBSOLETE, staging / _MANIFEST):
        each.chmod(mode)  # safetensors leaves files that nobody else may read
        sync(each)
    for folder in (root, *(each for each in root.rglob("*") if each.is_dir()), staging):
        sync(folder)
    final = path / _staging_name(content)
    shutil.rmtree(final, ignore_errors=True)
    staging.rename(final)
    sync(path)
    return final


def _finish(path: Path, manifest: str) -> None:
    """Move what the manifest's save left in staging to its names, and remove everything that no save needs."""
    current = _staging_of(path, manifest)
    if current is not None and current.is_dir():
        root = current / "files"
        for file in sorted(root.rglob("*")):
            if file.is_file():
                target = path / file.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
                sync(target.parent)
        for name in read_json(current / _OBSOLETE, list):
            (path / check_name(name, current / _OBSOLETE)).unlink(missing_ok=True)
            with suppress(OSError):  # not empty
                (path / name).parent.rmdir()
        # Half removed under its own name it would look like something to finish.
        current.rename(path / f"{_STAGING}{secrets.token_hex(8)}")
        sync(path)
    for folder in path.glob(f"{_STAGING}*"):
        shutil.rmtree(folder)


def _staging_of(path: Path, manifest: str) -> Path | None:
    file = path / manifest
    return path / _staging_name(file.read_bytes()) if file.is_file() else None


def _staging_name(manifest: bytes) -> str:
    return _STAGING + hashlib.sha256(manifest).hexdigest()[:32]


def _fingerprint(path: Path, manifest: str) -> Any:
    """Equal to another if nothing of the directory was replaced in between."""
    try:
        saved = SavedDirectory.read(path, manifest)
    except (OSError, ValueError) as error:
        return str(error)
    places = [saved.place(name) for name in saved.names]
    try:
        return saved.staging, places, [identity(place) if place.exists() else None for place in places]
    except FileNotFoundError:
        return object()  # moved just now, so equal to nothing


def _entries(files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """What the manifest says of files."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(_digest, files.values()))
    return {
        name: {"size": file.stat().st_size, "sha256": digest}
        for (name, file), digest in zip(files.items(), digests, strict=True)
    }


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
