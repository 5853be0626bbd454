"""Whole files only: write aside, then rename; hashes."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"


@contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """Yields a neighbour of `path` to write to; renames it to `path` on success, removes it on failure.

    Whoever opens `path` therefore sees the old file or the whole new one, even after a kill -9 or a power cut.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sha256_of(path: Path) -> str:
    """Hex digest of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
