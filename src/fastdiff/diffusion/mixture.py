"""The exact denoiser of a mixture of Gaussians, the components being the classes of a conditional teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .gaussian import Gaussian
from .schedules import NoiseSchedule
from .tensors import DeviceTable

__all__ = ["GaussianMixture"]


class GaussianMixture:
    """Data from ``sum_k weights[k] N(means[k], covariances[k])``.

    Label k conditions on component k and -1 on nothing; ``labels=None`` is -1 for every sample.

    Args:
        weights: (K,), positive; normalised here.
        means: (K, d).
        covariances: (K, d, d).

    Raises:
        ValueError: if shapes do not fit, a weight is not positive, or a covariance is not positive definite.
    """

    def __init__(self, weights: Tensor | Sequence[float], means: Tensor, covariances: Tensor) -> None:
        weights = torch.as_tensor(weights, dtype=torch.float64).cpu()
        if not len(weights) == len(means) == len(covariances) or not bool((weights > 0).all()):
            raise ValueError(
                f"{len(weights)} weights, {len(means)} means, {len(covariances)} covariances: give equally many, "
                "and positive weights"
            )
        self.weights = weights / weights.sum()
        self.components = tuple(Gaussian(mean, cov) for mean, cov in zip(means, covariances))
        self._log_weights = DeviceTable(self.weights.log())

    def denoise(self, x_t: Tensor, t: Tensor | float, schedule: NoiseSchedule, labels: Tensor | None = None) -> Tensor:
        """E[x0 | x_t, label], shaped like ``x_t``; ``labels`` is (B,) int64 in -1..K-1."""
        parts = torch.stack([part.denoise(x_t, t, schedule).flatten(1) for part in self.components], dim=1)
        share = torch.softmax(self._joint(x_t, t, schedule, labels), dim=1)
        return (share[:, :, None] * parts).sum(1).reshape(x_t.shape)

    def score(self, x_t: Tensor, t: Tensor | float, schedule: NoiseSchedule, labels: Tensor | None = None) -> Tensor:
        """Gradient of the log-density of the noisy law of each sample's label."""
        parts = torch.stack([part.score(x_t, t, schedule).flatten(1) for part in self.components], dim=1)
        share = torch.softmax(self._joint(x_t, t, schedule, labels), dim=1)
        return (share[:, :, None] * parts).sum(1).reshape(x_t.shape)

    def log_prob(self, x_t: Tensor, t: Tensor | float, schedule: NoiseSchedule) -> Tensor:
        """(B,) log-density of the unconditional noisy law."""
        return torch.logsumexp(self._joint(x_t, t, schedule, None), dim=1)

    def sample(self, z: Tensor, u: Tensor, labels: Tensor | None = None) -> Tensor:
        """Data from normal ``z`` (B, ...) and uniform ``u`` (B,), which picks the component where the label is -1."""
        edges = self.weights.cumsum(0).to(device=u.device, dtype=u.dtype)
        component = torch.searchsorted(edges, u).clamp_max(len(self.weights) - 1)
        if labels is not None:
            component = torch.where(labels < 0, component, labels)
        drawn = torch.stack([part.sample(z) for part in self.components], dim=1)
        return drawn[torch.arange(len(z), device=z.device), component]

    def _joint(self, x_t: Tensor, t: Tensor | float, schedule: NoiseSchedule, labels: Tensor | None) -> Tensor:
        """(B, K) log of weight times density, minus infinity for components a label excludes."""
        density = torch.stack([part.log_prob(x_t, t, schedule) for part in self.components], dim=1)
        joint = density + self._log_weights.like(density)
        if labels is None:
            return joint
        index = torch.arange(len(self.weights), device=labels.device)
        excluded = (labels[:, None] >= 0) & (labels[:, None] != index)
        return joint.masked_fill(excluded, -torch.inf)
