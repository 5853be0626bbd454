"""The main job on the embedded teacher: distil it into a one-step student, score it, write a report.

    python examples/demo.py --output_dir runs/demo

Training runs as `accelerate launch` would on two processes where there are two cores. The rows of the teacher and of
the undistilled baselines come from results that ship with the repository (`eval/README.md` says how to make them
again); the student's row is measured here and now.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "training" / "recipes" / "embedded" / "dmd2_1step.yaml"
BASELINES = ROOT / "eval" / "results" / "embedded_baselines.json"
PROTOCOL = "emoji-2k/tower-v1"
SHOWN = (
    "red apple",
    "a flower",
    "dog face, noto style",
    "red heart",
    "an animal",
    "house",
    "flag of japan",
    "a fruit",
)


def train(output_dir: Path, extra: list[str]) -> None:
    """Runs the training script on as many processes as there are cores, at most two."""
    processes = min(2, os.cpu_count() or 1)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else []
    command += [str(ROOT / "training" / "train_dmd2.py"), "--config", str(RECIPE), "--output_dir", str(output_dir)]
    subprocess.run([*command, *extra], check=True, env=os.environ | {"ACCELERATE_USE_CPU": "true"})


def score(output_dir: Path) -> None:
    """Measures the student under the protocol and writes the report beside it."""
    from fastdiff.evaluation import evaluate, format_table, grid_images, open_protocol, write_report
    from fastdiff.evaluation.baselines import Sampling, load_rows, with_sampling
    from fastdiff.models.teacher import Teacher
    from fastdiff.recipes import Student

    benchmark = open_protocol(PROTOCOL)
    rows = load_rows(BASELINES, benchmark)
    student, teacher = Student(output_dir / "student"), Teacher.from_pretrained("embedded").pipeline
    best = min((row for row in rows if row.name.startswith("undistilled-1")), key=lambda row: row.fid)
    undistilled = with_sampling(teacher, Sampling(**best.settings["sampling"]))
    if student.record.effort["steps"]:
        rows.append(evaluate(student.pipeline(), benchmark, len(student.sampler), name="student"))
    else:  # without training it is the teacher, which knows nothing of the student's start time: sampled at its best
        rows.append(evaluate(undistilled, benchmark, best.steps, best.guidance_scale, name="student"))
    grids = [
        ("teacher, 50 steps", grid_images(teacher, SHOWN, 50, 1.0)),
        ("undistilled, 1 step", grid_images(undistilled, SHOWN, best.steps, best.guidance_scale)),
        ("student, 1 step", grid_images(student.pipeline(), SHOWN, 1)),
    ]
    page = write_report(output_dir / "report", rows, grids, {"recipe": str(RECIPE.relative_to(ROOT))}, SHOWN)
    print(format_table(rows))
    print(f"report: {page}\npictures: {page.parent / 'grid.png'}\nstudent: {student.folder}")


def main() -> None:
    """Parses the one argument of its own; everything else goes to the training script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="run folder, replaced if it exists")
    arguments, extra = parser.parse_known_args()
    shutil.rmtree(arguments.output_dir, ignore_errors=True)
    train(arguments.output_dir, extra)
    score(arguments.output_dir)


if __name__ == "__main__":
    main()
