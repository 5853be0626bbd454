"""`fastdiff methods`: what can be distilled with."""

from __future__ import annotations

import json

from fastdiff.cli.parsing import Parser
from fastdiff.recipes.declared import declared_methods

HELP = "list the distillation methods"
COLUMNS = ("name", "family", "needs", "student_kinds", "steps", "arxiv")


def main(arguments: list[str]) -> int:
    """Prints a table, or JSON."""
    parser = Parser("methods", "Lists the methods.")
    parser.add_argument("--json", action="store_true", help="all that is known of each, as JSON")
    flags = parser.parse_all(arguments)
    found = [method.info for method in declared_methods()]
    print(json.dumps(found, indent=2) if flags.json else _table(found))
    return 0


def _table(methods: list[dict]) -> str:
    rows = [[name.replace("_", " ") for name in COLUMNS]]
    rows += [[_cell(info[name]) for name in COLUMNS] for info in methods]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, "", *(f"{info['name']}: {info['paper']}" for info in methods)])


def _cell(value: object) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)
