"""What is done already, so that a tuning that was interrupted goes on after it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..files import read_json, replaced_file


class State:
    """Results by name in one JSON file, which is written anew, whole, after each of them.

    Args:
        path: the file.
        facts: all that the results depend on, ready for JSON.
        anew: forget what the file holds.

    Raises:
        ValueError: the file is of other facts, or no such file.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], anew: bool = False):
        self.path = path
        self.facts = json.loads(json.dumps(facts, default=str))
        self.results: dict[str, Any] = {}
        if not path.exists() or anew:
            return
        mend = "choose another output directory, or pass anew (--anew) to replace it"
        try:
            kept = read_json(path)
        except ValueError as error:
            raise ValueError(f"{path} is no state of a tuning; {mend}.") from error
        theirs = kept.get("facts", {})
        if kept.keys() != {"facts", "results"} or not all(isinstance(each, dict) for each in kept.values()):
            raise ValueError(f"{path} is no state of a tuning; {mend}.")
        other = [name for name in self.facts | theirs if self.facts.get(name) != theirs.get(name)]
        if other:
            name = other[0]
            raise ValueError(
                f"{path} is of another tuning: it has {name}={theirs.get(name)!r} instead of "
                f"{self.facts.get(name)!r}; {mend}."
            )
        self.results = kept["results"]

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The result of this name; made, and kept, if there is none yet. It must be what JSON can hold."""
        if name not in self.results:
            self.results[name] = json.loads(json.dumps(make()))
            with replaced_file(self.path) as partial:
                partial.write_text(json.dumps({"facts": self.facts, "results": self.results}, indent=1) + "\n")
        return self.results[name]
