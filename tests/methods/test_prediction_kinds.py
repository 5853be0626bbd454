"""Trajectory methods with networks that predict v: the same optima, losses and gradients as with epsilon."""

from __future__ import annotations

import pytest
import torch
from method_helpers import SD, AffineGenerator, f64
from trajectory_helpers import JumpNet, behind_boundary, gaussian_denoiser, product_map, student_loss

from fastdiff.methods import (
    APEX,
    CTM,
    LCM,
    PCM,
    RCM,
    TCD,
    TCM,
    TSCD,
    APEXConfig,
    CTMConfig,
    LCMConfig,
    PCMConfig,
    Progressive,
    ProgressiveConfig,
    RCMConfig,
    SCott,
    SCottConfig,
    TCDConfig,
    TCMConfig,
    TSCDConfig,
)
from fastdiff.methods._trajectory import grid_points

ROWS = 40
GRID = grid_points(40).tolist()
PLAIN = {"guidance_scale": 1.0, "loss_type": "l2", "num_ddim_timesteps": 40}
ALONE = PLAIN | {"adversarial_weight": 0.0}


def consistency(x, t, s):
    """LCM's optimum, to index 0."""
    return behind_boundary(product_map([0, *GRID[1:]])(x, t, torch.zeros_like(s)), x, t)


def clean(index):
    return torch.full_like(index, -1.0)


def quarter(index):
    """The edge of the quarter of the trajectory that ends below `index`."""
    return torch.ceil((index + 1) / 250 - 1) * 250 - 1


# name -> method, its optimum, where each of its maps ends
OPTIMA = {
    "lcm": (LCM(LCMConfig(**PLAIN)), consistency, clean),
    "scott": (SCott(SCottConfig(**ALONE, noise_strength=0.0, solver_steps=1)), consistency, clean),
    "pcm": (PCM(PCMConfig(**ALONE)), product_map(GRID), quarter),
    "tscd": (TSCD(TSCDConfig(**ALONE, num_segments=4)), product_map(GRID), quarter),
    "tcd": (TCD(TCDConfig(**PLAIN)), product_map(GRID), clean),
    "ctm": (CTM(CTMConfig(**PLAIN)), product_map(GRID), None),
    "progressive": (
        Progressive(ProgressiveConfig(num_inference_steps=4)),
        product_map([-1, *range(124, 1000, 125)]),
        lambda index: index - 250,
    ),
}


@pytest.mark.parametrize("name", OPTIMA)
def test_the_loss_of_a_network_of_v_vanishes_at_the_optimum(name):
    method, f, end = OPTIMA[name]
    draws = {"pair": torch.arange(40)}
    if end is not None:  # a network that is not told has one optimum for one end
        draws["end"] = torch.zeros(ROWS)
    student = JumpNet(f, end, SD, "v_prediction")
    (loss,) = student_loss(method, gaussian_denoiser(SD, "v_prediction", student=student), ROWS, draws).values()
    assert loss < 1e-20
    off = JumpNet(lambda x, t, s: (1 + t / 1000) * f(x, t, s), end, SD, "v_prediction")
    (loss,) = student_loss(method, gaussian_denoiser(SD, "v_prediction", student=off), ROWS, draws).values()
    assert loss > 1e-6


class Affine(AffineGenerator):
    """One affine clean prediction, moved by what it is told."""

    moved: torch.Tensor | float = 0.0

    def forward(self, x_t, time, labels, timestep_cond=None):
        self.moved = 0.0 if timestep_cond is None else 0.1 * timestep_cond.double().mean(1, keepdim=True)
        return super().forward(x_t, time, labels)

    def x0(self, x, time, labels):
        return super().x0(x, time, labels) + self.moved


METHODS = {name: method for name, (method, *_) in OPTIMA.items()} | {
    "scott": SCott(SCottConfig(**ALONE, sde_solver="er_sde")),
    "ctm": CTM(CTMConfig(**PLAIN, solver="heun", compare_at="clean", max_skip=2)),
    "tcm": TCM(TCMConfig()),
    "apex": APEX(APEXConfig()),
    "rcm": RCM(RCMConfig(guidance_scale=1.0, tangent_warmup=0)),
}


@pytest.mark.parametrize("name", METHODS)
def test_one_clean_prediction_has_one_loss_and_gradient_by_epsilon_and_by_v(name):
    found = {}
    for kind in ("epsilon", "v_prediction"):
        student = Affine(f64([[0.8]]), f64([0.3]), SD, kind)
        others = {role: Affine(f64([[0.7]]), f64([0.4]), SD, kind) for role in ("target", "first_stage", "fake_score")}
        denoiser = gaussian_denoiser(SD, kind, student=student, **others)
        loss = sum(student_loss(METHODS[name], denoiser, ROWS).values())
        found[kind] = torch.stack([loss, *(g.sum() for g in torch.autograd.grad(loss, [student.A, student.b]))])
    assert (found["epsilon"].abs() > 1e-3).all()
    torch.testing.assert_close(found["v_prediction"], found["epsilon"], rtol=1e-9, atol=0)
