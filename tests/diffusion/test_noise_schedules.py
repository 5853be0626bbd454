import math

import pytest
import torch

from fastdiff.diffusion import (
    CLEAN_INDEX,
    EDMSchedule,
    FlowSchedule,
    Prediction,
    Terminal,
    TrigSchedule,
    VPSchedule,
    broadcast_to,
    rewrap,
)

# index: abar, alpha, sigma, sigma/alpha of Stable Diffusion 1.x and XL, to the digits printed
SD_TABLE = {
    20: (0.981314, 0.99061, 0.13670, 0.1380),
    249: (0.675432, 0.82185, 0.56971, 0.6932),
    399: (0.426086, 0.65275, 0.75757, 1.1606),
    499: (0.277670, 0.52694, 0.84990, 1.6129),
    625: (0.137769, 0.37117, 0.92856, 2.5017),
    749: (0.056623, 0.23796, 0.97128, 4.0817),
    979: (0.005913, 0.07689, 0.99704, 12.966),
    999: (0.004660, 0.06826, 0.99767, 14.615),
}


@pytest.mark.parametrize("index", SD_TABLE)
def test_stable_diffusion_constants(sd, index):
    abar, alpha, sigma, kappa = SD_TABLE[index]
    t = torch.tensor(index, dtype=torch.float64)
    assert abs(sd.alphas_cumprod[index].item() - abar) < 5.1e-7
    assert abs(sd.alpha(t).item() - alpha) < 5.1e-6
    assert abs(sd.sigma(t).item() - sigma) < 5.1e-6
    assert abs(sd.kappa(t).item() - kappa) < (5.1e-5 if kappa < 10 else 5.1e-4)


def test_ends_of_the_stable_diffusion_table(sd):
    assert abs(sd.alpha(999).item() - 0.0682649) < 5e-8
    assert abs(sd.sigma(999).item() - 0.9976672) < 5e-8
    assert abs(sd.kappa(999).item() - 14.6146) < 5e-5
    assert abs(sd.alpha(0).item() - 0.999575) < 5e-7
    assert abs(sd.sigma(0).item() - 0.029155) < 5e-7
    assert (sd.t_min, sd.t_max) == (0.0, 999.0)


def test_vp_is_exact_at_integers_and_log_linear_between(sd):
    t = torch.arange(1000, dtype=torch.float64)
    torch.testing.assert_close(sd.alpha(t), sd.alphas_cumprod.sqrt(), rtol=1e-15, atol=0)
    torch.testing.assert_close(sd.sigma(t), (1 - sd.alphas_cumprod).sqrt(), rtol=1e-15, atol=0)
    between = sd.kappa(t[:-1] + 0.25)
    torch.testing.assert_close(between, sd.kappa(t[:-1]) ** 0.75 * sd.kappa(t[1:]) ** 0.25, rtol=1e-13, atol=0)
    torch.testing.assert_close(sd.alpha(t + 0.3) ** 2 + sd.sigma(t + 0.3) ** 2, torch.ones_like(t), rtol=1e-14, atol=0)


