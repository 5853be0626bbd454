"""Schedules read from scheduler configs, compared with the tables that diffusers itself builds."""

import json

import pytest
import torch

from fastdiff.diffusion import EDMSchedule, FlowSchedule, TrigSchedule, VPSchedule, schedule_from_config

TABLES = [
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": True},
    {"trained_betas": [0.001, 0.01, 0.02, 0.3]},
    {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "num_train_timesteps": 250},
]


@pytest.mark.parametrize("settings", TABLES, ids=lambda c: "-".join(str(v)[:14] for v in c.values()))
def test_tables_are_those_of_diffusers(settings):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**settings)
    schedule = schedule_from_config(json.loads(scheduler.to_json_string()))
    assert isinstance(schedule, VPSchedule)
    expected = scheduler.alphas_cumprod.double()
    torch.testing.assert_close(schedule.alphas_cumprod, expected, rtol=2e-4, atol=1e-6)  # theirs is float32
    assert schedule.zero_terminal_snr == bool(settings.get("rescale_betas_zero_snr"))


def test_squared_cosine_betas_are_capped():
    table = schedule_from_config({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000}).alphas_cumprod
    betas = 1 - table[1:] / table[:-1]
    assert abs(betas[-1].item() - 0.999) < 1e-12 and betas[-2] < 0.999


def test_noising_is_that_of_diffusers(sd, sd_config):
    from diffusers import DDPMScheduler

    x, eps = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1)).chunk(2)
    for index in (0, 399, 999):
        theirs = DDPMScheduler(**sd_config).add_noise(x, eps, torch.tensor([index]))
        torch.testing.assert_close(sd.add_noise(x, eps, torch.tensor([index])), theirs, rtol=0, atol=2e-6)


def test_other_processes(sd_config):
    flow = schedule_from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    assert isinstance(flow, FlowSchedule) and flow.shift == 3.0
    solver = {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 5.0, **sd_config}
    assert schedule_from_config(solver).shift == 5.0
    assert isinstance(schedule_from_config({**solver, "use_flow_sigmas": False}), VPSchedule)
    edm = schedule_from_config({"_class_name": "EDMEulerScheduler", "sigma_min": 0.01, "sigma_max": 50.0})
    assert isinstance(edm, EDMSchedule) and (edm.t_min, edm.t_max) == (0.01, 50.0)
    assert isinstance(schedule_from_config({"_class_name": "SCMScheduler"}), TrigSchedule)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"beta_schedule": "sigmoid"}, "sigmoid"),
        ({"beta_schedule": None}, "beta_schedule"),
        ({"beta_start": None}, "beta_start"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"num_train_timesteps": None}, "num_train_timesteps"),
        ({"beta_end": -0.1}, "betas run"),
        ({"beta_end": float("nan")}, "betas run"),
        ({"trained_betas": [0.5, 1.5]}, "trained_betas"),
    ],
)
def test_what_is_wrong_is_named(sd_config, change, named):
    with pytest.raises(ValueError, match=named):
        VPSchedule.from_scheduler_config({**sd_config, "beta_schedule": "linear", **change})
    with pytest.raises(ValueError, match="beta_schedule"):
        schedule_from_config({})
