"""Writing aside, then renaming: a reader never sees half a file or half a folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastdiff.data.files import write_aside


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yields a folder to fill; it takes the place of `target` only once it is complete and on disk."""
    aside, old = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "old"))
    if old.exists() and not target.exists():  # killed between the two renames below
        os.replace(old, target)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for path in aside.rglob("*"):
        if path.is_file():
            _sync(path)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(aside, target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON aside and renames it."""
    with write_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def writable_folder(path: Path) -> Path:
    """Creates a folder and proves that it can be written.

    Raises:
        OSError: naming the folder and the remedy.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".fastdiff-write-test"
        probe.write_bytes(b"0")
        probe.unlink(missing_ok=True)  # several processes may test at once
    except OSError as error:
        raise OSError(
            f"output folder {path} cannot be written ({error.strerror}). Give another --output_dir."
        ) from error
    return path
