from itertools import pairwise
from typing import get_args

import pytest
import torch

from fastdiff.diffusion import (
    NULL_LABEL,
    Gaussian,
    GaussianMixture,
    KernelTeacher,
    Prediction,
    PredictionKind,
    heun,
    prediction_target,
)

GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 5, 5])


@pytest.fixture
def latents(randn):
    return randn(9, 2, 2, 2)


@pytest.fixture
def kernel(latents):
    return KernelTeacher(latents, GROUPS, 0.2)


def mixture_of(latents):
    n, d = len(latents), latents[0].numel()
    return GaussianMixture([1.0] * n, latents.flatten(1), 0.04 * torch.eye(d).double().expand(n, d, d))


def test_it_is_the_gaussian_mixture(kernel, latents, process, randn):
    schedule, times = process
    x = randn(5, 2, 2, 2)
    expected = mixture_of(latents).denoise(x, times, schedule)
    torch.testing.assert_close(kernel.denoise(x, times, schedule), expected, rtol=1e-9, atol=1e-9)
    null = torch.full((5,), NULL_LABEL)
    torch.testing.assert_close(kernel.denoise(x, times, schedule, null), expected, rtol=1e-9, atol=1e-9)
    for group in (0, 1, 5):
        expected = mixture_of(latents[group == GROUPS]).denoise(x, times, schedule)
        found = kernel.denoise(x, times, schedule, torch.full((5,), group))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_labels_are_per_sample(kernel, sd, randn):
    x, labels = randn(4, 2, 2, 2), torch.tensor([5, NULL_LABEL, 0, 1])
    t = torch.tensor([10, 300, 600, 999])
    whole = kernel.denoise(x, t, sd, labels)
    for i in range(4):
        alone = kernel.denoise(x[i : i + 1], t[i : i + 1], sd, labels[i : i + 1])
        torch.testing.assert_close(whole[i : i + 1], alone, rtol=1e-13, atol=1e-13)


def test_one_latent_is_a_gaussian(latents, process, randn):
    schedule, times = process
    one = KernelTeacher(latents[:1], GROUPS[:1], 0.2)
    x = randn(5, 2, 2, 2)
    expected = Gaussian(latents[0].flatten(), 0.04 * torch.eye(8).double()).denoise(x, times, schedule)
    torch.testing.assert_close(one.denoise(x, times, schedule), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", get_args(PredictionKind))
def test_every_prediction_type_says_the_same(kernel, process, kind, randn):
    schedule, times = process
    x = randn(5, 2, 2, 2)
    said = Prediction.from_x0(kernel.denoise(x, times, schedule), x, times, schedule)
    native = prediction_target(kind, schedule, said.x0, said.eps, times)
    torch.testing.assert_close(Prediction(native, kind, x, times, schedule).x0, said.x0, rtol=1e-10, atol=1e-10)


def test_limits_of_noise(kernel, latents, sd, zero_snr, randn):
    x = randn(9, 2, 2, 2)
    mean = latents.mean(0).expand(9, 2, 2, 2)
    torch.testing.assert_close(kernel.denoise(x, 999, zero_snr), mean, rtol=1e-12, atol=1e-12)  # nothing to see
    near = latents + 0.01 * x
    all_but_clean = torch.full((9,), -1 + 1e-6, dtype=torch.float64)
    torch.testing.assert_close(kernel.denoise(near, all_but_clean, sd), near, rtol=0, atol=1e-9)
    far = kernel.denoise(1e3 * x, torch.zeros(9), sd)
    assert far.isfinite().all()


def test_float32_is_accurate_at_low_noise(latents, sd, randn):
    """256 numbers a latent and close modes: expanding |x - a|^2 would lose the weights."""
    modes = 3 + 0.02 * randn(6, 16, 4, 4)
    kernel = KernelTeacher(modes, torch.zeros(6, dtype=torch.int64), 0.05)
    x = sd.add_noise(modes, randn(6, 16, 4, 4), 20)
    exact = kernel.denoise(x, torch.full((6,), 20), sd)
    rounded = kernel.denoise(x.float(), torch.full((6,), 20), sd)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), exact, rtol=0, atol=2e-5)


def test_no_waiting_for_the_device(kernel, sd):
    x = torch.empty(4, 2, 2, 2, device="meta")
    labels = torch.empty(4, dtype=torch.int64, device="meta")
    assert kernel.denoise(x, torch.empty(4, device="meta"), sd, labels).is_meta
    assert kernel.sample(x, torch.empty(4, device="meta"), labels).is_meta


