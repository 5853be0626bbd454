"""What a low-rank critic costs in quality and saves in memory: DMD2 with critics of rank 16, 64, 256, and full.

    python eval/critic_ranks.py --teacher embedded --seeds 0
    python eval/critic_ranks.py --teacher kernel --seeds 0 1 2

Resumable: rows that are in the output are skipped. On the kernel teacher the frozen base is a network fitted to the
closed form, since a closed form takes no adapters; the figure is the total variation of one-step mode shares to the
exact law's. Everything after `--` goes to `fastdiff distill`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "training/recipes/embedded/dmd2_1step.yaml"
CRITICS: dict[str, dict[str, Any]] = {"full": {"fake_score": "full"}} | {
    f"rank {rank}": {"fake_score": "lora", "fake_score_lora_rank": rank} for rank in (16, 64, 256)
}
LORA_RATE = 1e-3
"""Adapters start from zero and take a higher rate than weights (3e-4 in both setups)."""
KERNEL_LINEARS = ("modulation", "enter", "leave")


def embedded(critic: str, seed: int, runs: Path, extra: list[str]) -> dict[str, Any]:
    """Trains in a process of its own, so that the peak memory is its own, and scores on the test prompts."""
    from fastdiff.evaluation import evaluate, open_protocol
    from fastdiff.recipes import Student

    folder = runs / f"{critic.replace(' ', '-')}-{seed}"
    if not (folder / "student" / "fastdiff.json").is_file():
        flags = [word for key, value in CRITICS[critic].items() for word in (f"--{key}", str(value))]
        if critic != "full":
            flags += ["--fake_score_learning_rate", str(LORA_RATE)]
        command = [sys.executable, "-m", "fastdiff", "distill", "--config", str(RECIPE), "--seed", str(seed)]
        subprocess.run([*command, "--output_dir", str(folder), *flags, *extra], check=True, cwd=ROOT)
    student = Student(folder / "student")
    row = evaluate(student.pipeline(), open_protocol("emoji-2k/tower-v1"), len(student.sampler), 1.0, name=critic)
    effort = {name: student.record.effort[name] for name in ("seconds", "peak_memory_mib")}
    return effort | {name: getattr(row, name) for name in ("fid", "retrieval", "diversity", "recall", "sharpness")}


def kernel(critic: str, seed: int, runs: Path, _extra: list[str]) -> dict[str, Any]:
    """DMD2 as in `examples/kernel_teacher.py`, from a fitted network."""
    import torch

    sys.path.insert(0, str(ROOT / "examples"))
    from kernel_teacher import PLANS, ExactDraws, distance, method_of, variation

    from fastdiff.diffusion.randomness import Randomness
    from fastdiff.engine import Settings, Trainer
    from fastdiff.engine.previews import sample_role
    from fastdiff.models.analytic import AnalyticTeacher, pretrain

    class Fitted(AnalyticTeacher):
        """Its network is a fitted one, which takes adapters as a diffusers network does."""

        adaptable = True

    teacher = Fitted.kernel()
    pretrain(teacher.start, teacher, 1500, seed=seed)
    teacher.network = copy.deepcopy(teacher.start).requires_grad_(False).eval()
    plan, method = PLANS["dmd2"], method_of("dmd2")
    if critic != "full":
        method = type(method)(dataclasses.replace(method.config, fake_score_learning_rate=LORA_RATE))
    settings = Settings(
        output_dir=str(runs / f"kernel-{critic.replace(' ', '-')}-{seed}"),
        max_train_steps=plan.steps,
        train_batch_size=plan.batch_size,
        learning_rate=plan.learning_rate,
        lr_scheduler="cosine",
        adam_beta1=plan.adam_beta1,
        adam_weight_decay=0.0,
        student="full",
        ema_decay=plan.ema_decay,
        lora_target_modules=KERNEL_LINEARS,
        checkpointing_steps=10_000,
        validation_steps=10_000,
        report_to="none",
        seed=seed,
        **CRITICS[critic],
    )
    trainer = Trainer(method, teacher, ExactDraws(teacher), settings)
    captions = [caption for caption in teacher.captions for _ in range(2000)]
    cond = teacher.encode(captions, 0)
    labels = cond.tensors["labels"]
    trainer.train()
    with trainer.student.evaluated(), torch.no_grad():
        samples = sample_role(trainer, cond, trainer.method.sampler())
    random = Randomness(2, 0, torch.arange(len(captions)))
    exact = teacher.sample(random.normal("z", teacher.shape), random.uniform("mode"), labels)
    return {
        "seconds": round(trainer.seconds),
        "mode_total_variation": variation(teacher, samples, labels),
        "exact_draws": variation(teacher, exact, labels),
        "distance_to_mode": distance(teacher, samples),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", choices=("embedded", "kernel"), required=True)
    parser.add_argument("--critics", nargs="+", choices=tuple(CRITICS), default=list(CRITICS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "critics")
    parser.add_argument("--output", type=Path, default=ROOT / "eval" / "results" / "critic_ranks.json")
    arguments, extra = parser.parse_known_args()
    extra = [word for word in extra if word != "--"]
    measured = {"embedded": embedded, "kernel": kernel}[arguments.teacher]
    for seed in arguments.seeds:
        for critic in arguments.critics:
            rows = json.loads(arguments.output.read_text("utf-8")) if arguments.output.is_file() else []
            key = {"teacher": arguments.teacher, "critic": critic, "seed": seed}
            if any(key.items() <= row.items() for row in rows):
                continue
            row = key | measured(critic, seed, arguments.runs, extra)
            print(json.dumps(row), flush=True)
            arguments.output.write_text(json.dumps([*rows, row], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
