"""Tests papers' claims on teachers in closed form, three seeds an arm, and writes docs/claims.md.

    python eval/claims.py                 # what is missing, then the page
    python eval/claims.py --claims js_covers --seeds 0

Figures are written to the output as they are done and skipped when they are there. What is claimed and how it is
tested: closed_forms/claims.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def figure_of(claim: Any, arm: Any, seed: int, runs: Path) -> dict[str, Any] | None:
    """The compared figure of one arm and what it stands on; None if a leaderboard's row is not there yet."""
    from closed_forms.claims import Counted, Scored

    if isinstance(arm, Counted):
        return counted(arm, seed)
    if isinstance(arm, Scored):
        return scored(arm, claim.figure, seed)
    if not claim.more_worlds:
        return trained(claim, arm, claim.world, seed, runs)
    by_world = {
        world.name: trained(claim, arm, world, seed, runs)["value"] for world in (claim.world, *claim.more_worlds)
    }
    return {"value": max(by_world.values()) - min(by_world.values()), "figures": by_world}


def trained(claim: Any, stages: Any, world: Any, seed: int, runs: Path) -> dict[str, Any]:
    """Trains one arm in one world; the compared figure, all figures of the student, and what it took."""
    from closed_forms.figures import figures
    from closed_forms.runs import run

    teacher, seen = world.build(), []
    watched = claim.figure in ("swing", "area")

    def watch(samples, labels) -> None:
        seen.append(figures(teacher, samples, labels)[world.headline])

    outcome = run(stages, world, seed, runs / f"{claim.name}-{seed}", runs / "starts", watch if watched else None)
    found = figures(teacher, outcome.samples, outcome.labels)
    if watched:
        found |= {"swing": swing(seen), "area": sum(seen) / len(seen)}
    return {
        "value": found[world.headline if claim.figure == "spread" else claim.figure],
        "figures": found,
        "steps": outcome.steps,
        "network_calls": outcome.calls,
        "train_network_passes": outcome.network_passes,
        "train_seconds": round(outcome.seconds, 2),
    }


def counted(arm: Any, seed: int) -> dict[str, Any]:
    """An arm that `modes_picture.py` has trained."""
    rows = json.loads((ROOT / "eval" / "results" / "f_distill_modes.json").read_text(encoding="utf-8"))
    wanted = {"divergence": arm.divergence, "last_index": arm.last, "seed": seed}
    (found,) = (row for row in rows if row.items() >= wanted.items())
    return {"value": len(found["shares"]) - found["modes_kept"], "figures": found}


def scored(arm: Any, figure: str, seed: int) -> dict[str, Any] | None:
    """An arm that `leaderboard.py` has trained."""
    rows = json.loads((ROOT / "eval" / "leaderboard.json").read_text(encoding="utf-8"))
    for row in rows:
        if (row["recipe"], row["seed"]) == (arm.recipe, seed):
            return {"value": row["metrics"][figure], "figures": row["metrics"], "steps": row["steps"]}
    return None


def swing(values: list[float]) -> float:
    """Mean change between neighbours in the second half."""
    late = values[len(values) // 2 :]
    return sum(abs(b - a) for a, b in itertools.pairwise(late)) / (len(late) - 1)


def verdict(claim: Any, entry: dict[str, Any]) -> str:
    """Held if the first arm is the best at every seed, did not hold if another beats it at every seed, else not shown."""
    first, *others = (entry["arms"].get(arm, {}) for arm in claim.arms)
    seeds = set(first).intersection(*others)
    if len(seeds) < 3:
        return "not finished"
    pairs = [
        ((1 + claim.margin) * min(other[seed]["value"] for other in others), first[seed]["value"]) for seed in seeds
    ]
    if all(own < best for best, own in pairs):
        return "held"
    return "did not hold" if all(own > best for best, own in pairs) else "not shown"


def page(entries: dict[str, Any]) -> str:
    """docs/claims.md."""
    from closed_forms.claims import CLAIMS

    lines = [
        "# Claims of papers, tested",
        "",
        "Made by `python eval/claims.py`; do not edit. Each row is one prediction about two ways to train, tested in closed",
        "form where it shows at least cost (two rings of twelve narrow modes in the plane; others where said), full",
        "students, three seeds. *Held*: the first arm is the better one at every seed; *did not hold*: the worse at",
        "every seed; *not shown*: neither. These are short runs of small networks: they test a direction, not a paper. Figures,",
        "less is better: distance is sliced Wasserstein, shares the total variation of modes' shares, swing the mean change",
        "of the distance between previews late in a run, area its mean over a run, spread its range over teachers, FD that",
        "of the leaderboard. All numbers: `eval/results/claims.json`.",
        "",
        "![modes kept by f-distill's divergences](images/modes.png)",
        "",
        "| paper | claim | figure | arms: mean (seeds 0, 1, 2) | outcome |",
        "|---|---|---|---|---|",
    ]
    names = {
        "sliced_wasserstein": "distance",
        "total_variation": "shares",
        "modes_lost": "modes lost",
        "fid": "FD (embedded)",
    }
    for claim in CLAIMS:
        entry = entries.get(claim.name, {"arms": {}})
        arms = "<br>".join(_arm_text(arm, entry["arms"].get(arm, {})) for arm in claim.arms)
        where = "" if claim.world.name == "mixture" else f" ({claim.world.name})"
        text = claim.text + (f". {claim.limits[0].upper()}{claim.limits[1:]}" if claim.limits else "")
        figure = names.get(claim.figure, claim.figure) + where
        link = f"[{claim.arxiv}](https://arxiv.org/abs/{claim.arxiv})"
        lines.append(f"| {link} | {text} | {figure} | {arms} | {verdict(claim, entry)} |")
    return "\n".join(lines) + "\n"


def _arm_text(arm: str, by_seed: dict[str, Any]) -> str:
    values = [by_seed[seed]["value"] for seed in sorted(by_seed)]
    if not values:
        return f"{arm}: no run yet"
    mean = sum(values) / len(values)
    return f"{arm}: {mean:.3f} ({', '.join(f'{value:.3f}' for value in values)})"


def read(path: Path) -> dict[str, Any]:
    """What is done, by claim, arm and seed."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write(path: Path, text: str) -> None:
    from fastdiff.data.files import write_aside

    with write_aside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def main() -> None:
    from closed_forms.claims import CLAIMS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--claims", nargs="*", default=[claim.name for claim in CLAIMS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "analytic")
    parser.add_argument("--output", type=Path, default=ROOT / "eval" / "results" / "claims.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "claims.md")
    arguments = parser.parse_args()
    for claim in CLAIMS:
        for seed in arguments.seeds if claim.name in arguments.claims else ():
            for arm, stages in claim.arms.items():
                entries = read(arguments.output)
                entry = entries.setdefault(claim.name, {"text": claim.text, "figure": claim.figure, "arms": {}})
                done = entry["arms"].setdefault(arm, {})
                if str(seed) in done:
                    continue
                if (found := figure_of(claim, stages, seed, arguments.runs)) is None:
                    continue
                done[str(seed)] = found
                write(arguments.output, json.dumps(entries, indent=1) + "\n")
                print(claim.name, arm, seed, f"{done[str(seed)]['value']:.3f}", flush=True)
    entries = read(arguments.output)
    for claim in CLAIMS:
        if claim.name in entries:
            entries[claim.name]["outcome"] = verdict(claim, entries[claim.name])
    write(arguments.output, json.dumps(entries, indent=1) + "\n")
    write(arguments.page, page(entries))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.disable(logging.INFO)
    main()
