"""Descent on trajectory losses: one wrong number in an exact map must go back to zero, free students must find the map."""

from __future__ import annotations

import pytest
import torch
from flow_map_helpers import LAW, ConsistencyNetwork, MapNetwork, OwnScore, teacher_network, told_end
from method_helpers import batch_of, context, denoiser_of, f64, rest
from torch import Tensor, nn
from trajectory_helpers import FLOW, data, exact_map, gaussian_denoiser, jumps, mapped

from fastdiff.methods import (
    APEX,
    RCM,
    SCM,
    APEXConfig,
    FreeFlow,
    FreeFlowConfig,
    MeanFlow,
    MeanFlowConfig,
    RCMConfig,
    SCMConfig,
)
from fastdiff.methods._flow_map import end_input

NEARLY_LINEAR = {"guidance_scale": 1.0, "tangent_warmup": 0, "tangent_constant": 1.0}
METHODS = {
    "scm": (SCM(SCMConfig(**NEARLY_LINEAR)), ConsistencyNetwork),
    "rcm": (RCM(RCMConfig(timesteps=(999,), **NEARLY_LINEAR)), ConsistencyNetwork),
    "meanflow": (MeanFlow(MeanFlowConfig(norm_power=0.0)), MapNetwork),
    "freeflow": (FreeFlow(FreeFlowConfig(norm_power=0.0)), MapNetwork),
    "apex": (APEX(APEXConfig(guidance_strength=0.0, adversarial_weight=0.0)), MapNetwork),
}


def slopes(name: str, tilt: float, step: int = 0) -> dict[str, float]:
    """Of the student's terms in the tilt of an exact map; the fake score is the exact one of the student's samples."""
    (method, network), rows = METHODS[name], 64
    wrong = nn.Parameter(f64(tilt))
    student = network(FLOW, "flow", wrong)
    roles = {"student": student, "fake_score": OwnScore(student, tells_end=network is MapNetwork)}
    denoiser = denoiser_of(teacher_network("flow"), FLOW, "flow", **roles)
    z = torch.randn(rows, 2, 1, 1, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    terms = method.student_loss(batch_of(rows, 2, LAW.sample(z)), context(denoiser, rows, step=step))
    return {term: torch.autograd.grad(loss, wrong, retain_graph=True)[0].item() for term, loss in terms.items()}


@pytest.mark.parametrize("name", METHODS)
def test_every_term_pulls_towards_the_exact_map_from_either_side(name):
    down, up = slopes(name, -0.1), slopes(name, 0.1)
    assert all(down[term] < 0 < up[term] for term in up), (down, up)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"apex"}))
def test_descent_ends_at_the_exact_map(name):
    """Not of APEX, which regresses velocities of single samples: their noise stays."""
    tilt, rate = 0.1, 0.05 / abs(sum(slopes(name, 0.1).values()))  # where slopes are linear, a step halves the tilt
    for step in range(20):
        tilt -= rate * sum(slopes(name, tilt, step).values())
    assert abs(tilt) < 1e-3


class AffineInTime(nn.Module):
    """A velocity affine in its input, by polynomials in the time and the told end that know nothing of the law.

    Tangents differentiate in time, where maps of separate times have no slope.
    """

    def __init__(self, powers: list[tuple[int, int]]) -> None:
        super().__init__()
        self.powers = powers
        self.slopes, self.offsets = (nn.Parameter(torch.zeros(len(powers)).double()) for _ in range(2))

    def forward(self, x_t: Tensor, time: Tensor, labels: Tensor, timestep_cond: Tensor | None = None) -> Tensor:
        of_time = chebyshev(time, len(self.powers))
        of_end = of_time[:1] if timestep_cond is None else chebyshev(told_end(timestep_cond), len(self.powers))
        basis = torch.stack([of_time[i] * of_end[j] for i, j in self.powers], dim=1)
        slope, offset = ((basis @ weight)[:, None, None, None] for weight in (self.slopes, self.offsets))
        return slope * x_t + offset

    def enable_gradient_checkpointing(self, _function) -> None:
        pass


def chebyshev(time: Tensor, count: int) -> list[Tensor]:
    """The first polynomials of Chebyshev on network times from 0 to 1000, at least two."""
    u = time.double() / 500 - 1
    found = [torch.ones_like(u), u]
    while len(found) < count:
        found.append(2 * u * found[-1] - found[-2])
    return found


def of_time(degree: int) -> list[tuple[int, int]]:
    return [(i, 0) for i in range(degree + 1)]


def of_end(degree: int) -> list[tuple[int, int]]:
    return [(0, j) for j in range(degree + 1)]


def of_both(degree: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(degree + 1) for j in range(degree + 1 - i)]


LINEAR = {"guidance_scale": 1.0, "tangent_warmup": 0, "tangent_constant": 1e6}
PLAIN = {"guidance_scale": 1.0, "norm_power": 0.0}
TO_CLEAN, FROM_NOISE = [(999, -1), (499, -1), (99, -1)], [(999, -1), (999, 499), (999, 99)]
# Times are drawn near plain noise too, where jumps begin: polynomials do not go on beyond what they were taught.
# name -> student's loss, powers of its polynomials, jumps between indices, greatest error at each degree
FREE = {
    "scm": (SCM(SCMConfig(**LINEAR, time_mean=0.0)).student_loss, of_time, TO_CLEAN, {4: 4e-2, 8: 2e-3, 12: 2e-4}),
    "rcm": (RCM(RCMConfig(**LINEAR)).warm_up_loss, of_time, TO_CLEAN, {4: 4e-2, 8: 2e-3, 12: 2e-4}),
    "meanflow": (
        MeanFlow(MeanFlowConfig(**PLAIN, instant_share=0.25, clean_share=0.25, time_std=3.0)).student_loss,
        of_both,
        [*TO_CLEAN, *FROM_NOISE, (799, 399), (299, 99)],
        {4: 3e-2, 6: 1e-2},
    ),
    "freeflow": (
        FreeFlow(FreeFlowConfig(**PLAIN, correct_every=0)).student_loss,
        of_end,
        FROM_NOISE,
        {4: 2e-3, 8: 5e-5},
    ),
}


@pytest.mark.parametrize(("name", "degree"), [(name, degree) for name, row in FREE.items() for degree in row[-1]])
def test_a_free_student_comes_to_rest_at_the_exact_map_as_near_as_its_polynomials_come(name, degree):
    loss, powers, places, errors = FREE[name]
    denoiser, rows = gaussian_denoiser(FLOW, student=AffineInTime(powers(degree))), 1024
    batch, ctx = batch_of(rows, 1, data(rows)), context(denoiser, rows)
    rest(lambda: sum(loss(batch, ctx).values()), denoiser.roles.parameters("student"))
    x, found = f64([-1.0, 2.0]), []
    for t, s in places:
        end = FLOW.time_of_index(torch.full((2,), float(s)))
        told = {} if powers is of_time else end_input(FLOW, end)
        found.append((jumps(denoiser, x, t, s, **told) - mapped(exact_map(FLOW), x, t, s)).abs().max().item())
    assert max(found) < errors[degree]
