"""Weights of f-divergences against autograd of f, the identities between them, and their values between Gaussians."""

from __future__ import annotations

import math

import pytest
import torch

from fastdiff.diffusion import FlowSchedule, Gaussian, TrigSchedule, VPSchedule
from fastdiff.diffusion.divergences import DIVERGENCES, divergence_named, power_divergence

PHI = torch.linspace(-6, 6, 97, dtype=torch.float64)
R = PHI.exp()
EVERY = [*DIVERGENCES, power_divergence(-0.7), power_divergence(0.3), power_divergence(1.6)]
CLOSED_FORMS = {  # h by hand, as a function of r
    "rkl": lambda r: torch.ones_like(r),
    "soft_rkl": lambda r: 1 / (r + 1),
    "js": lambda r: r / (r + 1),
    "sq_hellinger": lambda r: r.sqrt() / 4,
    "fkl": lambda r: r,
    "jeffreys": lambda r: r + 1,
    "soft_fkl": lambda r: r**2 / (r + 1),
    "pearson": lambda r: 2 * r**2,
    "neyman": lambda r: 2 / r,
}


def derivative(function, at, order=1):
    value = at.detach().clone().requires_grad_(True)
    out = function(value)
    for _ in range(order):
        if not out.requires_grad:
            return torch.zeros_like(at)
        (out,) = torch.autograd.grad(out.sum(), value, create_graph=True, materialize_grads=True)
    return out.detach()


@pytest.mark.parametrize("one", EVERY, ids=lambda one: one.name)
def test_h_is_r_squared_times_the_second_derivative_of_f(one):
    torch.testing.assert_close(one.h(PHI), R**2 * derivative(one.f, R, 2), rtol=1e-9, atol=1e-13)
    assert one.f(torch.ones(1, dtype=torch.float64)).abs().item() < 1e-15
    assert bool((one.h(PHI) > 0).all())  # f is convex
    if one.name in CLOSED_FORMS:
        torch.testing.assert_close(one.h(PHI), CLOSED_FORMS[one.name](R), rtol=1e-12, atol=0)


