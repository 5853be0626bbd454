"""Trains recipes at several seeds, scores every student under one protocol, and writes each row as it is done.

    python eval/leaderboard.py --recipes training/recipes/embedded/dmd2_1step.yaml --seeds 0 1 2

Resumable: rows that are in the output are skipped, interrupted runs go on from their last checkpoint. Everything after
`--` goes to `fastdiff distill`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def students(recipe: Any, folder: Path, stage: str | None = None) -> list[Path]:
    """The student's folder, or those of all stages up to `stage`; the last is scored, or all that share the prompts."""
    from fastdiff.recipes.stages import stage_folders

    owns = stage_folders(recipe) if recipe.stages else [folder]
    if stage is not None:
        names = [own.name.split("-", 2)[2] for own in owns] if recipe.stages else []
        if stage not in names:
            raise SystemExit(f"--stage {stage}: the recipe's stages are {', '.join(names) or 'none'}")
        owns = owns[: names.index(stage) + 1]
    return [own / "student" for own in owns]


def train(recipe: Path, seed: int, folder: Path, student: Path, extra: list[str]) -> list[str]:
    """Runs `fastdiff distill` in a process of its own, so that its peak memory is its own; returns the command."""
    command = [sys.executable, "-m", "fastdiff", "distill", "--config", str(recipe), "--seed", str(seed)]
    command += ["--output_dir", os.path.relpath(folder, ROOT), "--resume_from_checkpoint", "latest", *extra]
    if not (student / "fastdiff.json").is_file():
        subprocess.run(command, check=True, cwd=ROOT)
    return ["fastdiff", *command[3:]]


def commit() -> str:
    """The commit of the working tree, marked if it was changed."""
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip()


def finished(done: set, recipe: str, seed: int, steps: list[int] | None) -> bool:
    """Whether all wanted rows are there."""
    if steps is None:
        return any(key[:2] == (recipe, seed) for key in done)
    return done.issuperset((recipe, seed, count) for count in steps)


def main() -> None:
    from fastdiff.evaluation.baselines import SHIPPED
    from fastdiff.evaluation.leaderboard import markdown, read_entries, write_entries
    from fastdiff.recipes import resolve

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=Path, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--steps", type=int, nargs="+", help="sampling steps; those the student was trained for by default"
    )
    parser.add_argument(
        "--stage",
        help="of a recipe with stages, the one whose student is scored; give --steps too. The last by default",
    )
    parser.add_argument("--protocol", default="emoji-2k/tower-v1")
    parser.add_argument("--baselines", type=Path, default=SHIPPED)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "leaderboard")
    parser.add_argument("--output", type=Path, default=ROOT / "eval" / "leaderboard.json")
    arguments, extra = parser.parse_known_args()
    extra = [word for word in extra if word != "--"]
    for seed in arguments.seeds:
        for recipe in arguments.recipes:
            done = {entry.key for entry in read_entries(arguments.output)}
            if finished(done, recipe.stem, seed, arguments.steps):
                continue
            folder = arguments.runs / f"{recipe.stem}-{seed}"
            resolved = resolve({"output_dir": str(folder)}, recipe)
            folders = students(resolved, folder, arguments.stage)
            command = train(recipe, seed, folder, folders[-1], extra)  # all stages, the scored one among them
            table = "matched" if float(resolved.values.get("guidance_scale", 1.0)) == 1.0 else "guided"
            for entry in entries_of(folders, table, recipe, seed, command, arguments, done):
                # Read again: another process may have written rows meanwhile.
                write_entries(arguments.output, [*read_entries(arguments.output), entry])
    print(markdown(read_entries(arguments.output)))


def entries_of(folders: list[Path], table: str, recipe: Path, seed: int, command: list[str], arguments, done: set):
    """Scores the last of the students, or the mixture of those that share the prompts, at each step count.

    What it cost is the sum over all.
    """
    from fastdiff.evaluation import evaluate, open_protocol
    from fastdiff.evaluation.baselines import load_rows
    from fastdiff.evaluation.leaderboard import Entry, metrics_of, score_against
    from fastdiff.methods import method_named
    from fastdiff.recipes import Student
    from fastdiff.recipes.mixture import ROUTER_FILE, StudentMixture
    from fastdiff.recipes.student import call_settings

    student, benchmark = Student(folders[-1]), open_protocol(arguments.protocol)
    efforts = [Student(folder).record.effort for folder in folders]
    rows = load_rows(arguments.baselines, benchmark)
    teacher = next(row for row in rows if row.name == "teacher")
    routed = [folder for folder in folders if (folder / ROUTER_FILE).is_file()]
    mixture = StudentMixture(routed) if routed else None
    record = student.record
    route = mixture.pipelines if mixture else None
    info = method_named(record.method).info
    for steps in arguments.steps or [len(student.sampler)]:
        if (recipe.stem, seed, steps) in done:
            continue
        sampled = at_steps(student, steps)
        pipeline = mixture.pipeline(0) if mixture else sampled.pipeline(num_inference_steps=steps)
        call = call_settings(sampled.folder, steps)
        guidance = call.pop("guidance_scale")
        call.pop("num_inference_steps")
        row = evaluate(pipeline, benchmark, steps, guidance, name=recipe.stem, route=route, extra=call)
        score, baseline = score_against(row, rows, table)
        yield Entry(
            method=info.name,
            family=info.family,
            recipe=recipe.stem,
            teacher=f"{record.teacher['source']} {record.teacher['fingerprint']}",
            table=table,
            student_kind=record.kind,
            steps=steps,
            seed=seed,
            network_calls=row.network_calls,
            train_network_passes=sum(effort["network_passes"] for effort in efforts),
            train_seconds=sum(effort["seconds"] for effort in efforts),
            peak_memory_mib=max(effort["peak_memory_mib"] for effort in efforts),
            metrics=metrics_of(row),
            teacher_metrics=metrics_of(teacher),
            baseline_metrics=metrics_of(baseline) | {"name": baseline.name},
            score=score,
            protocol=row.protocol,
            command=" ".join(command),
            commit=commit(),
        )


def at_steps(student: Any, steps: int) -> Any:
    """The student, or another export of its run if its weights hold where each of its own steps ends."""
    from fastdiff.recipes import Student
    from fastdiff.recipes.reexport import export_checkpoint

    if not student.sampler.own_steps_only or steps == len(student.sampler):
        return student
    own = student.folder.with_name(f"student-{steps}-steps")
    if (own / "fastdiff.json").is_file():
        return Student(own)
    return export_checkpoint(student.folder.parent, own, num_inference_steps=steps)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
