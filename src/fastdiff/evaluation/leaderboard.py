"""Rows of trained students by method, seed and step count, and their summary over seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from scipy.stats import t as student_t

from fastdiff.data.files import write_aside
from fastdiff.evaluation.row import Row, score

Table = Literal["matched", "guided"]
METRICS = ("fid", "fid_to_teacher", "kid", "clip", "retrieval", "precision", "recall", "diversity", "sharpness")


@dataclass(frozen=True)
class Entry:
    """One student under one protocol.

    Args:
        method, family: as `fastdiff methods` names them.
        recipe: the recipe's name, which tells variants of a method apart.
        teacher: the teacher's source and fingerprint.
        table: `matched` (w = 1 for everyone) or `guided` (each method at its own w).
        student_kind: `lora` or `full`.
        steps, network_calls: of sampling; calls are network rows an image.
        seed: of training.
        train_network_passes, train_seconds, peak_memory_mib: what training cost (`fastdiff.models.denoiser.Cost`).
        metrics, teacher_metrics, baseline_metrics: numbers of the student, of the teacher at 50 steps, and of the best
            undistilled sampling with at most as many calls.
        score: excess over the floor, as a share of the baseline's.
        protocol, command, commit: how to measure again.
    """

    method: str
    family: str
    recipe: str
    teacher: str
    table: Table
    student_kind: str
    steps: int
    seed: int
    network_calls: float
    train_network_passes: float
    train_seconds: float
    peak_memory_mib: float
    metrics: dict[str, Any]
    teacher_metrics: dict[str, Any]
    baseline_metrics: dict[str, Any]
    score: float
    protocol: str
    command: str
    commit: str

    @property
    def key(self) -> tuple[str, int, int]:
        """What a row is found again by."""
        return self.recipe, self.seed, self.steps


def metrics_of(row: Row) -> dict[str, Any]:
    """The numbers and intervals of a row."""
    return {name: getattr(row, name) for name in METRICS} | {
        "seconds_per_image": row.seconds_per_image,
        "interval": row.interval,
    }


def baseline_for(rows: Sequence[Row], calls: float, table: Table) -> Row:
    """The undistilled row with the least distance among those with at most `calls` network calls.

    Raises:
        ValueError: if no undistilled row is that cheap.
    """
    matched = table == "matched"
    fitting = [
        row
        for row in rows
        if row.name.startswith("undistilled-")
        and row.name.endswith("-matched") == matched
        and (row.network_calls or math.inf) <= calls
    ]
    if not fitting:
        raise ValueError(
            f"no undistilled {table} row with at most {calls:g} network calls; make it with eval/baselines.py"
        )
    return min(fitting, key=lambda row: row.fid)


def score_against(row: Row, rows: Sequence[Row], table: Table) -> tuple[float, Row]:
    """The row's share of its baseline's excess over the floor, and that baseline."""
    floor = next(found for found in rows if found.name == "floor")
    baseline = baseline_for(rows, row.network_calls, table)
    return score(row, floor, baseline), baseline


def read_entries(path: str | Path) -> list[Entry]:
    """Entries of a leaderboard file; none if there is no file."""
    path = Path(path)
    if not path.is_file():
        return []
    names = {field.name for field in fields(Entry)}
    return [Entry(**{k: v for k, v in row.items() if k in names}) for row in json.loads(path.read_text("utf-8"))]


def write_entries(path: str | Path, entries: Sequence[Entry]) -> None:
    """All entries, sorted by recipe, steps and seed, written aside and renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(entries, key=lambda entry: (entry.family, entry.recipe, entry.steps, entry.seed))
    with write_aside(path) as aside:
        aside.write_text(json.dumps([asdict(entry) for entry in ordered], indent=1) + "\n", encoding="utf-8")


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half of its 95 % interval over seeds (Student's t); None for a single value."""
    if len(values) < 2:
        return fmean(values), None
    half = student_t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return fmean(values), float(half)


def summary(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """One line a recipe and step count: seeds, and mean and half-width of every number that the table shows."""
    groups: dict[tuple[str, int], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.recipe, entry.steps), []).append(entry)
    lines = []
    for (recipe, steps), found in groups.items():
        first = found[0]
        numbers = {name: mean_and_half_width([entry.metrics[name] for entry in found]) for name in METRICS}
        numbers["score"] = mean_and_half_width([entry.score for entry in found])
        for name in ("retrieval", "diversity", "sharpness"):
            ratios = [entry.metrics[name] / entry.teacher_metrics[name] for entry in found]
            numbers[f"{name} / teacher"] = mean_and_half_width(ratios)
        lines.append(
            {
                "recipe": recipe,
                "method": first.method,
                "family": first.family,
                "table": first.table,
                "student": first.student_kind,
                "steps": steps,
                "seeds": len(found),
                "train_seconds": fmean(entry.train_seconds for entry in found),
                "train_network_passes": fmean(entry.train_network_passes for entry in found),
                "numbers": numbers,
            }
        )
    return lines


SHOWN = ("score", "fid", "fid_to_teacher", "retrieval", "recall", "diversity / teacher", "sharpness / teacher")


def markdown(entries: Sequence[Entry]) -> str:
    """The summary as a table, best score first within a table and step count."""
    head = ["method", "table", "steps", "seeds", *SHOWN, "train passes / 1e6"]
    rows = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines = summary(entries)
    for line in sorted(lines, key=lambda line: (line["table"], line["steps"], line["numbers"]["score"][0])):
        cells = [f"{line['recipe']} ({line['student']})", line["table"], str(line["steps"]), str(line["seeds"])]
        for name in SHOWN:
            mean, half = line["numbers"][name]
            cells.append(f"{mean:.3g}" + ("" if half is None else f" ± {half:.2g}"))
        cells.append(f"{line['train_network_passes'] / 1e6:.2g}")
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"
