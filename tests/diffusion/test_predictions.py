from typing import get_args

import pytest
import torch

from fastdiff.diffusion import FlowSchedule, Prediction, PredictionKind, guide, prediction_target

KINDS = get_args(PredictionKind)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trips_between_all_kinds(process, kind, randn):
    schedule, t = process
    x0, eps = randn(5, 2, 3), randn(5, 2, 3)
    x_t = schedule.add_noise(x0, eps, t)
    prediction = Prediction(prediction_target(kind, schedule, x0, eps, t), kind, x_t, t, schedule)
    torch.testing.assert_close(prediction.x0, x0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(prediction.eps, eps, rtol=1e-12, atol=1e-12)
    for other in KINDS:
        target = prediction_target(other, schedule, x0, eps, t)
        torch.testing.assert_close(prediction.as_kind(other), target, rtol=1e-11, atol=1e-11)
        again = Prediction(prediction.as_kind(other), other, x_t, t, schedule)
        torch.testing.assert_close(again.as_kind(kind), prediction.native, rtol=1e-11, atol=1e-11)


def test_each_kind_has_its_published_formula(sd, randn):
    t = torch.tensor([20.0, 399, 999], dtype=torch.float64)
    x, output = randn(3, 4), randn(3, 4)
    alpha, sigma = sd.levels(t, x)
    cases = {
        "epsilon": ((x - sigma * output) / alpha, output),
        "sample": (output, (x - alpha * output) / sigma),
        "v_prediction": (alpha * x - sigma * output, sigma * x + alpha * output),
    }
    for kind, (x0, eps) in cases.items():
        prediction = Prediction(output, kind, x, t, sd)
        torch.testing.assert_close(prediction.x0, x0, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(prediction.eps, eps, rtol=1e-12, atol=1e-12)
    level = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    prediction = Prediction(output, "flow", x, level, FlowSchedule())
    torch.testing.assert_close(prediction.x0, x - level[:, None] * output, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(prediction.eps, x + (1 - level[:, None]) * output, rtol=1e-14, atol=1e-14)


def test_score_and_its_forms(process, randn):
    schedule, t = process
    x, x0 = randn(5, 3), randn(5, 3)
    alpha, sigma = schedule.levels(t, x)
    prediction = Prediction.from_x0(x0, x, t, schedule)
    torch.testing.assert_close(prediction.score, (alpha * x0 - x) / sigma**2, rtol=1e-12, atol=1e-12)
    by_flow = -(x + alpha * prediction.flow) / ((alpha + sigma) * sigma)
    torch.testing.assert_close(prediction.score, by_flow, rtol=1e-11, atol=1e-11)


def test_score_gap_identities(process, randn):
    schedule, t = process
    x = randn(5, 3)
    fake, real = (Prediction.from_x0(randn(5, 3), x, t, schedule) for _ in range(2))
    alpha, sigma = schedule.levels(t, x)
    gap = fake.score - real.score
    torch.testing.assert_close(gap, alpha / sigma**2 * (fake.x0 - real.x0), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gap, (real.eps - fake.eps) / sigma, rtol=1e-10, atol=1e-10)
    if isinstance(schedule, FlowSchedule):
        torch.testing.assert_close(gap, alpha / sigma * (real.flow - fake.flow), rtol=1e-10, atol=1e-10)


def test_weights_under_a_change_of_target(sd, randn):
    """|d eps|^2 = (alpha/sigma)^2 |d x0|^2, and on a VP process |d v|^2 = |d x0|^2 / sigma^2."""
    x, t = randn(1, 3), torch.tensor([300.0], dtype=torch.float64)
    a, b = (Prediction(randn(1, 3), "epsilon", x, t, sd) for _ in range(2))
    alpha, sigma = sd.levels(t, x)
    d_x0 = (a.x0 - b.x0).square().sum()
    torch.testing.assert_close((a.eps - b.eps).square().sum(), ((alpha / sigma) ** 2 * d_x0)[0, 0], rtol=1e-12, atol=0)
    torch.testing.assert_close((a.v - b.v).square().sum(), (d_x0 / sigma**2)[0, 0], rtol=1e-12, atol=0)


def test_guidance(process, randn):
    schedule, t = process
    x, null, cond = randn(5, 3), randn(5, 3), randn(5, 3)
    assert torch.equal(guide(null, cond, 1.0), cond)
    assert torch.equal(guide(null, cond, torch.ones(5)), cond)
    assert torch.equal(guide(null, cond, 0.0), null)
    w = torch.tensor([1.0, 2.0, 7.5, 0.0, 3.0])
    torch.testing.assert_close(guide(null, cond, w), null + w[:, None] * (cond - null), rtol=1e-12, atol=1e-12)
    # LCM's w counts from 0: cond + w (cond - null) is our w + 1
    torch.testing.assert_close(guide(null, cond, 6.5 + 1), cond + 6.5 * (cond - null), rtol=1e-12, atol=1e-12)
    for kind in KINDS:  # it commutes with every conversion
        parts = [Prediction(output, "epsilon", x, t, schedule).as_kind(kind) for output in (null, cond)]
        whole = Prediction(guide(null, cond, 7.5), "epsilon", x, t, schedule).as_kind(kind)
        torch.testing.assert_close(whole, guide(*parts, 7.5), rtol=1e-10, atol=1e-10)
    assert guide(null.bfloat16(), cond.bfloat16(), 3.3).dtype == torch.float32


def test_precision(sd):
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    prediction = Prediction(x, "epsilon", x, torch.tensor([999, 10]), sd)
    assert prediction.native is x
    exact = Prediction(x.double(), "epsilon", x.double(), torch.tensor([999, 10]), sd)
    for name in ("x0", "eps", "v", "flow", "score"):
        value = getattr(prediction, name)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), getattr(exact, name), rtol=1e-5, atol=1e-5)
    assert prediction_target("v_prediction", sd, x, x, 3).dtype == torch.float32
    for pair in ((x, x.double()), (x.double(), x)):  # one float64 is enough
        assert prediction_target("epsilon", sd, *pair, 3).dtype == torch.float64
        assert guide(*pair, 2.0).dtype == torch.float64


def test_gradients_flow_through_conversions(sd, randn):
    output = randn(2, 3).requires_grad_(True)
    Prediction(output, "epsilon", randn(2, 3), torch.tensor([999, 10]), sd).x0.sum().backward()
    assert (output.grad[0] - -14.6146).abs().max() < 5e-5  # the noise-to-signal ratio at 999


def test_errors(sd):
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="epsilon, sample"):
        Prediction(x, "velocity", x, 0, sd)
    with pytest.raises(ValueError, match="variance"):
        Prediction(torch.zeros(2, 8), "epsilon", x, 0, sd)
    with pytest.raises(ValueError, match="not known"):
        prediction_target("eps", sd, x, x, 0)
