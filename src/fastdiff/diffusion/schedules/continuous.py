"""Schedules with a closed form: flow matching, EDM (variance exploding) and TrigFlow."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..tensors import as_times
from .base import NoiseSchedule

__all__ = ["EDMSchedule", "FlowSchedule", "TrigSchedule"]


class FlowSchedule(NoiseSchedule):
    """Flow matching / rectified flow: ``alpha = 1 - t``, ``sigma = t``, ``t`` in [0, 1]; the network sees ``1000 t``.

    ``shift`` does not enter ``alpha`` and ``sigma``: ``t`` always is the noise level itself. The shift says how a
    uniform variable is mapped to levels, by :meth:`shifted` (Esser et al., arXiv 2403.03206).

    Raises:
        ValueError: if ``shift`` is not a positive finite number.
    """

    t_min = 0.0
    t_max = 1.0

    def __init__(self, shift: float = 1.0) -> None:
        if not (math.isfinite(shift) and shift > 0):
            raise ValueError(f"flow-matching shift is {shift!r}: give a positive number (1 means no shift)")
        self.shift = float(shift)

    def shifted(self, u: Tensor) -> Tensor:
        """Map an unshifted time in [0, 1] to a level: ``k u / (1 + (k - 1) u)``."""
        return self.shift * u / (1 + (self.shift - 1) * u)

    def time_of_index(self, index: Tensor | float) -> Tensor:
        """The level, after the shift."""
        return self.shifted((as_times(index) + 1) / self.indices)

    def alpha(self, t: Tensor | float) -> Tensor:
        return 1 - as_times(t)

    def sigma(self, t: Tensor | float) -> Tensor:
        return as_times(t)

    def d_alpha(self, t: Tensor | float) -> Tensor:
        return -torch.ones_like(as_times(t))

    def d_sigma(self, t: Tensor | float) -> Tensor:
        return torch.ones_like(as_times(t))

    def network_time(self, t: Tensor | float) -> Tensor:
        return 1000 * as_times(t)

    def time_of_kappa(self, kappa: Tensor | float) -> Tensor:
        return 1 / (1 + 1 / as_times(kappa))  # exact at 0 and at infinity


class EDMSchedule(NoiseSchedule):
    """Variance exploding: ``alpha = 1``, ``sigma = t``; the network sees ``ln(sigma)/4`` (arXiv 2206.00364).

    Raises:
        ValueError: unless ``0 < sigma_min < sigma_max``, both finite.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        if not (0 < sigma_min < sigma_max < math.inf):
            raise ValueError(
                f"EDM noise range is ({sigma_min!r}, {sigma_max!r}): give 0 < sigma_min < sigma_max, as in (0.002, 80)"
            )
        self.t_min = float(sigma_min)
        self.t_max = float(sigma_max)

    def alpha(self, t: Tensor | float) -> Tensor:
        return torch.ones_like(as_times(t))

    def sigma(self, t: Tensor | float) -> Tensor:
        return as_times(t)

    def d_alpha(self, t: Tensor | float) -> Tensor:
        return torch.zeros_like(as_times(t))

    def d_sigma(self, t: Tensor | float) -> Tensor:
        return torch.ones_like(as_times(t))

    def network_time(self, t: Tensor | float) -> Tensor:
        return as_times(t).log() / 4

    def time_of_kappa(self, kappa: Tensor | float) -> Tensor:
        return as_times(kappa).clamp(self.t_min, self.t_max)


class TrigSchedule(NoiseSchedule):
    """TrigFlow: ``alpha = cos t``, ``sigma = sin t``, ``t`` in [0, pi/2], data of unit scale (arXiv 2410.11081)."""

    t_min = 0.0
    t_max = math.pi / 2

    def alpha(self, t: Tensor | float) -> Tensor:
        return as_times(t).cos()

    def sigma(self, t: Tensor | float) -> Tensor:
        return as_times(t).sin()

    def d_alpha(self, t: Tensor | float) -> Tensor:
        return -as_times(t).sin()

    def d_sigma(self, t: Tensor | float) -> Tensor:
        return as_times(t).cos()

    def network_time(self, t: Tensor | float) -> Tensor:
        return as_times(t)

    def time_of_kappa(self, kappa: Tensor | float) -> Tensor:
        return as_times(kappa).atan()
