"""Cases for Triton's interpreter: each is a test of its own, all cases of a file run in one process of their own.

Triton reads TRITON_INTERPRET when a kernel is defined, so the other tests cannot share a process with these. A file is
run when the first of its cases is due, with the cases that were selected.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def missing() -> str | None:
    """What makes these cases run, if they cannot."""
    if importlib.util.find_spec("triton") is None:
        return "runs with Triton: pip install 'triton>=3.6'"
    from vsa_diffusers.kernels.support import is_recent_triton

    return None if is_recent_triton() else "runs with Triton 3.6 or later: pip install 'triton>=3.6'"


@pytest.fixture(autouse=INTERPRETED and missing() is None)
def _interpreter(monkeypatch):
    from interpreter import bfloat16_products, boolean_masks, without_idle_work

    bfloat16_products(monkeypatch.setattr)
    boolean_masks(monkeypatch.setattr)
    without_idle_work(monkeypatch.setattr)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if module_path.name.startswith("interpreted_") and not INTERPRETED:
        return InterpretedFile.from_parent(parent, path=module_path)
    return None


class InterpretedFile(pytest.File):
    """The cases of one file, and what became of them."""

    outcomes: dict[str, ElementTree.Element] | None = None
    output = ""

    def collect(self) -> Iterator[pytest.Item]:
        if (reason := missing()) is not None:
            pytest.skip(reason, allow_module_level=True)
        module = pytest.Module.from_parent(self.parent, path=self.path)
        for item in self.session.genitems(module):
            case = InterpretedCase.from_parent(self, name=item.nodeid.split("::", 1)[1])
            if item.get_closest_marker("slow"):
                case.add_marker("slow")
            yield case

    def outcome(self, name: str) -> ElementTree.Element | None:
        """What the report says of a case; nothing if its process ended before."""
        if self.outcomes is None:
            self.outcomes = self.run()
        return self.outcomes.get(name)

    def run(self) -> dict[str, ElementTree.Element]:
        selected = [item.name for item in self.session.items if item.parent is self]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        environment.pop("PYTEST_XDIST_WORKER", None)
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            names = [f"{self.path}::{name}" for name in selected]
            command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider"]
            command += [f"--junitxml={report}", *names]
            told = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            self.output = told.stdout + told.stderr
            cases = ElementTree.parse(report).iter("testcase") if report.exists() else ()
            return {case.attrib["name"]: case for case in cases}


class InterpretedCase(pytest.Item):
    """One of them."""

    parent: InterpretedFile

    def __init__(self, **arguments):
        super().__init__(**arguments)
        # The first case waits for all of its file.
        self.add_marker(pytest.mark.timeout(1800))

    def runtest(self) -> None:
        outcome = self.parent.outcome(self.name)
        if outcome is None:
            raise InterpretedError(f"The process ended without a word of this case:\n{self.parent.output[-6000:]}")
        for element in outcome:
            if element.tag == "skipped":
                pytest.skip(element.attrib["message"])
            if element.tag in ("failure", "error"):
                raise InterpretedError(element.text)

    def repr_failure(self, excinfo, style=None):
        return str(excinfo.value) if excinfo.errisinstance(InterpretedError) else super().repr_failure(excinfo, style)


class InterpretedError(Exception):
    """What the case's own process said of it."""
