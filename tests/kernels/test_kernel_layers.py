"""Which module of the kernels may import which, and what a launch may depend on."""

import ast
import importlib.util
import os
from pathlib import Path

import pytest
import torch

PACKAGE = Path(__file__).parents[2] / "vsa_diffusers"
# Each may import what stands in a line above it, and its own folder.
LAYERS = [
    {"primitives"},
    {"recording", "plans"},
    {"buffers"},
    {"arguments"},
    {"select", "sparse", "hopper"},
    {"support"},
    {"tuning", "launch", "trial"},
    {"forward", "backward", "packed"},
    {"__init__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted((PACKAGE / "kernels").rglob("*.py"))


def imported(file: Path) -> set[Path]:
    """The modules of the package that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            inside = [folder / alias.name for alias in node.names]
            for path in inside if folder.is_dir() else [folder]:
                found.add(path if path.is_dir() or path.with_suffix(".py").exists() else folder)
    return found


def layer(path: Path) -> str:
    """The first part of a module's path inside `kernels/`."""
    parts = path.relative_to(PACKAGE / "kernels").with_suffix("").parts
    return parts[0] if parts else "__init__"


def test_every_module_has_a_layer():
    assert {layer(file) for file in FILES} == LEVEL.keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_module_imports_a_sibling_or_a_higher_layer(file):
    own = layer(file)
    modules = imported(file)
    assert modules or own in ("primitives", "recording", "plans") or file.name in ("__init__.py", "renamed.py")
    for module in modules:
        if PACKAGE / "kernels" in module.parents:
            other = layer(module)
            assert other == own or LEVEL[other] < LEVEL[own], f"{own} imports {other}"
        else:
            assert module.name in ("problem", "tiles"), f"the kernels import {module.name}"


def test_files_of_a_folder_do_not_import_one_another_in_a_circle():
    graph = {file.with_suffix(""): imported(file) for file in FILES}
    while leaves := [file for file, needs in graph.items() if not needs & graph.keys()]:
        for file in leaves:
            del graph[file]
    assert not graph


def test_the_pytorch_implementation_and_the_kernels_do_not_import_each_other():
    for name in ("torch_impl", "torch_backward", "selection", "tiles", "problem"):
        assert all("kernels" not in path.parts[-2:] for path in imported(PACKAGE / f"{name}.py"))


def test_a_launch_that_asks_for_more_than_a_tensor_s_form_is_refused_while_it_is_recorded():
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("runs with TRITON_INTERPRET unset, and Triton: pip install 'triton>=3.6'")
    from vsa_diffusers.kernels.recording import Replays

    def launch_all(ask):
        return lambda launcher, tensors: ask(*tensors)

    x = torch.ones(2, 3)
    for ask in (torch.Tensor.item, torch.Tensor.sum, torch.Tensor.tolist, bool, lambda x: x > 0):
        with pytest.raises(AssertionError, match="A launch asked for"):
            Replays().run("key", [x[0, 0]], launch_all(ask))
    for ask in (torch.Tensor.stride, torch.Tensor.data_ptr, lambda x: x.shape, lambda x: x[:1].new_empty(3)):
        Replays().run("key", [x], launch_all(ask))
