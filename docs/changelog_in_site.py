"""A hook of MkDocs: `CHANGELOG.md` of the repository becomes a page of the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

CHANGELOG = Path(__file__).parents[1] / "CHANGELOG.md"


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add it, its links as they are from `docs/`."""

    def link(found: re.Match[str]) -> str:
        page = files.get_file_from_path(found["path"])
        in_site = page is not None and page.inclusion.is_included()
        return f"[{found['text']}]({found['path']}{found['anchor']})" if in_site else found["text"]

    links = r"\[(?P<text>[^\]]*)\]\(docs/(?P<path>[^)#]*)(?P<anchor>[^)]*)\)"
    files.append(File.generated(config, "changelog.md", content=re.sub(links, link, CHANGELOG.read_text())))
    return files