def test_samples_come_from_the_group_with_equal_weights(kernel, latents):
    u = (torch.arange(12) + 0.5) / 12
    drawn = kernel.sample(torch.zeros(12, 2, 2, 2).double(), u, torch.zeros(12, dtype=torch.int64))
    torch.testing.assert_close(drawn, latents[:4].repeat_interleave(3, dim=0), rtol=0, atol=0)
    drawn = kernel.sample(torch.ones(12, 2, 2, 2).double(), u, torch.full((12,), 5))
    torch.testing.assert_close(drawn, latents[7:].repeat_interleave(6, dim=0) + 0.2, rtol=1e-13, atol=1e-13)
    last = kernel.sample(torch.zeros(1, 2, 2, 2).double(), torch.ones(1), torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close(last, latents[3:4], rtol=0, atol=0)  # the quantile 1 belongs to the last mode
    free = kernel.sample(torch.zeros(18, 2, 2, 2).double(), (torch.arange(18) + 0.5) / 18)
    torch.testing.assert_close(free, latents.repeat_interleave(2, dim=0), rtol=0, atol=0)


def test_modes_are_counted(kernel, latents):
    labels = GROUPS.clone()
    assert kernel.nearest_mode(latents + 0.01).tolist() == list(range(9))
    assert kernel.mode_coverage(latents, labels) == 1.0
    assert kernel.mode_total_variation(latents, labels) == pytest.approx(0, abs=1e-12)
    assert kernel.mode_total_variation(latents) == pytest.approx(0, abs=1e-12)
    collapsed = latents[[0, 0, 0, 0, 4, 4, 4, 7, 7]]
    assert kernel.mode_coverage(collapsed, labels) == pytest.approx(3 / 9)
    # each group keeps one of its m modes: 1 - 1/m, weighed by its samples
    expected = 4 / 9 * (1 - 1 / 4) + 3 / 9 * (1 - 1 / 3) + 2 / 9 * (1 - 1 / 2)
    assert kernel.mode_total_variation(collapsed, labels) == pytest.approx(expected)
    swapped = latents[[4, 5, 6, 4, 0, 1, 2, 7, 8]]  # groups 0 and 1 on each other's modes
    assert kernel.mode_total_variation(swapped, labels) == pytest.approx(7 / 9)
    assert kernel.mode_coverage(swapped, labels) == pytest.approx(2 / 9)
    only = labels == 5
    assert kernel.mode_coverage(latents[only], labels[only]) == 1.0


def test_a_perfect_sampler_meets_the_stated_floor(kernel, randn, generator):
    n, u = 3600, torch.rand(3600, generator=generator)
    drawn = kernel.sample(randn(n, 2, 2, 2), u)
    floor = (9 / (2 * torch.pi * n)) ** 0.5
    assert kernel.mode_total_variation(drawn) < 2.5 * floor


def test_the_ode_of_the_teacher_lands_on_its_modes(kernel, sd, randn):
    def predict(x, t):
        return Prediction.from_x0(kernel.denoise(x, t, sd, labels), x, t, sd)

    labels = torch.tensor([0, 1, 5]).repeat_interleave(20)
    x = sd.add_noise(torch.zeros(60, 2, 2, 2).double(), randn(60, 2, 2, 2), 999)
    grid = torch.arange(999, -1, -27, dtype=torch.float64)
    for t, s in pairwise(grid):
        x = heun(predict, x, t.expand(60), s.expand(60))
    modes = kernel.nearest_mode(x)
    assert (GROUPS[modes] == labels).double().mean() > 0.9
    assert kernel.mode_coverage(x, labels) > 0.8


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"groups": torch.zeros(3, dtype=torch.int64)}, "one group"),
        ({"groups": torch.full((9,), -1)}, "negative"),
        ({"bandwidth": 0.0}, "bandwidth"),
        ({"bandwidth": float("nan")}, "bandwidth"),
        ({"latents": torch.zeros(0, 2)}, "give"),
    ],
)
def test_errors(latents, change, named):
    with pytest.raises(ValueError, match=named):
        KernelTeacher(**{"latents": latents, "groups": GROUPS, "bandwidth": 0.2, **change})
