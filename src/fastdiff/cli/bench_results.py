"""The file in which `fastdiff bench` collects its results."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def kept(path: Path | None) -> dict[str, Any]:
    """The results so far, by name."""
    return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else {}


def keep(path: Path | None, name: str, row: dict[str, Any]) -> None:
    """Adds a result to a file, written aside and renamed."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(json.dumps(kept(path) | {name: row}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(aside, path)
