"""Models without weights, made once for all tests of planning."""

import functools
import importlib

import pytest

from vsa_diffusers.planning.models import family_names, resolve

resolved = functools.lru_cache(maxsize=None)(resolve)


@pytest.fixture(scope="session")
def models():
    """The model of every family."""
    return {name: resolved(name) for name in family_names()}


@pytest.fixture(autouse=True)
def made_once(monkeypatch):
    """`plan` takes models from there, too."""
    monkeypatch.setattr(importlib.import_module("vsa_diffusers.planning.plan"), "resolve", resolved)
