"""The number that picks checkpoints: zero noise aside, it tells a broken student from the teacher's copy."""

from __future__ import annotations

import torch

from fastdiff.engine.validation import FeatureMoments


def test_it_rises_when_the_student_breaks(make_trainer):
    trainer = make_trainer(student="full", method_config={"timesteps": (999, 749, 499, 249)})
    score = FeatureMoments(["a dog", "a red apple"] * 8, teacher_steps=4)
    whole = score(trainer)
    with torch.no_grad():
        for parameter in trainer.networks.parameters("student"):
            parameter.mul_(1.5)
    assert score(trainer) > 2 * whole
    assert score(trainer) == score(trainer)


def test_the_batch_size_does_not_matter(make_trainer):
    trainer = make_trainer()
    prompts = ["a dog", "a red apple", "blue cat"]
    one, all_at_once = (FeatureMoments(prompts, teacher_steps=2, batch_size=size)(trainer) for size in (1, 3))
    assert abs(one - all_at_once) < 1e-4 * max(one, 1)
