import math
from itertools import pairwise

import pytest
import torch

from fastdiff.diffusion import (
    CLEAN_INDEX,
    FlowSchedule,
    Gaussian,
    Prediction,
    Terminal,
    TrigSchedule,
    ddim_eta,
    er_sde,
    euler,
    heun,
    heun_flow,
    jump,
    lcm_grid,
    pf_velocity,
    renoise,
    trailing_grid,
)


def predictions(schedule, t, randn):
    return Prediction.from_x0(randn(len(t), 3), randn(len(t), 3), t, schedule)


def test_jump_is_the_trajectory_form_and_euler_in_kappa(process, randn):
    schedule, times = process
    s, t = times[:-1], times[1:]
    p = predictions(schedule, t, randn)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule.levels(s, p.x_t), p.levels
    trajectory = sigma_s / sigma_t * p.x_t + (alpha_s - alpha_t * sigma_s / sigma_t) * p.x0
    torch.testing.assert_close(jump(p, s), trajectory, rtol=1e-12, atol=1e-12)
    y = p.x_t / alpha_t + (sigma_s / alpha_s - sigma_t / alpha_t) * p.eps
    torch.testing.assert_close(jump(p, s), alpha_s * y, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(jump(p, t), p.x_t, rtol=1e-12, atol=1e-12)  # a jump to where it is


def test_flow_jump_is_euler_on_the_velocity(randn):
    t, s = torch.tensor([0.4, 1.0], dtype=torch.float64), torch.tensor([0.1, 0.75], dtype=torch.float64)
    p = predictions(FlowSchedule(), t, randn)
    expected = p.x_t + (s - t)[:, None] * p.flow
    torch.testing.assert_close(jump(p, s), expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(euler(p, s), expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(pf_velocity(p), p.flow, rtol=1e-13, atol=1e-13)


def test_velocity_is_the_derivative_of_the_jump(process, randn):
    """J(x, t -> s) = alpha_s x0 + sigma_s eps, so d/ds at s = t is the velocity."""
    schedule, times = process
    p = predictions(schedule, times, randn)
    _, slope = torch.func.jvp(lambda s: jump(p, s), (times,), (torch.ones_like(times),))
    torch.testing.assert_close(pf_velocity(p), slope, rtol=1e-11, atol=1e-11)


def test_jump_to_the_end(sd, randn):
    p = predictions(sd, torch.tensor([249.0, 999.0], dtype=torch.float64), randn)
    assert torch.equal(jump(p, Terminal.CLEAN), p.x0)
    torch.testing.assert_close(jump(p, Terminal.INDEX0), jump(p, 0), rtol=0, atol=0)
    mixed = jump(p, torch.tensor([CLEAN_INDEX, 0]))
    torch.testing.assert_close(mixed[0], p.x0[0], rtol=0, atol=0)
    torch.testing.assert_close(mixed[1], jump(p, 0)[1], rtol=0, atol=0)
    noise = randn(2, 3)
    torch.testing.assert_close(ddim_eta(p, Terminal.CLEAN, 1.0, noise), p.x0, rtol=0, atol=0)
    torch.testing.assert_close(
        renoise(p.x0, Terminal.CLEAN, 749, noise, sd), sd.add_noise(p.x0, noise, 749), rtol=1e-14, atol=1e-14
    )


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_eta_has_the_published_form(process, eta, randn):
    schedule, times = process
    s, t = times[:-1], times[1:]
    p, z = predictions(schedule, t, randn), randn(4, 3)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule.levels(s, z), p.levels
    fresh = eta**2 * (sigma_s / sigma_t) ** 2 * (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2)
    expected = alpha_s * p.x0 + (sigma_s**2 - fresh).sqrt() * p.eps + fresh.sqrt() * z
    torch.testing.assert_close(ddim_eta(p, s, eta, z), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("eta", [0.2, 0.5, 1.0])  # the form below cancels at 0, where the step is a jump
def test_er_sde_has_the_published_form(process, eta, randn):
    schedule, times = process
    s, t = times[:-1], times[1:]
    p, z = predictions(schedule, t, randn), randn(4, 3)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule.levels(s, z), p.levels
    kappa_s, kappa_t = sigma_s / alpha_s, sigma_t / alpha_t
    r = (kappa_s / kappa_t) ** (1 + eta**2)
    noise = (kappa_s**2 - kappa_t**2 * r**2).clamp_min(0).sqrt()
    expected = alpha_s / alpha_t * r * p.x_t + alpha_s * (1 - r) * p.x0 + alpha_s * noise * z
    torch.testing.assert_close(er_sde(p, s, eta, z), expected, rtol=1e-10, atol=1e-10)


def test_stochastic_steps_meet_at_the_ends(process, randn):
    schedule, times = process
    p, z = predictions(schedule, times[1:], randn), randn(4, 3)
    for step in (ddim_eta, er_sde):
        torch.testing.assert_close(step(p, times[:-1], 0.0, z), jump(p, times[:-1]), rtol=1e-12, atol=1e-12)
    one = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(ddim_eta(p, times[:-1], one, z), er_sde(p, times[:-1], 1.0, z), rtol=1e-12, atol=1e-12)


def test_stochastic_steps_from_pure_noise_are_finite(zero_snr, randn):
    x, z = randn(2, 3), randn(2, 3)
    for p in (
        Prediction(randn(2, 3), "flow", x, torch.ones(2), FlowSchedule()),
        Prediction(randn(2, 3), "v_prediction", x, torch.tensor([999, 999]), zero_snr),
    ):
        s = 0.5 if isinstance(p.schedule, FlowSchedule) else 499
        alpha, sigma = p.schedule.levels(s, x)
        expected = alpha * p.x0 + sigma * z  # nothing of x survives at eta = 1, by kappa_s / kappa_t = 0
        torch.testing.assert_close(er_sde(p, s, 1.0, z), expected, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(ddim_eta(p, s, 1.0, z), expected, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(er_sde(p, s, 0.0, z), jump(p, s), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("step", [ddim_eta, er_sde])
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_stochastic_steps_preserve_white_data_to_first_order(step, eta):
    """Exact denoiser of N(0, I) on TrigFlow: the noisy law is N(0, I) at all times, so a step adds O(h^2) variance."""
    schedule, teacher = TrigSchedule(), Gaussian(torch.zeros(1), torch.eye(1))
    x = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    z = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    defects = []
    for h in (0.1, 0.05, 0.025):
        p = Prediction.from_x0(teacher.denoise(x, 0.8, schedule), x, 0.8, schedule)
        kept, fresh = step(p, 0.8 - h, eta, z)[:, 0]
        defects.append((kept**2 + fresh**2 - 1).abs().item())
    slopes = [math.log2(a / b) for a, b in pairwise(defects)]
    assert all(abs(slope - 2) < 0.3 for slope in slopes)


@pytest.mark.parametrize("schedule", [FlowSchedule(), TrigSchedule()], ids=["flow", "trig"])
@pytest.mark.parametrize(
    ("step", "order"), [("jump", 2), ("heun", 3), ("heun_flow", 3)], ids=["jump", "heun", "heun_flow"]
)
def test_local_orders_against_the_exact_flow_map(schedule, step, order, randn):
    teacher = Gaussian(torch.tensor([1.3, -0.4]), torch.tensor([[0.49, 0.1], [0.1, 0.3]], dtype=torch.float64))
    x, t = randn(6, 2), torch.full((6,), 0.5, dtype=torch.float64)

    def predict(x, t):
        return Prediction.from_x0(teacher.denoise(x, t, schedule), x, t, schedule)

    errors = []
    for h in (0.1, 0.05, 0.025, 0.0125):
        s = t - h
        if step == "jump":
            landed = jump(predict(x, t), s)
        else:
            landed = {"heun": heun, "heun_flow": heun_flow}[step](predict, x, t, s)
        errors.append((landed - teacher.flow_map(x, t, s, schedule)).norm().item())
    slope = math.log2(errors[-2] / errors[-1])
    assert abs(slope - order) < 0.1


def test_heun_flow_is_heun_on_the_velocity_also_from_pure_noise(randn):
    schedule = FlowSchedule()
    teacher = Gaussian(torch.tensor([1.3]), torch.tensor([[0.49]]))
    x, t, s = randn(4, 1), torch.ones(4, dtype=torch.float64), torch.full((4,), 0.6, dtype=torch.float64)

    def predict(x, t):
        return Prediction.from_x0(teacher.denoise(x, t, schedule), x, t, schedule)

    first = predict(x, t).flow
    second = predict(x + (s - t)[:, None] * first, s).flow
    expected = x + (s - t)[:, None] * (first + second) / 2
    torch.testing.assert_close(heun_flow(predict, x, t, s), expected, rtol=1e-13, atol=1e-13)


def test_trailing_grid():
    assert trailing_grid(4) == ((999, 749), (749, 499), (499, 249), (249, CLEAN_INDEX))
    assert [t for t, _ in trailing_grid(8)] == [999, 874, 749, 624, 499, 374, 249, 124]
    assert trailing_grid(1, terminal=Terminal.INDEX0) == ((999, 0),)
    assert trailing_grid(1, T=400) == ((399, CLEAN_INDEX),)
    for n in range(1, 51):  # every step ends where the next begins, also where n does not divide 1000
        grid = trailing_grid(n)
        assert all(a[1] == b[0] for a, b in pairwise(grid)) and all(t > s for t, s in grid)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 10, 20, 25, 30, 40, 50])
def test_trailing_grid_is_that_of_diffusers(n, sd_config):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**sd_config, timestep_spacing="trailing")
    scheduler.set_timesteps(n)
    assert [t for t, _ in trailing_grid(n)] == scheduler.timesteps.tolist()


def test_lcm_grid():
    grid = lcm_grid()
    assert len(grid) == 50 and grid[:3] == ((19, 0), (39, 19), (59, 39)) and grid[-1] == (999, 979)
    assert lcm_grid(terminal=Terminal.CLEAN)[0] == (19, CLEAN_INDEX)
    assert lcm_grid(1000, terminal=Terminal.CLEAN)[:2] == ((0, CLEAN_INDEX), (1, 0))


@pytest.mark.parametrize("bad", [lambda: trailing_grid(0), lambda: trailing_grid(1001), lambda: lcm_grid(30)])
def test_bad_grids(bad):
    with pytest.raises(ValueError, match="give"):
        bad()
    with pytest.raises(ValueError, match="at most 500"):
        lcm_grid(1000)
