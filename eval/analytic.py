"""Trains every method on teachers in closed form and measures how far its student is from the exact law.

    python eval/analytic.py
    python eval/analytic.py --methods dmd2 lcm --worlds gaussian --seeds 0
    python eval/analytic.py --worlds kernel --seeds 0 --longer 10 --output eval/results/analytic_longer.json

Rows are written to the output as they are done and skipped when they are there. A method that a world has nothing for
gets a row that says why. How methods train: closed_forms/plans.py; what is measured: closed_forms/figures.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def row_of(method: str, world: Any, seed: int, runs: Path, longer: int = 1) -> dict[str, Any]:
    """Trains and judges."""
    from closed_forms.figures import figures, floor, score, undistilled
    from closed_forms.plans import plan
    from closed_forms.runs import run

    row = {"method": method, "teacher": world.name, "seed": seed}
    stages = plan(method, world.name, longer)
    if isinstance(stages, str):
        return row | {"reason": stages}
    try:
        outcome = run(stages, world, seed, runs / f"{method}-{world.name}-{seed}-x{longer}", runs / "starts")
    except ValueError as error:
        return row | {"reason": str(error)}
    found = figures(world.build(), outcome.samples, outcome.labels)
    return row | {
        "network_calls": outcome.calls,
        "steps": outcome.steps,
        "train_network_passes": outcome.network_passes,
        "train_seconds": round(outcome.seconds, 2),
        "headline": world.headline,
        "score": score(world, found, outcome.calls),
        "figures": found,
        "floor": floor(world),
        "undistilled": undistilled(world, outcome.calls),
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that are done."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def key(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["method"], row["teacher"], row["seed"]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one row a method: mean score, the seeds' range, and network calls in each world."""
    worlds = list(dict.fromkeys(row["teacher"] for row in rows))
    lines = ["| method | " + " | ".join(worlds) + " |", "|---" * (len(worlds) + 1) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [_cell([row for row in rows if key(row)[:2] == (method, world)]) for world in worlds]
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "no run yet"
    if "reason" in rows[0]:
        return "not possible"
    scores = [row["score"] for row in rows]
    spread = f" ({min(scores):.2f}-{max(scores):.2f})" if len(scores) > 1 else ""
    return f"{sum(scores) / len(scores):.2f}{spread}, {rows[0]['network_calls']} calls"


def main() -> None:
    from closed_forms.worlds import WORLDS

    from fastdiff.data.files import write_aside
    from fastdiff.methods import METHODS

    names = [method.info.name for method in METHODS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=names, default=names, metavar="METHOD")
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--longer", type=int, default=1, help="factor of the plans' steps; give another --output [1]")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "analytic")
    parser.add_argument("--output", type=Path, default=ROOT / "eval" / "results" / "analytic.json")
    parser.add_argument("--table", action="store_true", help="print what is done, and train nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(read_rows(arguments.output)))
        return
    for seed in arguments.seeds:
        for world in arguments.worlds:
            for method in arguments.methods:
                if (method, world, seed) in {key(row) for row in read_rows(arguments.output)}:
                    continue
                row = row_of(method, WORLDS[world], seed, arguments.runs, arguments.longer)
                rows = sorted(
                    [*read_rows(arguments.output), row], key=lambda one: (names.index(key(one)[0]), *key(one)[1:])
                )
                with write_aside(arguments.output) as partial:
                    partial.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
                print(
                    method,
                    world,
                    seed,
                    row.get("reason") or f"{row['score']:.2f} {row['train_seconds']:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.disable(logging.INFO)
    main()