@pytest.mark.parametrize("one", EVERY, ids=lambda one: one.name)
def test_derivatives_in_log_r(one):
    h, first, second = one.h(PHI), derivative(one.h, PHI), derivative(one.h, PHI, 2)
    torch.testing.assert_close(one.slope(PHI), first, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(one.rest(PHI), h - first, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(one.rest_slope(PHI), first - second, rtol=1e-9, atol=1e-11)


def test_weights_of_the_fisher_gradient_at_one_ratio():
    """The table H - H', 2H, H' - H'', 2H' of Uni-Instruct, by hand at r = 3."""
    r, phi = 3.0, torch.tensor(math.log(3.0), dtype=torch.float64)
    table = {
        "rkl": (1, 2, 0, 0),
        "fkl": (0, 2 * r, 0, 2 * r),
        "jeffreys": (1, 2 * (r + 1), 0, 2 * r),
        "js": (r**2 / 16, 2 * r / 4, 2 * r**2 / 64, 2 * r / 16),
        "soft_rkl": ((2 * r + 1) / 16, 2 / 4, -2 * r**2 / 64, -2 * r / 16),
        "sq_hellinger": (r**0.5 / 8, r**0.5 / 2, r**0.5 / 16, r**0.5 / 4),
        "pearson": (-2 * r**2, 4 * r**2, -4 * r**2, 8 * r**2),
    }
    for name, expected in table.items():
        one = divergence_named(name)
        got = (one.rest(phi), 2 * one.h(phi), one.rest_slope(phi), 2 * one.slope(phi))
        assert [value.item() for value in got] == pytest.approx(expected, abs=1e-13), name


def test_duality():
    """h*(r) = r h(1/r) for the divergence with its arguments exchanged."""
    dual = {"rkl": "fkl", "soft_rkl": "soft_fkl", "js": "js", "sq_hellinger": "sq_hellinger", "jeffreys": "jeffreys"}
    for name, other in (dual | {b: a for a, b in dual.items()} | {"pearson": "neyman", "neyman": "pearson"}).items():
        swapped = R * divergence_named(name).h(-PHI)
        torch.testing.assert_close(swapped, divergence_named(other).h(PHI), rtol=1e-12, atol=0)


def test_sums():
    def h(name):
        return divergence_named(name).h(PHI)

    torch.testing.assert_close(h("soft_rkl") + h("js"), h("rkl"), rtol=1e-14, atol=0)
    torch.testing.assert_close(h("js") + h("soft_fkl"), h("fkl"), rtol=1e-13, atol=0)
    torch.testing.assert_close(h("rkl") + h("fkl"), h("jeffreys"), rtol=1e-14, atol=0)


def test_powers_contain_the_named_ones():
    for gamma, name, scale in [(0, "rkl", 1), (0.5, "sq_hellinger", 4), (1, "fkl", 1), (2, "pearson", 0.5)]:
        power = divergence_named("power", gamma)
        torch.testing.assert_close(power.h(PHI), scale * divergence_named(name).h(PHI), rtol=1e-12, atol=0)
    assert torch.equal(divergence_named("power", -1.0).h(PHI), divergence_named("neyman").h(PHI) / 2)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="soft_rkl"):
        divergence_named("kl")


# Between Gaussians


def f64(value):
    return torch.tensor(value, dtype=torch.float64)


def gaussian(mean, variance):
    return Gaussian(f64([mean]), f64([[variance]]))


def student_of(scale):
    return gaussian(-0.2, scale**2)


TEACHER = gaussian(0.7, 0.64)
LEVELS = {  # a process, the time at which it has the levels alpha 0.6 and sigma 0.4 or 0.8, and the student's scale
    "I": (FlowSchedule(), 0.4, 1.1),
    "II": (TrigSchedule(), math.asin(0.8), 1.3),
}
VALUES = {  # D_f = E_q[f(r)] and E_q[h(r) (s_p - s_q)^2], by adaptive quadrature of f and h written out in 30 digits
    "I": {
        "rkl": (0.4250717687, 2.3770862084),
        "soft_rkl": (0.2716566255, 1.7434091100),
        "js": (0.1534151432, 0.6336770983),
        "sq_hellinger": (0.0814917474, 0.3598432871),
        "fkl": (0.2837306237, 1.1260553313),
        "jeffreys": (0.7088023924, 3.5031415396),
        "soft_fkl": (0.1303154805, 0.4923782330),
    },
    "II": {
        "rkl": (0.2043181681, 0.5359764505),
        "soft_rkl": (0.1243947193, 0.3673419157),
        "js": (0.0799234489, 0.1686345348),
        "sq_hellinger": (0.0416023855, 0.0919917104),
        "fkl": (0.1457282737, 0.2924339164),
        "jeffreys": (0.3500464418, 0.8284103669),
        "soft_fkl": (0.0658048248, 0.1237993816),
    },
}


def expectations(one, student, t, schedule):
    """E_q[f(r)] and E_q[h(r) (s_p - s_q)^2] of the noised laws by the trapezoidal rule, exact far below rounding."""
    x, t = torch.arange(-12, 12.01, 0.02, dtype=torch.float64)[:, None], f64(t)
    phi = TEACHER.log_prob(x, t, schedule) - student.log_prob(x, t, schedule)
    weights = 0.02 * student.log_prob(x, t, schedule).exp()
    gap = (TEACHER.score(x, t, schedule) - student.score(x, t, schedule)).squeeze(1)
    return (weights * one.f(phi.exp())).sum().item(), (weights * one.h(phi) * gap.square()).sum().item()


@pytest.mark.parametrize("name", VALUES["I"])
@pytest.mark.parametrize("scenario", LEVELS)
def test_golden_values_of_divergences_and_of_their_integrands(scenario, name):
    schedule, t, scale = LEVELS[scenario]
    found = expectations(divergence_named(name), student_of(scale), t, schedule)
    assert found == pytest.approx(VALUES[scenario][name], abs=2e-10)


SD = VPSchedule.from_scheduler_config(
    {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
)


def slope(function, t, step):
    """A central difference."""
    return (function(t + step) - function(t - step)) / (2 * step)


@pytest.mark.parametrize("one", EVERY, ids=lambda one: one.name)
@pytest.mark.parametrize(
    ("schedule", "times", "step"), [(FlowSchedule(), (0.3, 0.5, 0.8), 1e-4), (SD, (250.5, 500.5, 800.5), 0.01)]
)
def test_a_divergence_falls_along_the_diffusion_as_its_fisher_divergence_says(schedule, times, step, one):
    """dD_f/dt = -g^2/2 E_q[h(r) (s_p - s_q)^2], which Uni-Instruct integrates; g^2 is 2 t/(1 - t) or beta(t)."""
    student = student_of(1.1)
    for t in times:
        rate = -2 * slope(lambda at: schedule.alpha(f64(at)).log().item(), t, step)
        diffusion = rate if schedule is SD else 2 * t / (1 - t)
        fisher = expectations(one, student, t, schedule)[1]
        falls = slope(lambda at: expectations(one, student, at, schedule)[0], t, step)
        assert falls == pytest.approx(-diffusion / 2 * fisher, rel=1e-5), t
