"""Files that are written whole or not at all, and read with errors that name them."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

PathLike = str | os.PathLike[str]

_LARGEST_JSON = 64 * 2**20  # bytes; the index of a model in a thousand shards has one
_PARTIAL = ".partial"
_SECONDS_TO_LOCK = 10
ATTEMPTS = 100
_MEND = "save or download it again"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class MissingDirectoryError(FileNotFoundError, ValueError):
    """There is no such directory, or no such repository."""


@contextmanager
def replaced_file(path: PathLike) -> Iterator[Path]:
    """Yield a file name beside `path` to write to; when the block ends, that file takes the place of `path`, synced.

    After any error `path` is what it was, and nothing is left beside it. What a killed process left there, a
    later call removes.

    Raises:
        ValueError: `path` is a directory, or something else that is not a file.
    """
    path = Path(path).resolve()
    if path.exists():
        check_regular(path)
    for abandoned in path.parent.glob(f".{glob.escape(path.name)}.*{_PARTIAL}"):
        with suppress(FileNotFoundError), locked(abandoned, wait=False) as got:
            # A new one may be another process's, which is about to lock it.
            if got and time.time() - abandoned.stat().st_mtime > _SECONDS_TO_LOCK:
                shutil.rmtree(abandoned, ignore_errors=True)
    # A folder, since a file that a writer renames into place would lose the lock.
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_PARTIAL, dir=path.parent))
    try:
        with locked(beside):
            partial = beside / path.name
            mode = stat.S_IMODE((path if path.exists() else _made(beside / "mode")).stat().st_mode)
            yield partial
            partial.chmod(mode)  # safetensors leaves files that nobody else may read
            sync(partial)
            os.replace(partial, path)
            sync(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def read_json(path: PathLike, what: type = dict) -> Any:
    """The content of a JSON file.

    Args:
        path: the file.
        what: the type that its content has to be of.

    Raises:
        ValueError: it is not a file, too large, not JSON in UTF-8, nested too deeply, or with NaN or infinity, or its
            content is of another type.
    """
    path = Path(path)
    if check_regular(path).stat().st_size > _LARGEST_JSON:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, too many for a JSON file of its kind; {_MEND}.")
    return parse_json(path.read_bytes(), path, what)


def parse_json(content: bytes, path: Path, what: type = dict) -> Any:
    """What `read_json` returns, where the file was read already."""
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable as JSON ({error}); {_MEND}.") from error
    if not isinstance(value, what):
        raise ValueError(f"{path} holds a JSON {type(value).__name__} instead of a {what.__name__}; {_MEND}.")
    return value


@contextmanager
def opened_tensors(path: PathLike) -> Iterator[Any]:
    """`safetensors.safe_open`, whose errors name the file, also while other processes replace it.

    Raises:
        ValueError: it is not a file, or not a whole safetensors file.
        FileNotFoundError: there is nothing.
    """
    try:
        with _opened_once(Path(path)) as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); {_MEND}.") from error


def read_tensors(path: PathLike) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, on the CPU. Raises what `opened_tensors` raises."""
    with opened_tensors(path) as tensors:
        return {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118 (safe_open is not a dict)


def check_values(key: str, tensor: torch.Tensor, source: str, dtype: torch.dtype | None = None) -> None:
    """Raise `ValueError` with key and source, unless these are finite floating-point numbers that `dtype` can hold."""
    if not tensor.is_floating_point():
        raise ValueError(
            f"{key} in {source} is {_named(tensor.dtype)} instead of floating point; convert or save it again."
        )
    values = tensor.detach()
    if values.dtype.itemsize == 1:
        values = values.float()
    if not bool(values.isfinite().all()):
        raise ValueError(f"{key} in {source} holds NaN or infinity; go back to weights from before that happened.")
    if dtype is None or torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max or not tensor.numel():
        return
    largest = float(values.abs().max())
    if largest > torch.finfo(dtype).max:
        raise ValueError(
            f"{key} in {source} has values up to {largest:.3g}, but {_named(dtype)} holds at most "
            f"{torch.finfo(dtype).max:.3g}; use bfloat16 or float32."
        )


def check_fits(source: PathLike, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `ValueError` unless the tensors found in `source` have the names and sizes that are expected."""
    problems = {
        "missing keys": sorted(expected.keys() - found.keys()),
        "unexpected keys": sorted(found.keys() - expected.keys()),
        "other sizes": [
            f"{key}: {found[key]}, needs {shape}" for key, shape in expected.items() if found.get(key, shape) != shape
        ],
    }
    told = [f"{len(keys)} {what}: {keys[:3]}" for what, keys in problems.items() if keys]
    if told:
        raise ValueError(f"{source} does not fit the transformer: {'; '.join(told)}.")


def check_regular(path: Path) -> Path:
    """The path itself, if it is a file; opening a FIFO or a device could hang.

    Raises:
        ValueError: it is something else.
        FileNotFoundError: there is nothing.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is not a regular file but a {_kind_of_file(path)}; {_MEND}.")
    return path


def check_destination(path: PathLike, *, directory: bool = False) -> Path:
    """The path itself, if a file can be written there, or below it if it is to be a `directory`; asked before the work.

    Folders on the way there may still be missing.

    Raises:
        ValueError: it cannot, and why.
    """
    path = Path(path)
    place = path.absolute()
    if not directory and place.exists():
        check_regular(place)
    folders = (place, *place.parents) if directory else place.parents
    folder = next(each for each in folders if os.path.lexists(each))
    if not folder.is_dir():
        raise ValueError(f"output {path}: {folder} is not a directory; choose another place.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        what = f"nothing can be written in {folder} ({error.strerror})"
        raise ValueError(f"output {path}: {what}; choose another place.") from None
    return path


def check_name(name: str, source: Path) -> str:
    """The name itself, if it stays inside of the directory that it is relative to.

    Raises:
        ValueError: it leaves the directory; `source`, which holds it, is named.
    """
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not parts or name.startswith("/") or ".." in parts or any(sign in name for sign in "\\:\0"):
        raise ValueError(f"{source} names {name!r}, which is no file inside of its folder; {_MEND}.")
    return name


def local_directory(path_or_repo: PathLike, patterns: list[str], ignored: list[str] | None = None) -> Path:
    """A local directory or file as it is, or the files of a repository on the Hugging Face Hub, downloaded.

    In `patterns`, and those `ignored`, a star stands for slashes, too.

    A string such as "name/name" that is not a local path is a repository; everything else is local.

    Raises:
        MissingDirectoryError: there is neither.
    """
    path = Path(path_or_repo)
    if path.exists():
        return path
    if not isinstance(path_or_repo, str) or not _HUB_NAME.fullmatch(path_or_repo):
        raise MissingDirectoryError(f"path_or_repo={str(path_or_repo)!r}: no such directory; check the path.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path_or_repo, allow_patterns=patterns, ignore_patterns=ignored))
    except (OSError, ValueError) as error:
        raise MissingDirectoryError(
            f"path_or_repo={path_or_repo!r}: no such directory, and the Hugging Face Hub did not give a repository of "
            f"that name ({error}); check the path, or the name and the connection."
        ) from error


def sync(path: Path) -> None:
    """Have the operating system write a file or folder out, so that it survives a loss of power."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the folder's lock, which ends with the process; yields whether it was got.

    Where file systems have no locks, a waiting caller goes on without.
    """
    try:
        import fcntl
    except ImportError:
        yield wait
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        got = wait
        with suppress(OSError):  # held by another, or a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            got = True
        yield got
    finally:
        os.close(descriptor)


def identity(path: Path) -> tuple[int, ...]:
    """Equal to another if the file was not replaced in between. Raises `FileNotFoundError` if there is none."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _opened_once(path: Path) -> Any:
    """`safe_open`, which opens a path twice, once for the header and once for the values, of one and the same file."""
    for _ in range(ATTEMPTS):
        before, problem = identity(check_regular(path)), None
        try:
            tensors = safe_open(path, framework="pt")
        except RuntimeError as error:  # the second time, which is PyTorch's, there was no file, or a shorter one
            problem = error
        if before == identity(path):
            if problem:
                raise problem
            return tensors
    raise ValueError(f"{path} is being written to all the time; read it when that has ended.")


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kind_of_file(path: Path) -> str:
    mode = path.stat().st_mode
    kinds = {stat.S_IFDIR: "directory", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


def _made(path: Path) -> Path:
    path.touch()
    return path
