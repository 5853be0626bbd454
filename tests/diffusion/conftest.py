import math

import pytest
import torch

from fastdiff.diffusion import EDMSchedule, FlowSchedule, TrigSchedule, VPSchedule

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


@pytest.fixture(scope="session")
def sd_config():
    return dict(SD)


@pytest.fixture(scope="session")
def sd():
    return VPSchedule.from_scheduler_config(SD)


@pytest.fixture(scope="session")
def zero_snr():
    return VPSchedule.from_scheduler_config({**SD, "rescale_betas_zero_snr": True})


@pytest.fixture(params=["vp", "flow", "edm", "trig"])
def process(request):
    """(schedule, times inside it), one for each process."""
    times = torch.tensor([0.03, 0.2, 0.45, 0.7, 0.9], dtype=torch.float64)
    return {
        "vp": (VPSchedule.from_scheduler_config(SD), times * 999),
        "flow": (FlowSchedule(), times),
        "edm": (EDMSchedule(), 80 * times**3),
        "trig": (TrigSchedule(), times * math.pi / 2),
    }[request.param]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(20240607)


@pytest.fixture
def randn(generator):
    return lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)
