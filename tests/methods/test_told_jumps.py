"""Jumps whose end the network knows: how it depends on the end, laws that samplers keep, chains on a flow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from diffusers import schedulers
from diffusers.schedulers import scheduling_tcd
from flow_map_helpers import LAW as PLANE
from flow_map_helpers import MapNetwork, teacher_network
from method_helpers import SD, SD_BETAS, batch_of, denoiser_of, f64, spatial
from trajectory_helpers import (
    FLOW,
    LAW,
    MU,
    JumpNet,
    S,
    coefficients,
    data,
    exact_map,
    gaussian_denoiser,
    levels,
    orders,
)

from fastdiff.diffusion import Gaussian
from fastdiff.methods import CTM, TCD, CTMConfig, MeanFlow, MeanFlowConfig, TCDConfig
from fastdiff.methods.progressive import implied_clean
from fastdiff.models.sampler import SamplerSpec, sample


def predictor(method, denoiser) -> Callable:
    """The student as `sample` asks it, told what the method tells it."""

    def predict(x, t, s):
        inputs = method.sampling_inputs(denoiser, len(x), x.device) | method.step_inputs(denoiser, t, s)
        return denoiser(x, t, batch_of(len(x), x.shape[1]).cond, "student", **inputs)

    return predict


# The clean prediction of a jump


def test_a_jump_depends_strongly_on_its_end():
    """The slope of the clean prediction whose jump from t = 999 is exact, for data of unit variance."""
    unit, x, t = Gaussian(f64([0.0]), f64([[1.0]])), f64([[0.0], [1.0]]), torch.full((2,), 999.0)
    for end, golden in {0: 0.97313, 250: 0.54686, 500: 0.31516, 750: 0.15375, 990: 0.07016}.items():
        s = torch.full((2,), float(end))
        g = implied_clean(x, t, unit.flow_map(x, t, s, SD), s, SD)
        assert (g[1] - g[0]).item() == pytest.approx(golden, abs=6e-6)


def test_the_clean_prediction_of_ever_shorter_jumps_comes_to_the_denoiser_at_first_order():
    x, t, errors = data(8), f64([0.2, 0.9]).repeat(4), []
    for h in (0.04, 0.02, 0.01, 0.005):
        g = implied_clean(x, t, LAW.flow_map(x, t, t - h, FLOW), t - h, FLOW)
        errors.append((g - LAW.denoise(x, t, FLOW)).square().mean().item())
    assert orders(errors) == pytest.approx([1] * 3, abs=0.15)
    assert orders(errors)[-1] == pytest.approx(1, abs=0.02)


# Laws


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_exact_maps_keep_the_law_at_any_eta(eta, steps):
    """Covariances are propagated through the affine sampler: no draws, no tolerance for luck."""
    ctm = CTM(CTMConfig(num_inference_steps=steps, eta=eta))
    spec, constant_end = ctm.sampler(), steps == 1 or eta == 1
    predict = predictor(ctm, gaussian_denoiser(student=JumpNet(exact_map())))
    (at, st), last = levels(999), -1 if constant_end or not eta else 0
    scale, law_sd = (at**2 * S + st**2).sqrt(), (levels(last)[0] ** 2 * S + levels(last)[1] ** 2).sqrt()

    def make(z, draws):
        return sample(spec, predict, at * MU + scale * z, lambda k: draws[k], SD)

    tolerance = 1e-6 if constant_end else 1e-9  # LCM's boundary weights are not exactly (0, 1)
    slope, noise, constant = coefficients(make, steps - 1)
    assert constant == pytest.approx((levels(last)[0] * MU).item(), abs=tolerance)
    assert (slope**2 + sum(b * b for b in noise)) ** 0.5 == pytest.approx(law_sd.item(), abs=tolerance)
    assert spec.tells_end != constant_end
    assert (max(map(abs, noise), default=0) > 0.01) == (eta > 0 and steps > 1)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("steps", [2, 4])
def test_stock_tcd_keeps_the_law_with_the_map_of_each_end(eta, steps, monkeypatch):
    """Down to index 0, with draws of ours in place of the scheduler's."""
    spec = TCD(TCDConfig(num_inference_steps=steps, eta=eta)).sampler()
    scheduler = spec.build_scheduler(SD_BETAS, "epsilon")
    net = JumpNet(exact_map(), lambda index: torch.floor((1 - eta) * (index - 1000 // steps).clamp_min(0)))
    at, st = levels(999)

    def make(z, draws):
        given = iter(draws)
        monkeypatch.setattr(scheduling_tcd, "randn_tensor", lambda shape, **_: next(given))
        scheduler.set_timesteps(steps)
        x = at * MU + (at**2 * S + st**2).sqrt() * z
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t.expand(len(x)), None), t, x, eta=spec.eta).prev_sample
        return x

    slope, noise, constant = coefficients(make, steps - 1)
    (a0, s0) = levels(0)
    assert constant == pytest.approx((a0 * MU).item(), abs=1e-5)
    assert slope**2 + sum(b * b for b in noise) == pytest.approx((a0**2 * S + s0**2).item(), abs=1e-5)
    assert min(map(abs, noise)) > 0.01


def test_samplers_that_tell_have_no_stock_scheduler_and_the_others_have():
    with pytest.raises(ValueError, match="where each step ends"):
        CTM(CTMConfig(eta=0.3)).sampler().build_scheduler(SD_BETAS, "epsilon")
    stock = TCD(TCDConfig()).sampler().build_scheduler(SD_BETAS, "epsilon")
    assert type(stock).__name__ == "TCDScheduler" and TCD(TCDConfig()).sampler().eta == 0.3
    stock.set_timesteps(4)
    assert stock.timesteps.tolist() == [999, 749, 499, 249]
    assert type(TCD(TCDConfig(eta=0.0)).sampler().build_scheduler(SD_BETAS, "epsilon")).__name__ == "DDIMScheduler"


# Chains


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("cls", [CTM, MeanFlow])
def test_exact_jumps_on_a_flow_add_up_to_all_of_it_here_and_in_stock_schedulers(cls, steps):
    if cls is CTM:
        method = CTM(CTMConfig(num_inference_steps=steps))
    else:
        times = SamplerSpec.trailing("ddim", steps).timesteps
        method = MeanFlow(MeanFlowConfig(timesteps=times, sampling="jump"))
    student = MapNetwork(FLOW, "flow")
    predict = predictor(method, denoiser_of(teacher_network("flow"), FLOW, "flow", student=student))
    z = spatial(torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    expected, spec = PLANE.flow_map(z, 1.0, 0.0, FLOW), method.sampler()
    torch.testing.assert_close(sample(spec, predict, z, None, FLOW), expected, rtol=0, atol=1e-9)

    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}
    exported = dataclasses.replace(spec, tells_end=False).build_scheduler(config, "flow")
    flow_maps = getattr(schedulers, "FlowMapEulerDiscreteScheduler", None)  # of newer diffusers
    for scheduler in [exported, *([flow_maps()] if flow_maps else [])]:
        scheduler.set_timesteps(steps)
        assert (scheduler.timesteps / 1000).tolist() == pytest.approx(spec.schedule_times(FLOW), abs=1e-6)
        x = z
        for t, s in pairwise([*scheduler.timesteps, torch.tensor(0.0)]):
            velocity = predict(x, *((time.double() / 1000).expand(len(x)) for time in (t, s))).native
            x = scheduler.step(velocity, t, x).prev_sample.double()
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)
