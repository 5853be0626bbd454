"""Clipping inside the optimizer's kernel is torch's own clipping."""

import pytest
import torch

from fastdiff.engine import Settings
from fastdiff.engine.optimizers import GroupOptimizer
from fastdiff.methods import Group

SETTINGS = Settings(report_to="none", learning_rate=1e-2, max_grad_norm=1.0)


def weights() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,))]


def gradients(step: int, size: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [size * torch.randn(shape, generator=generator) for shape in ((3, 4), (5,))]


def test_clipped_steps_are_those_of_torch():
    ours, theirs = weights(), weights()
    group = GroupOptimizer("student", ours, Group(), SETTINGS)
    defaults = {key: group.optimizer.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")}
    adam = torch.optim.AdamW(theirs, fused=True, **defaults)
    for step, size in enumerate((0.01, 10.0, 0.3)):  # below and above the norm; Adam's memory tells them apart
        for side in (ours, theirs):
            for parameter, gradient in zip(side, gradients(step, size)):
                parameter.grad = gradient
        norm = group.step()
        assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs, 1.0))
        adam.step()
        torch.testing.assert_close(ours, theirs)
    assert all(parameter.grad is None for parameter in ours)


def test_a_step_that_is_not_finite_is_left_out():
    parameters = weights()
    group = GroupOptimizer("student", parameters, Group(), SETTINGS)
    for parameter, gradient in zip(parameters, gradients(0, float("inf"))):
        parameter.grad = gradient
    assert not group.step().isfinite()
    torch.testing.assert_close(parameters, weights(), rtol=0, atol=0)
