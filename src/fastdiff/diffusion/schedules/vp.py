"""The variance-preserving process of a table of cumulative alphas (Stable Diffusion 1.x, 2.x, XL and kin)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..tensors import DeviceTable, as_times
from .base import NoiseSchedule
from .betas import alphas_cumprod_from_config

__all__ = ["CLEAN_INDEX", "LAST_INDEX", "VPSchedule"]

LAST_INDEX = 999  # of the thousand that all families number their times by, the noisiest
CLEAN_INDEX = -1  # the index, one before the table, where a VP process has no noise at all


class VPSchedule(NoiseSchedule):
    """``alpha = sqrt(abar)``, ``sigma = sqrt(1 - abar)`` over indices 0..T-1, ``T`` the length of the table.

    ``t`` is a real-valued index; ln(sigma/alpha) is linear between neighbours. Two pieces reach beyond what a
    logarithm can say: below index 0, which is *not* clean, sigma falls linearly to 0 at :data:`CLEAN_INDEX` (-1), so
    that a tensor of targets may mix table indices and the clean end; and if the table ends in abar = 0
    (zero terminal SNR, arXiv 2305.08891) alpha falls linearly to 0 over the last piece. Derivatives at an integer are
    those of the piece to its right (at T-1: to its left).

    Args:
        alphas_cumprod: (T,) cumulative products of 1 - beta, strictly decreasing, in (0, 1), the last may be 0.

    Raises:
        ValueError: if the table is not such a sequence.
    """

    t_min = 0.0
    t_clean = -1.0

    def __init__(self, alphas_cumprod: Tensor | Sequence[float]) -> None:
        table = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu")
        _check(table)
        self.alphas_cumprod = table
        self.t_max = float(len(table) - 1)
        self.indices = len(table)
        self.zero_terminal_snr = table[-1].item() == 0
        alpha, sigma = table.sqrt(), (1 - table).sqrt()
        log_kappa = sigma.log() - alpha.log()
        if self.zero_terminal_snr:
            log_kappa[-1] = log_kappa[-2]  # keeps the logarithmic branch finite where the linear one is selected
        slope = log_kappa.diff()
        self._tables = DeviceTable(torch.stack([alpha, sigma, torch.cat([slope, slope[-1:]]), log_kappa]))
        self._first_sigma = sigma[0].item()
        self._last_alpha = alpha[-2].item()  # where the piece that ends without signal begins

    @classmethod
    def from_scheduler_config(cls, config: Mapping) -> VPSchedule:
        """The process of a diffusers scheduler config (``scheduler.config`` or its JSON file).

        Reads ``trained_betas``, or ``beta_schedule`` (linear, scaled_linear, squaredcos_cap_v2) with ``beta_start``,
        ``beta_end`` and ``num_train_timesteps``; then ``rescale_betas_zero_snr``.

        Raises:
            ValueError: naming the key that is missing or not understood.
        """
        return cls(alphas_cumprod_from_config(config))

    def alpha(self, t: Tensor | float) -> Tensor:
        return self._state(as_times(t))[0]

    def sigma(self, t: Tensor | float) -> Tensor:
        return self._state(as_times(t))[1]

    def d_alpha(self, t: Tensor | float) -> Tensor:
        times = as_times(t)
        alpha, sigma, rate = self._state(times)
        slope = torch.where(times < 0, -sigma * self._first_sigma / alpha, -alpha * sigma * sigma * rate)
        if self.zero_terminal_snr:
            slope = torch.where(times >= self.t_max - 1, -self._last_alpha, slope)
        return slope

    def d_sigma(self, t: Tensor | float) -> Tensor:
        times = as_times(t)
        alpha, sigma, rate = self._state(times)
        slope = torch.where(times < 0, self._first_sigma, sigma * alpha * alpha * rate)
        if self.zero_terminal_snr:
            slope = torch.where(times >= self.t_max - 1, alpha * self._last_alpha / sigma, slope)
        return slope

    def network_time(self, t: Tensor | float) -> Tensor:
        return as_times(t)

    def time_of_index(self, index: Tensor | float) -> Tensor:
        """The index itself: networks of these processes were trained on whole numbers."""
        return as_times(index)

    def time_of_kappa(self, kappa: Tensor | float) -> Tensor:
        kappa = as_times(kappa)
        log_kappa = self._tables.like(kappa)[3]
        last = log_kappa.numel() - (2 if self.zero_terminal_snr else 1)
        wanted = kappa.log().clamp(log_kappa[0], log_kappa[last])
        right = torch.searchsorted(log_kappa[: last + 1], wanted.detach()).clamp(1, last)
        low, high = log_kappa[right - 1], log_kappa[right]
        times = right - 1 + (wanted - low) / (high - low)
        if self.zero_terminal_snr:
            alpha = (1 + kappa * kappa).rsqrt()
            times = torch.where(alpha < self._last_alpha, self.t_max - alpha / self._last_alpha, times)
        return times

    def _state(self, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(alpha, sigma, d ln kappa / dt) at floating ``times``."""
        knot = times.detach().floor().clamp(0, self.t_max)
        alpha_k, sigma_k, rate, _ = self._tables.like(times)[:, knot.long()]
        growth = ((times - knot) * rate).exp()
        scale = (alpha_k * alpha_k + (sigma_k * growth) ** 2).rsqrt()
        alpha, sigma = alpha_k * scale, sigma_k * growth * scale
        # Each linear piece is fed a harmless time where it is not taken, so that it stays finite in the backward too.
        clean_side = times < 0
        below = self._first_sigma * (1 + torch.where(clean_side, times, 0.0))
        alpha = torch.where(clean_side, (1 - below * below).sqrt(), alpha)
        sigma = torch.where(clean_side, below, sigma)
        if self.zero_terminal_snr:
            tail = times >= self.t_max - 1
            above = self._last_alpha * (self.t_max - torch.where(tail, times, self.t_max))
            alpha = torch.where(tail, above, alpha)
            sigma = torch.where(tail, (1 - above * above).sqrt(), sigma)
        return alpha, sigma, rate


def _check(table: Tensor) -> None:
    if table.dim() != 1 or table.numel() < 2:
        raise ValueError(f"alphas_cumprod has shape {tuple(table.shape)}: give one axis of at least two values")
    inside = bool(((table >= 0) & (table < 1)).all())  # false for NaN as well
    if not inside or bool((table.diff() >= 0).any()) or bool((table[:-1] == 0).any()):
        raise ValueError(
            f"alphas_cumprod runs from {table[0].item():.6g} to {table[-1].item():.6g}: it must fall strictly, inside "
            "(0, 1), and only its last value may be 0; check the betas of the scheduler config"
        )
