"""What `pyproject.toml` cannot say: the README as a package index shows it."""

import re
from pathlib import Path

from setuptools import setup

LOCAL = r"\((?!https?:)[^)]*\)"


def for_an_index(readme: str) -> str:
    """The text without the pictures and links that lead to files beside it, which an index does not have."""
    readme = re.sub(rf"!\[[^\]]*\]{LOCAL}\n*", "", readme)
    return re.sub(rf"\[([^\]]*)\]{LOCAL}", r"\1", readme)


README = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
setup(long_description=for_an_index(README), long_description_content_type="text/markdown")
