"""A teacher in closed form: the optimal denoiser, score and flow map of Gaussian data under any schedule.

All maps commute with the covariance, so everything is done per eigenvector: at a time with levels (alpha, sigma) the
noisy law has mean ``alpha mu`` and eigenvalues ``alpha^2 s + sigma^2``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .schedules import NoiseSchedule, Terminal
from .tensors import DeviceTable, compute_dtype

__all__ = ["Gaussian"]


class Gaussian:
    """Data N(mean, cov).

    Args:
        mean: (d,).
        cov: (d, d), symmetric and positive definite.

    Samples may have any shape (B, ...) with d numbers each. Times are scalars or (B,). Results are float32, or
    float64 for float64 samples.

    Raises:
        ValueError: if the shapes do not fit or the covariance is not symmetric and positive definite.
    """

    def __init__(self, mean: Tensor, cov: Tensor) -> None:
        mean, cov = mean.to(torch.float64).cpu(), cov.to(torch.float64).cpu()
        if mean.dim() != 1 or cov.shape != (len(mean), len(mean)):
            raise ValueError(f"mean of shape {tuple(mean.shape)}, covariance of {tuple(cov.shape)}: give (d,), (d, d)")
        eigenvalues, basis = torch.linalg.eigh(cov)
        if not torch.allclose(cov, cov.T, atol=1e-12, rtol=1e-9) or not eigenvalues[0] > 0:
            raise ValueError(
                f"the covariance must be symmetric and positive definite; its least eigenvalue is {eigenvalues[0]:.3g}"
            )
        self.mean, self.cov = mean, cov
        self._mean, self._basis, self._spectrum = DeviceTable(mean), DeviceTable(basis), DeviceTable(eigenvalues)

    def denoise(self, x_t: Tensor, t: Tensor | float, schedule: NoiseSchedule, labels: Tensor | None = None) -> Tensor:
        """E[x0 | x_t]. There is one class, so ``labels`` change nothing."""
        alpha, sigma, spectrum, offset = self._frame(x_t, t, schedule)
        return self._from_frame(x_t, offset * alpha * spectrum / (alpha**2 * spectrum + sigma**2), 1.0)

    def score(self, x_t: Tensor, t: Tensor | float, schedule: NoiseSchedule) -> Tensor:
        """Gradient of the log-density of the noisy law."""
        alpha, sigma, spectrum, offset = self._frame(x_t, t, schedule)
        return self._from_frame(x_t, -offset / (alpha**2 * spectrum + sigma**2), 0.0)

    def log_prob(self, x_t: Tensor, t: Tensor | float, schedule: NoiseSchedule) -> Tensor:
        """(B,) log-density of the noisy law."""
        alpha, sigma, spectrum, offset = self._frame(x_t, t, schedule)
        variance = alpha**2 * spectrum + sigma**2
        return -0.5 * (offset**2 / variance + variance.log() + math.log(2 * math.pi)).sum(-1)

    def flow_map(
        self, x_t: Tensor, t: Tensor | float, s: Tensor | float | Terminal, schedule: NoiseSchedule
    ) -> Tensor:
        """Where the probability-flow ODE takes ``x_t`` at time ``s``, exactly."""
        alpha_t, sigma_t, spectrum, offset = self._frame(x_t, t, schedule)
        alpha_s, sigma_s = schedule.levels(s, x_t.flatten(1))
        growth = ((alpha_s**2 * spectrum + sigma_s**2) / (alpha_t**2 * spectrum + sigma_t**2)).sqrt()
        return self._from_frame(x_t, growth * offset, alpha_s)

    def ddim_factors(self, t: Tensor | float, s: Tensor | float | Terminal, schedule: NoiseSchedule) -> Tensor:
        """What one exact-teacher DDIM step multiplies ``x_t - alpha_t mean`` by, per eigenvector; float64.

        (d,) for scalar times, (B, d) for (B,) times, eigenvalues in rising order.
        """
        spectrum = self._spectrum.host
        times = torch.as_tensor(t, dtype=torch.float64)
        like = spectrum.expand(*times.shape, len(spectrum))
        alpha_t, sigma_t = schedule.levels(times, like)
        alpha_s, sigma_s = schedule.levels(s, like)
        return (alpha_s * alpha_t * spectrum + sigma_s * sigma_t) / (alpha_t**2 * spectrum + sigma_t**2)

    def sample(self, z: Tensor) -> Tensor:
        """Data from standard normal ``z`` of shape (B, ...): mean + cov^(1/2) z, with the symmetric root."""
        basis, spectrum = self._basis.like(z), self._spectrum.like(z)
        return self._from_frame(z, z.to(basis.dtype).flatten(1) @ basis * spectrum.sqrt(), 1.0)

    def _frame(self, x: Tensor, t: Tensor | float, schedule: NoiseSchedule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Levels, eigenvalues, and ``x - alpha mean`` in the eigenbasis, (B, d)."""
        flat = x.flatten(1).to(compute_dtype(x))
        if flat.shape[1] != len(self.mean):
            raise ValueError(f"samples of shape {tuple(x.shape)} hold {flat.shape[1]} numbers, not {len(self.mean)}")
        alpha, sigma = schedule.levels(t, flat)
        return alpha, sigma, self._spectrum.like(x), (flat - alpha * self._mean.like(x)) @ self._basis.like(x)

    def _from_frame(self, x: Tensor, offset: Tensor, mean_scale: Tensor | float) -> Tensor:
        """``mean_scale * mean + basis offset``, shaped like ``x``."""
        return (mean_scale * self._mean.like(x) + offset @ self._basis.like(x).T).reshape(x.shape)
