"""Packages that only an extra installs: asked for before the work that needs them, not after."""

from __future__ import annotations

import importlib.util

REPORTS = ("torchmetrics", "matplotlib", "jinja2")


def check_installed(*packages: str, extra: str = "report") -> None:
    """Refuse to go on without packages.

    Args:
        packages: as they are imported.
        extra: of this package, which installs them.

    Raises:
        ImportError: one of them is missing.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        # By name: where this package is installed, pip adds the extra to it, in a clone or not.
        raise ImportError(
            f'this needs {", ".join(missing)}; pip install "vsa_diffusers[{extra}]" brings what is missing.'
        )
