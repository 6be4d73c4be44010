"""Pages of HTML that hold everything they show: rendered from templates, with pictures and videos as data URIs.

A template extends "pages/base.html.jinja", which brings style and dark mode, and fills in its blocks `title`, `content`
and, where need be, `style` and `script`. Templates are named by their path inside of the package.
"""

from __future__ import annotations

import base64
import mimetypes
from pathlib import Path
from typing import Any

from ..extras import check_installed
from ..files import PathLike, replaced_file


def render(template: str, **values: Any) -> str:
    """The HTML of a template.

    Args:
        template: its path inside of the package, for example "comparison/report.html.jinja".
        values: what it shows; text is escaped. A name that it uses and that is missing is an error.

    Raises:
        ImportError: jinja2 is not installed.
    """
    check_installed("jinja2")
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vsa_diffusers", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def write_page(path: PathLike, template: str, **values: Any) -> None:
    """Render a template into a file, whole or not at all."""
    html = render(template, **values)
    with replaced_file(path) as partial:
        partial.write_text(html, encoding="utf-8")


def data_uri(content: PathLike | bytes, kind: str | None = None) -> str:
    """A file, or bytes of a media type such as "image/png", as a URI that holds the content."""
    if not isinstance(content, bytes):
        kind = kind or mimetypes.guess_type(content)[0]
        content = Path(content).read_bytes()
    return f"data:{kind or 'application/octet-stream'};base64,{base64.b64encode(content).decode('ascii')}"
