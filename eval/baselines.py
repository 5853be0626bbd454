"""Makes the shipped rows again: the floor, the teacher and the best undistilled samplings.

python eval/baselines.py --teacher src/fastdiff/assets/teacher
python eval/baselines.py --teacher embedded-flow --no-guided --output eval/results/embedded_flow_baselines.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from fastdiff.diffusion.schedules import is_flow
from fastdiff.evaluation import floor_row, format_table, open_protocol
from fastdiff.evaluation.baselines import (
    FLOW_SPACE,
    SHIPPED,
    Sampling,
    baseline_rows,
    candidates,
    save_rows,
    score_sampling,
    search,
)
from fastdiff.evaluation.protocol import EMOJI, EMOJI_VALIDATION
from fastdiff.models.teacher import Teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="a pipeline folder, or the name of a shipped teacher")
    parser.add_argument("--calls", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument(
        "--guided", action=argparse.BooleanOptionalAction, default=True, help="also with guidance (slow)"
    )
    parser.add_argument("--count", type=int, default=300, help="validation prompts for the first ranking")
    parser.add_argument("--output", type=Path, default=SHIPPED)
    parser.add_argument("--threads", type=int, default=1)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    pipeline = Teacher.from_pretrained(flags.teacher).pipeline
    command = " ".join(["python", "eval/baselines.py", *sys.argv[1:]])
    test, validation = open_protocol(EMOJI), open_protocol(EMOJI_VALIDATION)
    solver = FLOW_SPACE["solver"] if is_flow(pipeline.scheduler.config) else "DDIM"
    rows, record = [floor_row(test), score_sampling(pipeline, test, Sampling(solver, 50), "teacher")], []

    if flags.guided:
        rows, record = guided_teacher(pipeline, test, validation, solver, flags.count, rows)
    save_rows(flags.output, rows, command, tried=record)
    for calls in flags.calls:
        found, lines = baseline_rows(pipeline, test, validation, calls, flags.guided, count=flags.count)
        rows, record = rows + found, record + lines
        save_rows(flags.output, rows, command, tried=record)  # after each: a search of hours may be interrupted
    print(format_table(rows))


def guided_teacher(pipeline, test, validation, solver, count, rows):
    """The teacher at its best guidance, with as many calls as its unguided row: the rows with it, and the search."""
    guided = candidates(50, guidance=(1.5, 2.0, 3.0), starts=(999,), solver=solver)
    chosen, tried = search(
        pipeline, validation, guided, validation.reference, count=count, finalists=1, solvers=(solver,)
    )
    row = score_sampling(pipeline, test, chosen, "teacher-guided")
    return [*rows, row], [{"row": "teacher-guided", **line} for line in tried]


if __name__ == "__main__":
    main()
