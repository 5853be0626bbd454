"""Denoising targets for samples that are noised from a noisy law, in closed form on Gaussians."""

from typing import get_args

import pytest
import torch

from fastdiff.diffusion import (
    EDMSchedule,
    FlowSchedule,
    Gaussian,
    PredictionKind,
    Terminal,
    TrigSchedule,
    prediction_target,
)
from fastdiff.diffusion.prediction import Prediction, transition_target

KINDS = get_args(PredictionKind)
MU = torch.tensor([0.7, -0.4], dtype=torch.float64)
COV = torch.tensor([[0.64, 0.2], [0.2, 0.5]], dtype=torch.float64)


@pytest.fixture(params=["sd", "flow", "edm", "trig"])
def span(request, sd):
    """A process with a boundary s and a noisier t."""
    return {
        "sd": (sd, 499.0, 700.0),
        "flow": (FlowSchedule(), 0.4, 0.75),
        "edm": (EDMSchedule(), 0.5, 3.0),
        "trig": (TrigSchedule(), 0.5, 1.2),
    }[request.param]


def sigma_points(rows):
    """(2 rows, rows) points of equal weight with mean 0 and covariance I."""
    root = rows**0.5 * torch.eye(rows, dtype=torch.float64)
    return torch.cat([root, -root])


def least_squares(x, target):
    """The affine map that regression on these points finds: slope (d, d) and offset (d,)."""
    design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    fit = torch.linalg.lstsq(design, target).solution
    return fit[:-1].T, fit[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_regression_finds_the_denoiser_of_the_law_at_t(span, kind):
    """x0, the noise up to s and the noise from s to t: 3 d directions, so that least squares is exact."""
    schedule, s, t = span
    root = torch.linalg.cholesky(COV)
    points = sigma_points(6)
    x0, eps_s, eps = MU + points[:, :2] @ root.T, points[:, 2:4], points[:, 4:]
    x_s = schedule.add_noise(x0, eps_s, s)
    x_t = schedule.transition(x_s, s, t, eps)
    slope, offset = least_squares(x_t, transition_target(kind, schedule, x_s, s, eps, t))
    probe = sigma_points(2)
    exact = Prediction.from_x0(Gaussian(MU, COV).denoise(probe, t, schedule), probe, t, schedule).as_kind(kind)
    torch.testing.assert_close(probe @ slope.T + offset, exact, rtol=1e-12, atol=1e-12)


def test_taking_x_s_for_clean_is_biased(span):
    schedule, s, t = span
    root = torch.linalg.cholesky(COV)
    points = sigma_points(6)
    x_s = schedule.add_noise(MU + points[:, :2] @ root.T, points[:, 2:4], s)
    x_t = schedule.transition(x_s, s, t, points[:, 4:])
    slope, offset = least_squares(x_t, x_s)
    probe = sigma_points(2)
    exact = Gaussian(MU, COV).denoise(probe, t, schedule)
    assert (probe @ slope.T + offset - exact).abs().max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_is_a_prediction_of_x_t(span, kind, randn):
    """alpha x* + sigma eps* = x_t in every sample, so that conversions of the target are targets."""
    schedule, s, t = span
    x_s, eps = randn(5, 3), randn(5, 3)
    x_t = schedule.transition(x_s, s, t, eps)
    alpha, sigma = schedule.levels(t, x_t)
    target = Prediction(transition_target(kind, schedule, x_s, s, eps, t), kind, x_t, t, schedule)
    clean, noise = (transition_target(k, schedule, x_s, s, eps, t) for k in ("sample", "epsilon"))
    torch.testing.assert_close(alpha * clean + sigma * noise, x_t, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(target.x0, clean, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(target.eps, noise, rtol=1e-11, atol=1e-11)


def test_published_form_for_flows(randn):
    """v* = ((alpha_s^2 sigma_t + alpha_t sigma_s^2) / (alpha_s^2 q)) eps - x_s / alpha_s, the score being -eps / q."""
    schedule, s, t = FlowSchedule(), 0.4, 0.75
    x_s, eps = randn(4, 3), randn(4, 3)
    alpha_s, alpha_t = 1 - s, 1 - t
    q = (t**2 - (alpha_t / alpha_s * s) ** 2) ** 0.5
    expected = (alpha_s**2 * t + alpha_t * s**2) / (alpha_s**2 * q) * eps - x_s / alpha_s
    target = transition_target("flow", schedule, x_s, s, eps, t)
    torch.testing.assert_close(target, expected, rtol=1e-13, atol=1e-13)
    x_t = schedule.transition(x_s, s, t, eps)
    torch.testing.assert_close(Prediction(target, "flow", x_t, t, schedule).score, -eps / q, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_from_a_clean_sample_it_is_the_plain_target(span, kind, dtype, randn):
    schedule, _, t = span
    x0, eps = randn(4, 3).to(dtype), randn(4, 3).to(dtype)
    plain = prediction_target(kind, schedule, x0, eps, t)
    torch.testing.assert_close(transition_target(kind, schedule, x0, Terminal.CLEAN, eps, t), plain, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_limit_of_a_clean_boundary(kind, randn):
    x0, eps = randn(4, 3), randn(4, 3)
    schedule = FlowSchedule()
    plain = prediction_target(kind, schedule, x0, eps, 0.5)
    errors = [
        (transition_target(kind, schedule, x0, s, eps, 0.5) - plain).abs().max().item() for s in (1e-2, 1e-4, 1e-6)
    ]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-5


def test_times_may_differ_by_sample(sd, randn):
    x_s, eps = randn(2, 3), randn(2, 3)
    t = torch.tensor([600.0, 900.0], dtype=torch.float64)
    both = transition_target("epsilon", sd, x_s, 499.0, eps, t)
    for row in range(2):
        one = transition_target("epsilon", sd, x_s[row : row + 1], 499.0, eps[row : row + 1], t[row].item())
        torch.testing.assert_close(both[row : row + 1], one, rtol=1e-14, atol=1e-14)
    with pytest.raises(ValueError, match="prediction type"):
        transition_target("noise", sd, x_s, 499.0, eps, t)
