"""Prompts from text, JSON lines and parquet files."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PROMPT_COLUMNS = ("prompt", "text", "caption")
PROMPT_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")

logger = logging.getLogger(__name__)


class PromptFileError(ValueError):
    """A prompt file that is empty, unreadable or lacks its column."""


def read_prompts(path: str | Path, column: str | None = None) -> list[str]:
    """Reads every prompt of a file, or of all prompt files of a folder in the order of their names.

    `.txt` holds one prompt a line; `.jsonl` and `.json` one object a line; `.parquet` a column of strings. The field
    is `column`, or the first of `prompt`, `text`, `caption` that the file has. Surrounding blanks are stripped; blank
    or null prompts are left out, counted and logged as a warning with their line (or row) numbers.

    Raises FileNotFoundError for a missing path and PromptFileError for a file that is empty, is not UTF-8, is not what
    its suffix says, or lacks the column.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no prompt file or folder at {path}")
    if not path.is_dir():
        return _read_file(path, column)
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in PROMPT_SUFFIXES and not f.name.startswith("."))
    if not files:
        raise PromptFileError(f"{path} has no prompt file: expected {', '.join(PROMPT_SUFFIXES)}")
    return [prompt for file in files for prompt in _read_file(file, column)]


def pick_column(columns: Iterable[str], wanted: str | None, defaults: tuple[str, ...], where: str) -> str:
    """The name of the column to read: `wanted`, or the first of `defaults` that exists; PromptFileError if none."""
    columns = list(columns)
    for name in (wanted,) if wanted else defaults:
        if name in columns:
            return name
    expected = repr(wanted) if wanted else "one of " + ", ".join(defaults)
    raise PromptFileError(f"{where} has no column {expected}: it has {', '.join(columns) or 'none'}; name the column")


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file without their ends; PromptFileError names the first byte that is not UTF-8."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise PromptFileError(f"{path} is not UTF-8 (line {line}, byte {error.start}): convert it to UTF-8") from error
    # Not splitlines(): that also breaks at characters such as U+2028, which are legal inside a prompt or JSON string.
    return text.removesuffix("\n").split("\n") if text else []


def read_json_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) for each non-blank line; PromptFileError for a line that is not a JSON object."""
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise PromptFileError(
                f"{path} line {number} is not JSON ({error.msg}): expected an object a line"
            ) from error
        if not isinstance(row, dict):
            raise PromptFileError(f"{path} line {number} is a {type(row).__name__}: expected a JSON object a line")
        rows.append((number, row))
    return rows


def _read_file(path: Path, column: str | None) -> list[str]:
    suffix = path.suffix.lower()
    if suffix == ".txt":
        values = list(enumerate(read_lines(path), 1))
    elif suffix in (".jsonl", ".json"):
        values = _json_values(path, column)
    elif suffix == ".parquet":
        values = _parquet_values(path, column)
    else:
        raise PromptFileError(f"{path} is not a prompt file: expected {', '.join(PROMPT_SUFFIXES)}")
    return _without_blanks(path, values)


def _json_values(path: Path, column: str | None) -> list[tuple[int, Any]]:
    rows = read_json_lines(path)
    blank = sorted(set(range(1, len(read_lines(path)) + 1)) - {number for number, _ in rows})
    if not rows:
        return [(number, "") for number in blank]
    name = pick_column(rows[0][1], column, PROMPT_COLUMNS, f"{path} line {rows[0][0]}")
    for number, row in rows:
        if name not in row:
            raise PromptFileError(f"{path} line {number} has no field {name!r}: it has {', '.join(row) or 'none'}")
    return sorted([(number, row[name]) for number, row in rows] + [(number, "") for number in blank])


def _parquet_values(path: Path, column: str | None) -> list[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        name = pick_column(file.schema_arrow.names, column, PROMPT_COLUMNS, str(path))
        return list(enumerate(file.read(columns=[name]).column(name).to_pylist(), 1))
    except (pa.ArrowException, OSError) as error:
        raise PromptFileError(f"{path} is not a readable parquet file: {error}") from error


def _without_blanks(path: Path, values: list[tuple[int, Any]]) -> list[str]:
    prompts, blank = [], []
    for number, value in values:
        if value is not None and not isinstance(value, str):
            raise PromptFileError(f"{path} line {number}: a prompt must be a string, got {type(value).__name__}")
        stripped = (value or "").strip()
        if stripped:
            prompts.append(stripped)
        else:
            blank.append(number)
    if not prompts:
        raise PromptFileError(f"{path} holds no prompt ({len(blank)} blank lines): expected at least one")
    if blank:
        named = ", ".join(map(str, blank[:5])) + (", ..." if len(blank) > 5 else "")
        logger.warning("%s: %d of %d prompts are blank and left out (lines %s)", path, len(blank), len(values), named)
    return prompts
