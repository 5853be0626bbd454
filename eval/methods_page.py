"""Writes docs/methods.md: every method with its paper, needs and recipes, and the leaderboard.

python eval/methods_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

from analytic import read_rows, table

from fastdiff.data.files import write_aside
from fastdiff.evaluation.leaderboard import Entry, markdown, read_entries
from fastdiff.recipes.declared import declared_methods
from fastdiff.recipes.recipe import read_yaml

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "methods.md"
STEPS, BEST = (1, 2, 4, 8), 5
HEAD = """# Methods

Made by `python eval/methods_page.py`; do not edit. `fastdiff distill --method NAME --help` explains every option, and
the equation stands in the docstring of `src/fastdiff/methods/`. "needs" is what the data must hold with the default settings; "LoRA"
and "full" are the kinds of student. `ladd`, `rcm` and the methods of the distribution-matching and Fisher families
but `score_matching` also make several students that share the prompts (`students`). `score_matching`, the
methods on pairs and all of these but `disback` and `phased_dmd` make smaller ones (`student_width` and the like). "embedded
teacher" is the best of the scores below, as a mean over seeds.
"""
START = """
## Where to begin

The best on the embedded teacher at each number of steps, by Frechet distance (the teacher's at 50 steps is 16.2), means
over seeds, beside undistilled sampling of as many network calls. "guided" students were trained with w > 1, the others
at w = 1. It is a small teacher of 32 px: take the order as a start, not as a verdict. What fits in your
memory `fastdiff plan RECIPE --memory 24GB --cached` says: one frozen base with adapters (LoRA students and fake scores)
is the least, every network trained in full takes 16 bytes a weight more (41 GB for SDXL). Fewest demands: prompts alone
for `dmd2`, images with captions for `tscd` and `tcd`, pairs made by `fastdiff pairs` for `dmd` and the rectified flows.

"""
BOARD = """
## Scores on the embedded teacher

Protocol `emoji-2k/tower-v1` (see [eval/README.md](../eval/README.md)). matched: w = 1 for student and undistilled
sampling; guided: each at the w that suits it. score: excess Frechet distance over the floor as
a share of that of the best undistilled sampling with at most as many network calls; 95 % intervals over seeds; training
passes count forward 1, backward 1 (2 with weight gradients), recomputation 1. Made by `eval/leaderboard.py`; the
`command` of a row in `eval/leaderboard.json` has what was given on top of the recipe, which is `--mixed_precision bf16`
for most.

"""


TUNING = """
How recipes were found: settings were tried on the validation prompts (`emoji-2k-validation/tower-v1`) with seed 0, up to
about six runs of 800 steps x 32 samples a recipe, starting from those of `dmd2_1step` (distribution matching and Fisher) or `lcm_lora`
(trajectories), which took more themselves; what was tried is learning rate, start time, time range, loss and the weights of added terms. Test prompts
were then scored once a student. Recipes marked so below were scored twice: a first version went wrong, and its reason
was found on validation prompts.
"""
REASONS = """
### What stands behind single rows

Figures are measured. Where a cause is given without a run that shows it, it is how logs and losses were read.

"""
CLOSED_FORMS = """
## Closed forms

Every method on three laws that are known exactly: a Gaussian, twelve narrow modes on two rings, and 375 modes made of
latents of 512 numbers. The figure is the excess over exact draws as a share of that of the best undistilled sampling with as many
network calls: 0 is exact, 1 is no better than not distilling. Made by `eval/analytic.py`. Runs are short, on the 375 modes 80
updates of 128 samples for scores and 120 for trajectories, times what a plan gives, and the figure there is the shares
of modes alone: many are no better than the exact teacher's own few steps, which a student of several steps is compared
with. Longer runs were not tried (`--longer` makes them).

"""
COSTS = """
## Cost of a step

Peak resident memory of a step above that after imports, and its time beside that of its network passes made bare, by
what is trained: SD-shaped UNet of about 50 M weights, latents of 16 x 16 (128 px), float32, one core, batch 2
(`apex`: 4). Medians of three steps, beside other work on the machine: the ratio is of one run, the seconds are not to be
compared between rows. Made by `fastdiff bench methods --resolution 128 --pairs 3`.

| method | student | critics | peak MiB | step s | bare s | ratio |
| --- | --- | --- | --- | --- | --- | --- |
"""
PICTURES = """
## Pictures

![the same prompts and noise through the teacher and every student](images/methods.png)

Students of seed 0, by `python eval/methods_grid.py runs/leaderboard`. By eye: students of trajectories that sample without
noise keep the teacher's picture of each noise, with stronger contrast; at one step `scm`, `tcm`, `meanflow`, `apex` and
`progressive` are splotched, `kd`, `slimflow` and InstaFlow less. Those that renoise between steps (`lcm`, `scott`, `rcm`) and
the matchers of distributions draw other pictures, these with cleaner outlines.
"""


def recipes_by_method() -> dict[str, list[Path]]:
    """Recipe files by the method that they, or their stages, name."""
    found: dict[str, list[Path]] = {}
    for path in sorted((ROOT / "training" / "recipes").glob("*/*.yaml")):
        written = read_yaml(path)
        stages = [stage.get("method") for stage in written.get("stages", ())]
        for name in sorted({name for name in (written.get("method"), *stages) if name}):
            found.setdefault(name, []).append(path)
    return found


def page() -> str:
    """The whole page as text."""
    recipes, families = recipes_by_method(), {}
    board = read_entries(ROOT / "eval" / "leaderboard.json")
    for method in declared_methods():
        families.setdefault(method.info["family"], []).append(method.info)
    text = [HEAD, *([START + _start(board)] if board else [])]
    for family, methods in families.items():
        text.append(f"\n## {family[0].upper()}{family[1:]}\n")
        text.append("| method | paper | needs | student | steps | recipes | embedded teacher |\n|" + " --- |" * 7)
        text += [_line(info, recipes.get(info["name"], []), board) for info in methods]
    closed = read_rows(ROOT / "eval" / "results" / "analytic.json")
    text += [BOARD + markdown(board), TUNING, REASONS + _reasons()] if board else []
    text += [PICTURES] if (PAGE.parent / "images" / "methods.png").is_file() else []
    text += [CLOSED_FORMS + table(closed)] if closed else []
    costs = ROOT / "eval" / "bench" / "methods.json"
    text += [COSTS + _costs(json.loads(costs.read_text("utf-8")))] if costs.is_file() else []
    return "\n".join(text) + "\n"


def _costs(rows: dict[str, dict]) -> str:
    return "\n".join(
        f"| `{row['method']}` | {row['student']} | {row['fake_score'] or ''} | {row['peak'] / 2**20:.0f} "
        f"| {row['step_seconds']:.2f} | {row['bare_seconds']:.2f} | {row['ratio']:.2f} |"
        for row in rows.values()
    )


def _line(info: dict, recipes: list[Path], board: list[Entry]) -> str:
    kinds = ", ".join("LoRA" if kind == "lora" else kind for kind in info["student_kinds"])
    links = ", ".join(f"[{path.parent.name}/{path.stem}](../{path.relative_to(ROOT).as_posix()})" for path in recipes)
    paper = f"[{info['paper']}](https://arxiv.org/abs/{info['arxiv']})"
    cells = [f"`{info['name']}`", paper, info["needs"], kinds, info["steps"], links]
    cells.append(_best([entry for entry in board if entry.method == info["name"]]))
    return "| " + " | ".join(cells) + " |"


def _start(board: list[Entry]) -> str:
    """The best recipes at each number of steps, of every kind of data."""
    needs = {method.info["name"]: method.info["needs"] for method in declared_methods()}
    rows = json.loads((ROOT / "eval" / "results" / "embedded_baselines.json").read_text("utf-8"))["rows"]
    undistilled = {row["name"]: row["fid"] for row in rows}
    lines = ["| steps | undistilled, w = 1 / guided | best students |\n| --- | --- | --- |"]
    for steps in STEPS:
        groups = [found for found in _groups(board) if found[0].steps == steps]
        groups.sort(key=lambda found: fmean(entry.metrics["fid"] for entry in found))
        students = [
            f"`{found[0].recipe}` {_words(found)} ({found[0].student_kind.replace('lora', 'LoRA')}, {needs[found[0].method]})"
            for found in groups[:BEST]
        ]
        beside = [f"{undistilled[f'undistilled-{steps}{kind}']:.1f}" for kind in ("-matched", "")]
        lines.append(f"| {steps} | {' / '.join(beside)} | {', '.join(students)} |")
    return "\n".join(lines) + "\n"


def _groups(entries: list[Entry]) -> list[list[Entry]]:
    """Entries by recipe and number of steps, the seeds together."""
    by_steps: dict[tuple[str, int], list[Entry]] = {}
    for entry in entries:
        by_steps.setdefault((entry.recipe, entry.steps), []).append(entry)
    return list(by_steps.values())


def _words(found: list[Entry]) -> str:
    seeds = "" if len(found) > 1 else ", one seed"
    return f"{fmean(entry.metrics['fid'] for entry in found):.1f}{seeds}{', guided' if found[0].table == 'guided' else ''}"


def _best(entries: list[Entry]) -> str:
    """The lowest Frechet distance to real pictures, as a mean over seeds, the steps it took and the recipe."""
    if not entries:
        return "not scored"
    found = min(_groups(entries), key=lambda found: fmean(entry.metrics["fid"] for entry in found))
    steps, recipe = found[0].steps, found[0].recipe
    return f"{steps} step{'s' if steps > 1 else ''}: FD {_words(found)} (`{recipe}`)"


def _reasons() -> str:
    """What is known of rows that are below par or need a word, by recipe."""
    written = read_yaml(ROOT / "eval" / "results" / "reasons.yaml")
    lines = [f"- `{'`, `'.join(names.split(', '))}`: {' '.join(text.split())}" for names, text in written.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    with write_aside(PAGE) as aside:
        aside.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
