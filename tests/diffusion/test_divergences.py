"""Weights of f-divergences against autograd of f, and the identities between them."""

from __future__ import annotations

import math

import pytest
import torch

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