def test_derivatives_are_those_of_autograd(process):
    schedule, times = process
    for value, slope in ((schedule.alpha, schedule.d_alpha), (schedule.sigma, schedule.d_sigma)):
        t = times.clone().requires_grad_(True)
        total = value(t).sum()
        expected = torch.autograd.grad(total, t)[0] if total.requires_grad else torch.zeros_like(t)  # EDM's alpha
        torch.testing.assert_close(slope(times), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("short", [False, True])
def test_derivatives_on_the_linear_pieces(zero_snr, short):
    """Both end pieces; on a short table each one, taken beyond its own interval, would be a root of a negative."""
    schedule = VPSchedule([0.5, 0.4, 0.3, 0.0]) if short else zero_snr
    last = schedule.t_max
    times = torch.tensor([-1.0, -0.5, 0.0, last / 2, last - 1, last - 0.5, last], dtype=torch.float64)
    for value, slope in ((schedule.alpha, schedule.d_alpha), (schedule.sigma, schedule.d_sigma)):
        t = times.clone().requires_grad_(True)
        (expected,) = torch.autograd.grad(value(t).sum(), t)
        torch.testing.assert_close(slope(times), expected, rtol=1e-12, atol=1e-16)


def test_kappa_grows_and_time_of_kappa_inverts_it(process):
    schedule, times = process
    kappa = schedule.kappa(times)
    assert (kappa.diff() > 0).all()
    torch.testing.assert_close(schedule.time_of_kappa(kappa), times, rtol=1e-11, atol=1e-11)


def test_time_of_kappa_is_clamped_and_takes_infinity(sd, zero_snr):
    ends = torch.tensor([0.0, math.inf], dtype=torch.float64)
    assert sd.time_of_kappa(ends).tolist() == [0.0, 999.0]
    assert zero_snr.time_of_kappa(ends).tolist() == [0.0, 999.0]
    assert FlowSchedule().time_of_kappa(ends).tolist() == [0.0, 1.0]
    assert EDMSchedule(0.002, 80).time_of_kappa(ends).tolist() == [0.002, 80.0]
    assert TrigSchedule().time_of_kappa(ends).tolist() == [0.0, math.pi / 2]


def test_zero_terminal_snr_is_exact_and_finite(zero_snr, randn):
    t = torch.tensor([0.0, 997.3, 998.0, 998.5, 999.0], dtype=torch.float64, requires_grad=True)
    alpha, sigma = zero_snr.alpha(t), zero_snr.sigma(t)
    assert (alpha[-1].item(), sigma[-1].item()) == (0.0, 1.0)
    assert (alpha.diff() < 0).all() and (sigma.diff() > 0).all()
    torch.testing.assert_close(alpha[3], alpha[2] / 2, rtol=1e-14, atol=0)
    torch.testing.assert_close(zero_snr.time_of_kappa(zero_snr.kappa(t)), t, rtol=1e-11, atol=1e-9)
    (gradient,) = torch.autograd.grad((alpha + sigma).sum(), t)
    assert gradient.isfinite().all()
    x = randn(5, 3)
    prediction = Prediction(randn(5, 3), "v_prediction", x, t.detach(), zero_snr)
    for value in (prediction.x0, prediction.eps, prediction.flow, prediction.score):
        assert value.isfinite().all()
    last = torch.full((5,), 999)
    torch.testing.assert_close(zero_snr.add_noise(x, prediction.native, last), prediction.native, rtol=0, atol=0)
    torch.testing.assert_close(zero_snr.transition(x, last, last, randn(5, 3)), x, rtol=0, atol=0)
    assert zero_snr.transition(x, torch.full((5,), 400), last, randn(5, 3)).isfinite().all()
    for moved, time in (rewrap(x, 1.0, FlowSchedule(), zero_snr), rewrap(x, 999, zero_snr, FlowSchedule())):
        torch.testing.assert_close(moved, x, rtol=0, atol=0)
        assert time.item() in (999.0, 1.0)


def test_below_index_zero_lies_the_clean_end(sd, randn):
    t = torch.tensor([CLEAN_INDEX, -0.5, 0], dtype=torch.float64)
    sigma = sd.sigma(t)
    assert (sigma[0].item(), sd.alpha(t)[0].item()) == (0.0, 1.0)
    torch.testing.assert_close(sigma[1], sigma[2] / 2, rtol=1e-14, atol=0)
    x, eps = randn(4, 2), randn(4, 2)
    torch.testing.assert_close(sd.add_noise(x, eps, torch.tensor([CLEAN_INDEX] * 4)), x, rtol=0, atol=0)


def test_terminal_levels(sd, randn):
    x = randn(2, 3)
    assert [v.item() for v in sd.levels(Terminal.CLEAN, x)] == [1.0, 0.0]
    assert sd.levels(Terminal.INDEX0, x)[1].item() == sd.sigma(torch.tensor(0.0, dtype=torch.float64)).item()
    assert EDMSchedule(0.002, 80).levels(Terminal.INDEX0, x)[1].item() == 0.002


def test_precision_rules(sd):
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([5, 700])
    assert sd.alpha(index).dtype == torch.float32
    assert sd.alpha(index.double()).dtype == torch.float64
    assert sd.levels(index, x.bfloat16())[0].dtype == torch.float32
    assert sd.levels(index.float(), x.double())[0].dtype == torch.float64
    noisy = sd.add_noise(x.bfloat16(), x.bfloat16(), index)
    assert noisy.dtype == torch.bfloat16
    exact = sd.add_noise(x.bfloat16().double(), x.bfloat16().double(), index)
    torch.testing.assert_close(noisy, exact.bfloat16(), rtol=0, atol=0)  # rounded once, not at every operation
    assert rewrap(x.bfloat16(), index, sd, FlowSchedule())[0].dtype == torch.float32
    torch.testing.assert_close(sd.sigma(index).double(), sd.sigma(index.double()), rtol=3e-7, atol=0)


def test_a_table_first_used_while_sampling_serves_training(sd_config):
    schedule = VPSchedule.from_scheduler_config(sd_config)
    with torch.inference_mode():
        schedule.add_noise(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([3]))
        schedule.time_of_kappa(torch.tensor([1.0]))
    x = torch.ones(1, 2, requires_grad=True)
    kappa = torch.tensor([1.0], requires_grad=True)
    (schedule.add_noise(x, x, torch.tensor([3])).sum() + schedule.time_of_kappa(kappa).sum()).backward()
    assert x.grad is not None and kappa.grad is not None


def test_nothing_waits_for_the_device(process):
    schedule, times = process
    x, t = torch.empty(5, 3, device="meta"), times.float().to("meta")  # reading a value from meta would raise
    assert schedule.add_noise(x, x, t).is_meta
    assert schedule.transition(x, t, t, x).is_meta
    assert rewrap(x, t, schedule, FlowSchedule())[0].is_meta
    assert rewrap(x, t, FlowSchedule(), schedule)[0].is_meta
    assert schedule.d_alpha(t).is_meta and schedule.d_sigma(t).is_meta and schedule.network_time(t).is_meta


def test_times_per_frame(sd, randn):
    x, eps = randn(2, 3, 4, 5, 5), randn(2, 3, 4, 5, 5)
    t = torch.tensor([[10, 500, 900], [0, 1, 999]])
    noisy = sd.add_noise(x, eps, t)
    for b in range(2):
        for f in range(3):
            expected = sd.add_noise(x[b, f], eps[b, f], t[b, f])
            torch.testing.assert_close(noisy[b, f], expected, rtol=1e-14, atol=0)
    channels_first = sd.add_noise(x.transpose(1, 2), eps.transpose(1, 2), t[:, None, :])
    torch.testing.assert_close(channels_first.transpose(1, 2), noisy, rtol=0, atol=0)


def test_broadcast_refuses_what_does_not_line_up():
    assert broadcast_to(torch.ones(2), torch.ones(2, 3, 4)).shape == (2, 1, 1)
    for shape in ((3,), (2, 4), (2, 3, 4, 1)):
        with pytest.raises(ValueError, match="line up"):
            broadcast_to(torch.ones(shape), torch.ones(2, 3, 4))


def test_transition_keeps_the_marginals(process):
    """Covariance algebra: r^2 Var(x_s) + added variance = Var(x_t) for data of variance 0.49 and mean 1.3."""
    schedule, times = process
    s, t = times[:-1], times[1:]
    one, zero = torch.ones(4, 1, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)
    ratio, added = schedule.transition(one, s, t, zero)[:, 0], schedule.transition(zero, s, t, one)[:, 0]
    variance_s = schedule.alpha(s) ** 2 * 0.49 + schedule.sigma(s) ** 2
    variance_t = schedule.alpha(t) ** 2 * 0.49 + schedule.sigma(t) ** 2
    torch.testing.assert_close(ratio**2 * variance_s + added**2, variance_t, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ratio * schedule.alpha(s) * 1.3, schedule.alpha(t) * 1.3, rtol=1e-12, atol=0)


def test_transition_to_a_close_time_keeps_precision(sd):
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    added = sd.transition(zero, torch.tensor([500.0]), torch.tensor([500.01]), one)
    exact = sd.transition(zero.double(), torch.tensor([500.0]), torch.tensor([500.01]), one.double())
    torch.testing.assert_close(added.double(), exact, rtol=2e-2, atol=0)


def test_flow_shift():
    quarters = torch.tensor([1, 0.75, 0.5, 0.25], dtype=torch.float64)
    expected = torch.tensor([1, 0.9375, 5 / 6, 0.625], dtype=torch.float64)
    torch.testing.assert_close(FlowSchedule(5).shifted(quarters), expected, rtol=1e-14, atol=0)
    expected = torch.tensor([1, 0.9, 0.75, 0.5], dtype=torch.float64)
    torch.testing.assert_close(FlowSchedule(3).shifted(quarters), expected, rtol=1e-14, atol=0)


def test_network_times(sd):
    t = torch.tensor([0.5, 0.25], dtype=torch.float64)
    assert FlowSchedule().network_time(t).tolist() == [500.0, 250.0]
    assert TrigSchedule().network_time(t).tolist() == [0.5, 0.25]
    torch.testing.assert_close(EDMSchedule().network_time(t), torch.log(t) / 4)
    assert sd.network_time(torch.tensor([7, 999])).tolist() == [7.0, 999.0]


@pytest.mark.parametrize("target", [FlowSchedule(), TrigSchedule(), EDMSchedule(1e-4, 1e4)])
def test_time_maps_keep_clean_sample_and_noise(process, target, randn):
    source, times = process
    x0, eps = randn(5, 3), randn(5, 3)
    x = source.add_noise(x0, eps, times)
    moved, moved_times = rewrap(x, times, source, target)
    torch.testing.assert_close(moved, target.add_noise(x0, eps, moved_times), rtol=1e-12, atol=1e-12)
    back, back_times = rewrap(moved, moved_times, target, source)
    torch.testing.assert_close(back, x, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(back_times, times, rtol=1e-10, atol=1e-10)


def test_time_maps_of_stable_diffusion(sd, randn):
    flow, x = FlowSchedule(), randn(2, 3)
    ends = torch.tensor([0.0, 999.0], dtype=torch.float64)
    moved, t = rewrap(x, ends, sd, flow)
    torch.testing.assert_close(t, torch.tensor([0.02834, 0.93596], dtype=torch.float64), rtol=0, atol=5e-6)
    alpha, sigma = sd.levels(ends, x)
    torch.testing.assert_close(moved, x / (alpha + sigma), rtol=1e-14, atol=0)
    beyond, index = rewrap(x, torch.tensor([0.95, 1.0], dtype=torch.float64), flow, sd)  # noisier than the table
    assert index.tolist() == [999.0, 999.0]
    torch.testing.assert_close(beyond, x * (alpha + sigma)[1], rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    "build", [lambda: FlowSchedule(0.0), lambda: FlowSchedule(math.nan), lambda: EDMSchedule(2, 1)]
)
def test_bad_parameters(build):
    with pytest.raises(ValueError, match="give"):
        build()


@pytest.mark.parametrize(
    "table", [[0.9], [0.9, 0.95], [0.9, 0.0, 0.0], [0.9, math.nan], [1.2, 0.5], [0.9, -0.1], [[0.9]]]
)
def test_bad_tables(table):
    with pytest.raises(ValueError, match="alphas_cumprod"):
        VPSchedule(table)
