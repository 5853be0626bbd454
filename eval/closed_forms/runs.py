"""Trains one plan in one world and judges the student."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from closed_forms.figures import labels_of
from closed_forms.plans import Stage
from closed_forms.worlds import World, draws, started
from fastdiff.engine import Settings, Trainer
from fastdiff.engine.batches import chosen_data
from fastdiff.engine.previews import sample_role
from fastdiff.methods import method_named
from fastdiff.models.analytic import AnalyticTeacher
from fastdiff.recipes.starting import start_from

FIXED = {
    "student": "full",
    "fake_score": "full",
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 10,
    "adam_weight_decay": 0.0,
    "checkpointing_steps": 100_000,
    "validation_steps": 100_000,
    "log_every": 100,
    "report_to": "none",
}


@dataclass(frozen=True)
class Outcome:
    """Samples of a student `(B, C, H, W)` with their labels, and what it took."""

    samples: Tensor
    labels: Tensor
    calls: int
    steps: int
    seconds: float
    network_passes: int


Watch = Callable[[Tensor, Tensor], None]


def run(
    stages: Sequence[Stage], world: World, seed: int, folder: Path, starts: Path, watch: Watch | None = None
) -> Outcome:
    """Each stage goes on from the one before, in `folder/0`, `folder/1` ..., which are removed at the end.

    Students of one run that serve different captions are no stages: each starts afresh and gives its own samples.
    `watch` is called with samples and their labels every `validation_steps` of each stage.
    """
    teacher = started(world, starts)
    labels, trainers = labels_of(world, teacher), []
    for number, stage in enumerate(stages):
        goes_on = number and "student_number" not in stage.config
        trainer = _trainer(stage, teacher, world, seed, folder / str(number))
        if watch is not None:
            trainer.on_preview = lambda one, _label: watch(_sampled(one, teacher, labels), labels)
        start_from(trainer, str(folder / str(number - 1)) if goes_on else None)
        if (outcome := trainer.train()) != "done":
            raise SystemExit(f"stopped by {outcome}")
        trainers.append(trainer)
    shutil.rmtree(folder)
    routed = "student_number" in stages[-1].config
    samples = _routed(trainers, teacher, labels) if routed else _sampled(trainers[-1], teacher, labels)
    effort = [trainer.effort() for trainer in trainers]
    return Outcome(
        samples=samples,
        labels=labels,
        calls=len(trainers[-1].method.sampler()),
        steps=sum(int(one["steps"]) for one in effort),
        seconds=sum(one["seconds"] for one in effort),
        network_passes=sum(int(one["network_passes"]) for one in effort),
    )


def _trainer(stage: Stage, teacher: AnalyticTeacher, world: World, seed: int, folder: Path) -> Trainer:
    cls = method_named(stage.method)
    method = cls(cls.Config(**stage.config))
    settings = Settings(**FIXED | stage.settings, seed=seed, output_dir=str(folder))
    data = chosen_data(method, draws(world, method.needs() == "pairs"), teacher, settings)
    return Trainer(method, teacher, data, settings)


@torch.no_grad()
def _sampled(trainer: Trainer, teacher: AnalyticTeacher, labels: Tensor) -> Tensor:
    captions = {label: caption for caption, label in teacher.captions.items()}
    cond = teacher.encode([captions[int(label)] for label in labels], 0)
    with trainer.student.evaluated():
        return sample_role(trainer, cond, trainer.method.sampler())


def _routed(trainers: Sequence[Trainer], teacher: AnalyticTeacher, labels: Tensor) -> Tensor:
    """Samples of the student that serves each label, as its training data tell."""
    samples = torch.empty(len(labels), *teacher.shape)
    for trainer in trainers:
        own = {teacher.captions[trainer.batches.data.caption(i)] for i in range(len(trainer.batches.data))}
        rows = torch.isin(labels, torch.tensor(sorted(own)))
        samples[rows] = _sampled(trainer, teacher, labels[rows])
    return samples
