"""Counts the modes that students keep, on a teacher whose modes are known.

    python examples/kernel_teacher.py --method dmd2
    python examples/kernel_teacher.py --method lcm

The teacher is exact: a kernel density over a few hundred real latents, by caption group. A small network is fitted to
it, distilled through the same engine as any other teacher, and sampled in one step; each sample is assigned to its
nearest mode. Printed is the total variation between the modes' shares and their true weights (0 is perfect, 1 is
disjoint), for exact draws, for one undistilled step from each start time, and for the student; and how far samples are
from their modes, since shares say nothing of sharpness.

What was found here (eval/README.md, eval/results/kernel_modes.json): DMD2 moves mass between modes by scores at high
noise, where modes overlap. With the paper's range, from t = 20 up, it keeps the modes but not their shares.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.data import PromptData
from fastdiff.diffusion.randomness import Randomness
from fastdiff.engine import Settings, Trainer
from fastdiff.engine.previews import sample_role
from fastdiff.methods import DMD2, LCM, DMD2Config, LCMConfig, Method
from fastdiff.models.analytic import AnalyticTeacher, pretrain
from fastdiff.models.sampler import SamplerSpec

STARTS = (999, 899, 749, 599, 449, 299)


@dataclass(frozen=True)
class Plan:
    """How long and how fast a method trains here."""

    steps: int
    batch_size: int
    learning_rate: float
    adam_beta1: float
    ema_decay: float


PLANS = {"dmd2": Plan(400, 256, 1e-4, 0.0, 0.98), "lcm": Plan(5000, 64, 5e-4, 0.0, 0.99)}


class ExactDraws(PromptData):
    """Captions with exact latents of the teacher, for methods that need data."""

    def __init__(self, teacher: AnalyticTeacher, count: int = 8192) -> None:
        captions = list(teacher.captions)
        super().__init__([captions[index % len(captions)] for index in range(count)])
        random = Randomness(1, 0, torch.arange(count))
        labels = teacher.encode(self.prompts, 0).tensors["labels"]
        self.latents = teacher.sample(random.normal("z", teacher.shape), random.uniform("mode"), labels)

    def __getitem__(self, index):
        item = index if isinstance(index, int) else index.item
        return super().__getitem__(index) | {"latents": self.latents[item]}


def method_of(name: str) -> Method:
    """DMD2 in one step from t = 749, by scores from 700 up; LCM on a grid of 50, run in one step."""
    if name == "lcm":
        return LCM(LCMConfig(guidance_scale=1.0, num_inference_steps=1))
    return DMD2(
        DMD2Config(
            guidance_scale=1.0,
            timesteps=(749,),
            min_timestep=700,
            student_update_every=5,
            fake_score_learning_rate=3e-4,
        )
    )


def variation(teacher: AnalyticTeacher, samples: Tensor, labels: Tensor) -> float:
    """Total variation of mode shares to the known weights."""
    return float(teacher.law.mode_total_variation(samples, labels))


def distance(teacher: AnalyticTeacher, samples: Tensor) -> float:
    """Mean distance of a sample to its nearest mode's centre."""
    law = teacher.law
    return float((samples - law.modes(samples)[law.nearest_mode(samples)]).flatten(1).norm(dim=1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("dmd2", "lcm"), default="dmd2")
    parser.add_argument("--steps", type=int, help="of distillation; the plan's if not given")
    parser.add_argument("--pretrain_steps", type=int, default=1500)
    parser.add_argument("--samples", type=int, default=2000, help="a caption group")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/kernel"))
    arguments = parser.parse_args()

    teacher = AnalyticTeacher.kernel()
    plan = PLANS[arguments.method]
    error = pretrain(teacher.start, teacher, arguments.pretrain_steps, seed=arguments.seed)
    settings = Settings(
        output_dir=str(arguments.output_dir / f"{arguments.method}-{arguments.seed}"),
        max_train_steps=arguments.steps or plan.steps,
        train_batch_size=plan.batch_size,
        learning_rate=plan.learning_rate,
        lr_scheduler="cosine",
        adam_beta1=plan.adam_beta1,
        adam_weight_decay=0.0,
        student="full",
        fake_score="full",
        ema_decay=plan.ema_decay,
        checkpointing_steps=10_000,
        validation_steps=10_000,
        report_to="none",
        seed=arguments.seed,
    )
    trainer = Trainer(method_of(arguments.method), teacher, ExactDraws(teacher), settings)
    captions = [caption for caption in teacher.captions for _ in range(arguments.samples)]
    cond = teacher.encode(captions, 0)
    labels = cond.tensors["labels"]
    random = Randomness(2, 0, torch.arange(len(captions)))
    exact = teacher.sample(random.normal("z", teacher.shape), random.uniform("mode"), labels)
    undistilled = {
        start: variation(teacher, sample_role(trainer, cond, SamplerSpec("lcm", (start,)), "teacher"), labels)
        for start in STARTS
    }
    trainer.train()
    with trainer.student.evaluated():
        student = sample_role(trainer, cond, trainer.method.sampler())
    result = {
        "method": arguments.method,
        "seed": arguments.seed,
        "steps": settings.max_train_steps,
        "seconds": round(trainer.seconds),
        "pretrain_error": error,
        "exact_draws": variation(teacher, exact, labels),
        "undistilled_one_step": undistilled,
        "student_one_step": variation(teacher, student, labels),
        "student_coverage": float(teacher.law.mode_coverage(student, labels)),
        "distance_to_mode": {"exact_draws": distance(teacher, exact), "student": distance(teacher, student)},
    }
    print(json.dumps(result, indent=1))
    (trainer.folder / "modes.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
