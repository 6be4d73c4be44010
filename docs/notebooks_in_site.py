"""A hook of MkDocs: the notebooks of `examples/notebooks` become pages of the site, under `notebooks/`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

SOURCE = Path(__file__).parents[1] / "examples"


@event_priority(100)  # before the plugin that looks for notebooks
def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add them to what the site is made from."""
    for notebook in sorted(SOURCE.glob("notebooks/*.ipynb")):
        path = notebook.relative_to(SOURCE).as_posix()
        files.append(File(path, str(SOURCE), config.site_dir, config.use_directory_urls))
    return files


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Links between notebooks lead to pages of the site, and diagrams, of which there are none, need no library."""
    if not page.file.src_uri.startswith("notebooks/"):
        return html
    html = re.sub(r'<script type="module">(?:(?!</script>).)*mermaid.*?</script>', "", html, flags=re.DOTALL)
    return re.sub(r'href="(\w+)\.ipynb"', r'href="../\1/"', html)
