"""Which times to train at: each sampler maps uniform draws in [0, 1) to times, so that randomness is injected.

``sampler.times(u)`` keeps the shape of ``u`` and grows with it. Real-valued times keep its dtype (float32 or float64);
table indices come as int64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from .tensors import DeviceTable

__all__ = [
    "Grid",
    "Karras",
    "LogitNormal",
    "Pairs",
    "Segments",
    "Shifted",
    "TimeSampler",
    "UShaped",
    "Uniform",
    "UniformIndex",
]


class TimeSampler(Protocol):
    """What a method asks of a time distribution."""

    def times(self, u: Tensor) -> Tensor:
        """Times at the quantiles ``u`` (any shape, in [0, 1))."""
        ...


@dataclass(frozen=True)
class Uniform:
    """Uniform on [low, high)."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        _check(self.low < self.high, f"uniform times from {self.low} to {self.high}: low must be below high")

    def times(self, u: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * u


@dataclass(frozen=True)
class UniformIndex:
    """Uniform on the integers low, ..., high, both included (DMD2 trains its generator on 20..980 of 1000)."""

    low: int
    high: int

    def __post_init__(self) -> None:
        _check(0 <= self.low <= self.high, f"indices from {self.low} to {self.high}: give 0 <= low <= high")

    def times(self, u: Tensor) -> Tensor:
        return self.low + _pick(u, self.high - self.low + 1)


@dataclass(frozen=True)
class LogitNormal:
    """sigmoid(mean + std n), n standard normal, on (0, 1) (Esser et al., arXiv 2403.03206)."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _check(self.std > 0, f"logit-normal std is {self.std}: it must be positive")

    def times(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


@dataclass(frozen=True)
class Shifted:
    """Times in [0, 1] of another sampler, pushed towards noise: ``k t / (1 + (k - 1) t)``."""

    base: TimeSampler
    shift: float

    def __post_init__(self) -> None:
        _check(self.shift > 0, f"time shift is {self.shift}: it must be positive (1 means none)")

    def times(self, u: Tensor) -> Tensor:
        t = self.base.times(u)
        return self.shift * t / (1 + (self.shift - 1) * t)


@dataclass(frozen=True)
class UShaped:
    """Density proportional to cosh(a (t - 1/2)) on [0, 1]: both ends more often (a = 4 in arXiv 2405.20320)."""

    a: float = 4.0

    def __post_init__(self) -> None:
        _check(self.a > 0, f"the U-shape parameter is {self.a}: it must be positive (0 would be uniform)")

    def times(self, u: Tensor) -> Tensor:
        return 0.5 + torch.asinh((2 * u - 1) * math.sinh(self.a / 2)) / self.a


@dataclass(frozen=True)
class Karras:
    """Noise levels of EDM, uniform in sigma^(1/rho) from sigma_min to sigma_max (arXiv 2206.00364)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        _check(
            0 < self.sigma_min < self.sigma_max and self.rho > 0,
            f"levels from {self.sigma_min} to {self.sigma_max} with rho {self.rho}: need 0 < min < max, 0 < rho",
        )

    def times(self, u: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + (high - low) * u) ** self.rho


@dataclass(frozen=True)
class Grid:
    """One of the listed times, all equally likely; int64 if every one of them is an integer."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        _check(len(self.values) > 0, "a grid without times: give at least one")

    def times(self, u: Tensor) -> Tensor:
        return self._table.on(u.device, self._dtype(u))[_pick(u, len(self.values))]

    def _dtype(self, u: Tensor) -> torch.dtype:
        return torch.int64 if self._table.host.dtype == torch.int64 else u.dtype

    @cached_property
    def _table(self) -> DeviceTable:
        integers = all(isinstance(value, int) for value in self.values)
        return DeviceTable(torch.tensor(self.values, dtype=torch.int64 if integers else torch.float64))


@dataclass(frozen=True)
class Pairs:
    """One of the listed (from, to) pairs of table indices, all equally likely: a solver step to distil."""

    steps: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        _check(len(self.steps) > 0, "a grid without steps: give at least one (from, to) pair")
        _check(all(t > s for t, s in self.steps), f"steps {self.steps}: each must go to a cleaner (smaller) index")

    def times(self, u: Tensor) -> Tensor:
        return self.pairs(u)[0]

    def pairs(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(from, to), two int64 tensors shaped like ``u``."""
        return self._table.on(u.device)[_pick(u, len(self.steps))].unbind(-1)

    @cached_property
    def _table(self) -> DeviceTable:
        return DeviceTable(torch.tensor(self.steps, dtype=torch.int64))


@dataclass(frozen=True)
class Segments:
    """Consecutive time intervals between rising ``edges``, all equally likely, uniform inside each."""

    edges: tuple[float, ...]

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.edges, self.edges[1:]))
        _check(len(self.edges) >= 2 and rising, f"segment edges {self.edges}: give at least two, strictly rising")

    def times(self, u: Tensor) -> Tensor:
        edges, place = self._table.on(u.device, u.dtype), u * (len(self.edges) - 1)
        index = _pick(u, len(self.edges) - 1)
        return torch.lerp(edges[index], edges[index + 1], place - index)

    def ends(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(lower, upper) edge of the segment that holds each ``t`` (lower < t <= upper, the first edge included)."""
        edges = self._table.on(t.device, t.dtype)
        index = torch.searchsorted(edges, t.contiguous()).clamp(1, len(self.edges) - 1)
        return edges[index - 1], edges[index]

    @cached_property
    def _table(self) -> DeviceTable:
        return DeviceTable(torch.tensor(self.edges, dtype=torch.float64))


def _pick(u: Tensor, count: int) -> Tensor:
    """The index of 0..count-1 that each uniform draw stands for."""
    return (u * count).long().clamp_max(count - 1)  # the quantile 1 belongs to the last


def _check(valid: bool, message: str) -> None:
    if not valid:
        raise ValueError(message)
