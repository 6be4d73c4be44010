"""`metrics.jsonl`: a line of JSON for every step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from vsa_diffusers.files import replaced_file


class MetricsLog:
    """Appends records, each with its `step`.

    Args:
        path: the file.
        step: lines of later steps are cut off, since those steps will be done again; so is what no record can be read
            from, such as a line that a kill tore.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        records = [(line, record_of(line)) for line in content.split(b"\n") if line.strip()]
        self.torn = sum(record is None for _, record in records)
        kept = b"".join(line + b"\n" for line, record in records if record is not None and record["step"] <= step)
        if kept != content:
            with replaced_file(path) as partial:
                partial.write_bytes(kept)

    def append(self, record: dict[str, Any]) -> None:
        """Write one record; what is not finite becomes null, as JSON has no word for it."""
        known = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        with self.path.open("a") as log:
            log.write(json.dumps(known, allow_nan=False) + "\n")


def record_of(line: bytes) -> dict[str, Any] | None:
    """A line's record, or `None` if it holds none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None
