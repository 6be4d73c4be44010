"""A hook of MkDocs: a page that would load something from another host ends the build."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

LOADED = ("src", "srcset", "poster", "data")
LINKED = ("stylesheet", "icon", "preload", "preconnect", "dns-prefetch", "manifest", "modulepreload")


class Resources(HTMLParser):
    """Collects what a browser would fetch by itself."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self._in_script = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the addresses of one element."""
        self._in_script = tag == "script"
        values = {name: value or "" for name, value in attrs}
        if tag == "link" and set(values.get("rel", "").split()) & set(LINKED):
            self.addresses.append(values.get("href", ""))
        self.addresses += [values[name] for name in LOADED if name in values]

    def handle_data(self, data: str) -> None:
        """Note what a script in the page would import."""
        if self._in_script:
            self.addresses += re.findall(r"https?://[^\s\"']+\.m?js", data)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse the page, or pass it on as it is."""
    from mkdocs.exceptions import PluginError

    foreign = [each for each in Resources(output).addresses if each.startswith(("http:", "https:", "//"))]
    if foreign:
        raise PluginError(f"{page.file.src_uri} loads {', '.join(foreign)} from another host; keep a copy in docs/.")
    return output
