import math

import pytest
import torch

from fastdiff.diffusion import (
    Grid,
    Karras,
    LogitNormal,
    Pairs,
    Segments,
    Shifted,
    Uniform,
    UniformIndex,
    UShaped,
    lcm_grid,
)

MIDPOINTS = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000


def u(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_uniform():
    assert Uniform(0.02, 0.98).times(u(0.0, 0.5)).tolist() == [0.02, 0.5]


def test_uniform_index_covers_both_ends_equally():
    sampler = UniformIndex(20, 980)
    times = sampler.times((torch.arange(961 * 8, dtype=torch.float64) + 0.5) / (961 * 8))
    assert times.dtype == torch.int64
    values, counts = times.unique(return_counts=True)
    assert values.tolist() == list(range(20, 981)) and counts.unique().tolist() == [8]
    assert sampler.times(torch.tensor([1 - 2**-24, 1.0])).tolist() == [980, 980]


def test_logit_normal_quantiles():
    one_sigma = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    times = LogitNormal(-0.8, 1.6).times(u(1 - one_sigma, 0.5, one_sigma))
    expected = [1 / (1 + math.exp(-(-0.8 + 1.6 * k))) for k in (-1, 0, 1)]
    torch.testing.assert_close(times, u(*expected), rtol=1e-12, atol=0)
    assert LogitNormal().times(u(0.0)).item() == 0.0


def test_shifted():
    times = Shifted(Uniform(), 5.0).times(u(1.0, 0.75, 0.5, 0.25))
    torch.testing.assert_close(times, u(1, 0.9375, 5 / 6, 0.625), rtol=1e-14, atol=0)
    assert torch.equal(Shifted(LogitNormal(), 1.0).times(u(0.3)), LogitNormal().times(u(0.3)))


def test_u_shape_moments_and_density():
    times = UShaped(4.0).times(MIDPOINTS)
    assert abs(times.mean().item() - 0.5) < 1e-9
    assert abs(times.var().item() - 0.1157) < 5e-5
    # the density is the inverse slope of the quantile function: 2.075 at the ends, 0.551 in the middle
    slope = times.diff() * 1_000_000
    assert abs(1 / slope[0].item() - 2.075) < 1e-3 and abs(1 / slope[-1].item() - 2.075) < 1e-3
    assert abs(1 / slope[500_000].item() - 0.551) < 1e-3
    # distribution function of the density (C/2)(e^{at} + e^{a(1-t)}), C = a/(e^a - 1)
    t = times[::100_003]
    cdf = (torch.exp(4 * t) - 1 + math.exp(4) - torch.exp(4 * (1 - t))) / (2 * (math.exp(4) - 1))
    torch.testing.assert_close(cdf, MIDPOINTS[::100_003], rtol=1e-12, atol=1e-13)


def test_u_shape_flattens_to_uniform():
    torch.testing.assert_close(UShaped(1e-4).times(MIDPOINTS[::1000]), MIDPOINTS[::1000], rtol=1e-8, atol=1e-9)


def test_karras_is_the_published_grid():
    n, rho, low, high = 18, 7.0, 0.002, 80.0
    i = torch.arange(n, dtype=torch.float64)
    grid = (high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho  # noisiest first
    torch.testing.assert_close(Karras().times(1 - i / (n - 1)), grid, rtol=1e-12, atol=0)


def test_grid():
    times = Grid((999, 749, 499, 249)).times(u(0.0, 0.25, 0.49, 0.99))
    assert times.dtype == torch.int64 and times.tolist() == [999, 749, 749, 249]
    reals = Grid((1.0, 0.5)).times(torch.tensor([[0.1], [0.9]]))
    assert reals.dtype == torch.float32 and reals.tolist() == [[1.0], [0.5]]


def test_pairs_are_steps_of_a_grid():
    sampler = Pairs(lcm_grid())
    t, s = sampler.pairs(u(0.0, 0.03, 0.999))
    assert t.tolist() == [19, 39, 999] and s.tolist() == [0, 19, 979]
    assert torch.equal(sampler.times(u(0.0, 0.03, 0.999)), t)


def test_segments():
    sampler = Segments((0.0, 0.1, 1.0))
    torch.testing.assert_close(sampler.times(u(0.0, 0.25, 0.5, 0.75)), u(0, 0.05, 0.1, 0.55), rtol=1e-14, atol=0)
    low, high = sampler.ends(u(0.0, 0.05, 0.1, 0.55, 1.0))
    assert low.tolist() == [0, 0, 0, 0.1, 0.1] and high.tolist() == [0.1, 0.1, 0.1, 1, 1]


def test_times_grow_keep_shape_and_precision_and_wait_for_no_device():
    draws = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)).sort(dim=1).values
    for sampler in (
        Uniform(),
        UniformIndex(0, 999),
        LogitNormal(),
        Shifted(Uniform(), 3.0),
        UShaped(),
        Karras(),
        Grid((0.1, 0.5, 0.9)),
        Pairs(lcm_grid()),
        Segments((0.0, 0.3, 1.0)),
    ):
        times = sampler.times(draws)
        assert times.shape == (3, 4) and (times.diff(dim=1) >= 0).all()
        assert times.dtype in (torch.float32, torch.int64)
        assert sampler.times(draws.to("meta")).is_meta
        assert hash(sampler) == hash(sampler)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Uniform(1.0, 0.0),
        lambda: UniformIndex(5, 4),
        lambda: LogitNormal(0, 0),
        lambda: Shifted(Uniform(), 0),
        lambda: UShaped(0),
        lambda: Karras(1, 0.5),
        lambda: Grid(()),
        lambda: Pairs(((0, 19),)),
        lambda: Pairs(()),
        lambda: Segments((0.0,)),
        lambda: Segments((0.5, 0.1)),
    ],
)
def test_bad_parameters(build):
    with pytest.raises(ValueError):
        build()
