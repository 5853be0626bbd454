"""Draws docs/images/methods.png: the same prompts and noise through the teacher, no training, and every student.

    python eval/methods_grid.py runs/leaderboard

Takes the students of seed 0 that `eval/leaderboard.py` left in its runs folder, each at its own number of steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor

from fastdiff.evaluation.grid import draw_grid, grid_images, save_picture
from fastdiff.models.teacher import Teacher
from fastdiff.recipes import Student
from fastdiff.recipes.mixture import ROUTER_FILE, StudentMixture

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = (
    "red apple",
    "dog face",
    "a heart",
    "a flower",
    "a smiling face",
    "a fruit",
    "an animal",
    "a building",
    "a country flag",
    "a clock",
    "a person at work",
    "a fist or thumb",
)
SIZE = {"height": 32, "width": 32}


def teacher_rows(prompts: list[str]) -> list[tuple[str, Tensor]]:
    """The teacher at 50 steps, and what its own solver makes of 1, 2 and 4."""
    pipeline = Teacher.from_pretrained("embedded").pipeline
    names = {50: "teacher, 50 steps", 4: "undistilled, 4 steps", 2: "undistilled, 2 steps", 1: "undistilled, 1 step"}
    return [(name, grid_images(pipeline, prompts, steps, 1.0, extra=SIZE)) for steps, name in names.items()]


def last_student(run: Path) -> Path | None:
    """The student of a run, of its last stage where it has stages; None if it is not finished."""
    folder = _stages(run)[-1] / "student"
    return folder if (folder / "fastdiff.json").is_file() else None


def _stages(run: Path) -> list[Path]:
    return sorted(run.glob("stage-*"), key=lambda stage: int(stage.name.split("-")[1])) or [run]


def student_row(run: Path, prompts: list[str]) -> tuple[str, Tensor]:
    """One student at its own steps."""
    student = Student(last_student(run))
    steps = len(student.sampler)
    routed = [stage / "student" for stage in _stages(run) if (stage / "student" / ROUTER_FILE).is_file()]
    route = StudentMixture(routed).pipelines if routed else None
    scale = student.sampler.guidance_scale
    images = grid_images(student.pipeline(), prompts, steps, scale, extra=SIZE, route=route)
    recipe = run.name.rsplit("-", 1)[0]
    return f"{recipe}, {steps} step{'s' if steps > 1 else ''}", images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "methods.png")
    arguments = parser.parse_args()
    prompts = list(PROMPTS)
    runs = sorted(run for run in arguments.runs.glob("*-0") if last_student(run))
    rows = teacher_rows(prompts) + [student_row(run, prompts) for run in runs]
    print(save_picture(draw_grid(rows, prompts, cell=64), arguments.output))


if __name__ == "__main__":
    main()
