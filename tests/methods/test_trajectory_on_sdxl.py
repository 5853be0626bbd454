"""Trajectory methods on SDXL, whose network is also told pooled embeddings and time ids: two steps of every student."""

from __future__ import annotations

import warnings

import pytest
import torch
from adversarial_cases import frozen_weights
from straight_helpers import PairData

from fastdiff.engine import Settings, Trainer
from fastdiff.methods import METHODS, Method
from fastdiff.models.teacher import Teacher

TRAJECTORY = {method.info.name: method for method in METHODS if method.info.family == "trajectory"}
STUDENTS = [(name, kind) for name, method in TRAJECTORY.items() for kind in method.info.student_kinds]
# Both groups of two-time-scale methods step within two steps, and terms that warm up are there at once.
CONFIGS = {
    "freeflow": {"correct_every": 2},
    "rcm": {"tangent_warmup": 0},
    "scm": {"tangent_warmup": 0},
    "tscd": {"num_segments": 1, "score_weight": 1.0},
}


def method_of(name: str, student: str) -> Method:
    cls = TRAJECTORY[name]
    # A LoRA cannot hold the input of APEX's released losses; the printed ones say that they are for study.
    printed = {"losses": "paper"} if (name, student) == ("apex", "lora") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return cls(cls.Config(**CONFIGS.get(name, {}) | printed))


def pairs() -> PairData:
    noise, latents = torch.randn(2, 4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return PairData(noise, latents, ("a red apple", "a dog"))


def weights(trainer: Trainer) -> dict[str, list[torch.Tensor]]:
    return {group: [p.detach().clone() for p in trainer.networks.parameters(group)] for group in trainer.optimizers}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "student"), STUDENTS)
def test_two_steps_train_every_group_and_leave_the_teacher_as_it_is(name, student, tiny_sdxl, tmp_path):
    teacher_before = frozen_weights(tiny_sdxl)
    settings = Settings(
        output_dir=str(tmp_path), student=student, fake_score=student, train_batch_size=4, max_train_steps=2,
        lora_rank=2, learning_rate=1e-3, resolution=32, report_to="none", validation_samples=0,
    )  # fmt: skip
    trainer = Trainer(method_of(name, student), Teacher(tiny_sdxl, "tiny"), pairs(), settings)
    before, losses = weights(trainer), []
    for batches in trainer.batches.steps(0):
        trainer.train_step(batches)
        losses.append(trainer.metrics.read())  # raises on a number that is not finite
    assert set(batches[0].cond.tensors) == {"prompt_embeds", "pooled_prompt_embeds", "time_ids"}
    assert all(any(key.startswith("loss/") for key in values) for values in losses) and trainer.step == 2
    for group, after in weights(trainer).items():
        moved = max((a - b).abs().max().item() for a, b in zip(before[group], after, strict=True))
        assert moved > 0, group
    teacher_after = frozen_weights(tiny_sdxl)
    assert teacher_before.keys() <= teacher_after.keys()
    assert all(torch.equal(tensor, teacher_after[key]) for key, tensor in teacher_before.items())
