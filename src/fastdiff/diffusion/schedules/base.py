"""What a noise schedule is: how much signal and how much noise there is at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum

import torch
from torch import Tensor

from ..tensors import as_times, broadcast_to, compute_dtype

__all__ = ["NoiseSchedule", "Terminal", "rewrap"]


class Terminal(Enum):
    """Where a trajectory ends; one choice, shared by a trainer and the sampler its student is meant for.

    A table of betas is not clean at its index 0 (Stable Diffusion: sigma = 0.029). diffusers' ``set_alpha_to_one``
    makes the same choice: False is ``INDEX0``, True is ``CLEAN``.
    """

    INDEX0 = "index0"  # the cleanest time a network may be called at, the schedule's t_min
    CLEAN = "clean"  # no noise at all: alpha = 1, sigma = 0


class NoiseSchedule(ABC):
    """Forward process ``x_t = alpha(t) x_0 + sigma(t) eps``; noise grows with ``t``.

    Every function of time takes a real-valued tensor of any shape (or a number) and returns the same shape, in float64
    for float64 times and in float32 otherwise. Attributes ``t_min`` and ``t_max`` bound the times a network may be
    called at. ``indices`` of them, spread over that range, are numbered from the cleanest: published recipes name times
    by such an index (999, 749, ...), whatever the process.
    """

    t_min: float
    t_max: float
    indices: int = 1000

    @abstractmethod
    def alpha(self, t: Tensor | float) -> Tensor:
        """Signal coefficient."""

    @abstractmethod
    def sigma(self, t: Tensor | float) -> Tensor:
        """Noise standard deviation."""

    @abstractmethod
    def d_alpha(self, t: Tensor | float) -> Tensor:
        """Derivative of ``alpha`` with respect to ``t``."""

    @abstractmethod
    def d_sigma(self, t: Tensor | float) -> Tensor:
        """Derivative of ``sigma`` with respect to ``t``."""

    @abstractmethod
    def network_time(self, t: Tensor | float) -> Tensor:
        """The number the network is fed as its time input."""

    @abstractmethod
    def time_of_kappa(self, kappa: Tensor | float) -> Tensor:
        """Inverse of ``kappa``, clamped to ``[t_min, t_max]``; infinity is allowed."""

    @property
    def t_clean(self) -> float:
        """Where index -1 lies: the time of least noise, at which a jump can end; a table is called at ``t_min`` first."""
        return self.t_min

    def time_of_index(self, index: Tensor | float) -> Tensor:
        """The time numbered ``index``, 0 .. indices - 1; the last is ``t_max``."""
        share = (as_times(index) + 1) / self.indices
        return self.t_min + (self.t_max - self.t_min) * share

    def kappa(self, t: Tensor | float) -> Tensor:
        """Noise-to-signal ratio sigma/alpha, strictly increasing; infinite where there is no signal."""
        return self.sigma(t) / self.alpha(t)

    def levels(self, t: Tensor | float | Terminal, x: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at ``t``, shaped to multiply ``x``, in the precision ``x`` is computed in."""
        if t is Terminal.CLEAN:
            return as_times(1.0, x), as_times(0.0, x)
        if t is Terminal.INDEX0:
            t = self.t_min
        times = as_times(t, x)
        return broadcast_to(self.alpha(times), x), broadcast_to(self.sigma(times), x)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
        """``alpha x0 + sigma eps``, computed in float32 or better, returned in the dtype of ``x0``."""
        alpha, sigma = self.levels(t, x0)
        return (alpha * x0 + sigma * eps).to(x0.dtype)

    def transition(self, x_s: Tensor, s: Tensor | float | Terminal, t: Tensor | float, eps: Tensor) -> Tensor:
        """Sample the forward kernel from ``s`` to a noisier ``t`` (elementwise ``t >= s``), in the dtype of ``x_s``.

        ``x_t = r x_s + sqrt(sigma_t^2 - r^2 sigma_s^2) eps`` with ``r = alpha_t/alpha_s``, which keeps the marginals
        of every process. Nothing checks the order, since that would wait for the device; for ``t < s`` the noise
        term is zero.
        """
        kept, added = self.kernel(s, t, x_s)
        return (kept * x_s + added * eps).to(x_s.dtype)

    def kernel(self, s: Tensor | float | Terminal, t: Tensor | float, x: Tensor) -> tuple[Tensor, Tensor]:
        """What ``transition`` multiplies ``x_s`` and the noise by, shaped for ``x``: ``r`` and the added noise level."""
        alpha_s, sigma_s = self.levels(s, x)
        alpha_t, sigma_t = self.levels(t, x)
        no_signal = alpha_s == 0  # s is the end of a zero-terminal-SNR or flow process: only t = s can follow
        ratio = torch.where(no_signal, 1.0, alpha_t / torch.where(no_signal, 1.0, alpha_s))
        # The difference of squares as a product: nothing cancels when t is close to s.
        variance = (sigma_t - ratio * sigma_s) * (sigma_t + ratio * sigma_s)
        return ratio, variance.clamp_min(0).sqrt()


def rewrap(x: Tensor, t: Tensor | float, source: NoiseSchedule, target: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """See the noisy sample ``(x, t)`` of one process as a sample of another with the same noise-to-signal ratio.

    Equal ratio means equal information: the clean sample and the noise that a perfect network predicts are the same on
    both sides, so that a teacher of one process can serve a student of another (Karras et al., arXiv 2206.00364).
    Where the target does not reach the ratio its time is clamped, and ``x`` is scaled to that time.

    Returns:
        ``(x', t')``: ``x'`` in float32 or better, ``t'`` shaped like ``t``.
    """
    times = as_times(t, x)
    target_times = target.time_of_kappa(source.kappa(times))
    # (alpha + sigma) scales like alpha at equal ratio and never vanishes, even where there is no signal left.
    scale = (target.alpha(target_times) + target.sigma(target_times)) / (source.alpha(times) + source.sigma(times))
    return x.to(compute_dtype(x)) * broadcast_to(scale, x), target_times
