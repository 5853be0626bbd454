"""Solutions of the probability-flow ODE against closed forms, against stock diffusers, and backwards."""

from __future__ import annotations

import math

import pytest
import torch

from fastdiff.diffusion import (
    FlowSchedule,
    Gaussian,
    Prediction,
    Terminal,
    VPSchedule,
    invert,
    solve,
    teacher_times,
    trailing_grid,
)

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD = VPSchedule.from_scheduler_config(BETAS)
LAW = Gaussian(torch.tensor([1.3, -0.4]).double(), torch.tensor([[0.49, 0.1], [0.1, 0.3]]).double())


def exact(schedule):
    def predict(x, t):
        return Prediction.from_x0(LAW.denoise(x, t, schedule), x, t, schedule)

    return predict


def noise(rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_times_are_those_of_stock_trailing_grids():
    assert [t if t is Terminal.CLEAN else t.item() for t in teacher_times(SD, 4)] == [
        999,
        749,
        499,
        249,
        Terminal.CLEAN,
    ]
    assert [t.item() for t in teacher_times(FlowSchedule(), 4)[:-1]] == [1.0, 0.75, 0.5, 0.25]
    assert teacher_times(FlowSchedule(3.0), 2)[1].item() == pytest.approx(0.75)  # 3 / 2 / (1 + 2 / 2)


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_ddim_is_the_product_of_the_exact_teachers_factors(steps):
    factors = math.prod(LAW.ddim_factors(t, Terminal.CLEAN if s < 0 else s, SD) for t, s in trailing_grid(steps, 1000))
    basis = torch.linalg.eigh(LAW.cov)[1]
    z = noise()
    expected = LAW.mean + (z - SD.alpha(999.0) * LAW.mean) @ basis @ torch.diag(factors) @ basis.T
    torch.testing.assert_close(solve(exact(SD), z, teacher_times(SD, steps)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", ["heun", "dpm++"])
@pytest.mark.parametrize("schedule", [SD, FlowSchedule()], ids=["vp", "flow"])
def test_second_order_solvers_gain_a_factor_four_by_halving_the_step(schedule, solver):
    z = noise()
    start = schedule.time_of_index(999)
    errors = []
    for steps in (50, 100):
        # Ends at a noisy time: at the clean end the last step is first order for all of them.
        times = [schedule.time_of_index(1000 - 800 * n / steps - 1) for n in range(steps + 1)]
        truth = LAW.flow_map(z, start, times[-1], schedule)
        errors.append((solve(exact(schedule), z, [*times, times[-1]], solver) - truth).abs().max())
    first_order = (solve(exact(schedule), z, times) - truth).abs().max()
    assert 3 < errors[0] / errors[1] < 5.5
    assert errors[1] < first_order / 10


@pytest.mark.parametrize(("solver", "name"), [("ddim", "DDIMScheduler"), ("dpm++", "DPMSolverMultistepScheduler")])
@pytest.mark.parametrize("steps", [4, 20])
def test_solutions_are_those_of_stock_schedulers(solver, name, steps):
    import diffusers

    settings = {"clip_sample": False, "set_alpha_to_one": True} if solver == "ddim" else {}
    scheduler = getattr(diffusers, name)(**BETAS, timestep_spacing="trailing", **settings)
    scheduler.set_timesteps(steps)
    x = z = noise()
    for t in scheduler.timesteps:
        eps = exact(SD)(x, t.double().expand(len(x))).eps
        x = scheduler.step(eps, t, x).prev_sample
    assert scheduler.timesteps.tolist() == [int(t) for t in teacher_times(SD, steps)[:-1]]
    torch.testing.assert_close(solve(exact(SD), z, teacher_times(SD, steps), solver), x, rtol=0, atol=2e-5)


@pytest.mark.parametrize("schedule", [SD, FlowSchedule()], ids=["vp", "flow"])
def test_inversion_gives_the_noise_back(schedule):
    z, times = noise(), teacher_times(schedule, 20)
    x = solve(exact(schedule), z, times)
    assert (invert(exact(schedule), x, times, schedule, rounds=60) - z).abs().max() < 1e-9
    assert (invert(exact(schedule), x, times, schedule) - z).abs().max() < 5e-3


def test_one_row_may_be_elsewhere_than_another():
    z = noise(2)
    rows = [torch.tensor([999.0, 499.0]), torch.tensor([749.0, 249.0]), torch.tensor([499.0, -1.0])]
    both = solve(exact(SD), z, rows)
    alone = [solve(exact(SD), z[i : i + 1], [t[i : i + 1] for t in rows]) for i in range(2)]
    torch.testing.assert_close(both, torch.cat(alone), rtol=0, atol=1e-13)


def test_single_precision_stays_single():
    assert solve(exact(SD), noise().float(), teacher_times(SD, 3), "dpm++").dtype == torch.float32
