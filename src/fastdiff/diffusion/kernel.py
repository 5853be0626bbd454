"""The exact conditional denoiser of a kernel density over given latents: real data, no training, countable modes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .schedules import NoiseSchedule
from .tensors import DeviceTable, compute_dtype

__all__ = ["NULL_LABEL", "KernelTeacher"]

NULL_LABEL = -1  # the label that stands for no condition


class KernelTeacher:
    """Data from the equal mixture of N(x_i, bandwidth^2 I) over the latents x_i of a caption group.

    A label is a group number; :data:`NULL_LABEL` (-1) is all latents, and ``labels=None`` is -1 for every sample. A
    label that no latent carries has no law: its results are NaN (a check would wait for the device).

    Args:
        latents: (N, C, H, W), or any (N, ...).
        groups: (N,) int64, not negative.
        bandwidth: standard deviation of each mode, positive.

    Raises:
        ValueError: if shapes do not fit, a group is negative, or the bandwidth is not positive.
    """

    def __init__(self, latents: Tensor, groups: Tensor, bandwidth: float) -> None:
        if latents.dim() < 2 or len(latents) == 0 or groups.shape != latents.shape[:1]:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)} with groups of shape {tuple(groups.shape)}: give (N, ...) "
                "and one group for each latent"
            )
        if bool((groups < 0).any()):
            raise ValueError(f"group {groups.min().item()} is negative: {NULL_LABEL} stands for no condition")
        if not (math.isfinite(bandwidth) and bandwidth > 0):
            raise ValueError(f"bandwidth {bandwidth!r}: give a positive standard deviation")
        self.bandwidth = float(bandwidth)
        self.shape = tuple(latents.shape[1:])
        self._modes = DeviceTable(latents.to(torch.float64).flatten(1))
        self._groups = DeviceTable(groups.to(torch.int64))

    def __len__(self) -> int:
        """The number of modes."""
        return len(self._modes.host)

    def denoise(self, x_t: Tensor, t: Tensor | float, schedule: NoiseSchedule, labels: Tensor | None = None) -> Tensor:
        """E[x0 | x_t, label] for ``x_t`` (B, ...), ``t`` scalar or (B,), ``labels`` (B,); float32 or better."""
        flat = x_t.flatten(1).to(compute_dtype(x_t))
        alpha, sigma = schedule.levels(t, flat)
        variance = alpha**2 * self.bandwidth**2 + sigma**2
        logits = -self._squared_distances(flat, alpha) / (2 * variance)
        share = torch.softmax(logits.masked_fill(self._excluded(labels, flat), -torch.inf), dim=1).to(flat.dtype)
        pull = alpha * self.bandwidth**2 / variance  # weight of the sample itself, beside its modes' centres
        centre = share @ self._modes.like(flat)
        return (centre + pull * (flat - alpha * centre)).reshape(x_t.shape)

    def sample(self, z: Tensor, u: Tensor, labels: Tensor | None = None) -> Tensor:
        """Data from normal ``z`` (B, ...) and uniform ``u`` (B,), which picks a mode of each sample's group."""
        flat = z.flatten(1).to(compute_dtype(z))
        allowed = (~self._excluded(labels, flat)).long()
        rank = (u * allowed.sum(1)).long().minimum(allowed.sum(1) - 1)
        mode = ((allowed.cumsum(1) - 1 == rank[:, None]) & (allowed == 1)).long().argmax(1)
        return (self._modes.like(flat)[mode] + self.bandwidth * flat).reshape(z.shape)

    def modes(self, like: Tensor) -> Tensor:
        """The latents (N, ...) on the device of ``like``, float32 or better."""
        return self._modes.like(like).reshape(-1, *self.shape)

    def nearest_mode(self, x: Tensor) -> Tensor:
        """(B,) index of the latent closest to each clean sample, over all groups."""
        return self._squared_distances(x.flatten(1).to(compute_dtype(x)), 1.0).argmin(1)

    def mode_coverage(self, samples: Tensor, labels: Tensor | None = None) -> float:
        """Fraction of the modes of the labels given (of all, without labels) that some sample of theirs is nearest to.

        A mode that only samples of another group reach does not count.
        """
        expected, observed = self._mode_laws(samples, labels)
        wanted = expected > 0
        return ((observed > 0) & wanted).sum().item() / wanted.sum().item()

    def mode_total_variation(self, samples: Tensor, labels: Tensor | None = None) -> float:
        """Total variation, 0..1, between the modes that samples land on and the law of their labels.

        Each label is compared apart and weighs as many samples as carry it; mass on another group's modes counts as
        misplaced. With n samples of a perfect sampler over m equal modes it is still about sqrt(m / (2 pi n)): compare
        with a sampler's own value at the same n.
        """
        expected, observed = self._mode_laws(samples, labels)
        return 0.5 * (expected - observed).abs().sum().item()

    def _mode_laws(self, samples: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Expected and observed joint laws over (label, mode), each summing to 1."""
        if labels is None:
            labels = torch.full((len(samples),), NULL_LABEL, dtype=torch.int64, device=samples.device)
        present, which = labels.unique(return_inverse=True)
        allowed = (~self._excluded(present, samples)).to(torch.float64)
        share = torch.bincount(which, minlength=len(present)).to(torch.float64) / len(samples)
        expected = share[:, None] * allowed / allowed.sum(1, keepdim=True)
        cell = which * len(self) + self.nearest_mode(samples)
        observed = torch.bincount(cell, minlength=expected.numel()).to(torch.float64) / len(samples)
        return expected, observed.reshape(expected.shape)

    def _squared_distances(self, flat: Tensor, alpha: Tensor | float) -> Tensor:
        """(B, N) of |x - alpha x_i|^2; the expanded square is a matrix product, in float64 since it cancels."""
        flat, modes = flat.double(), self._modes.on(flat.device)
        alpha = torch.as_tensor(alpha, dtype=torch.float64, device=flat.device)
        own, theirs = flat.square().sum(1, keepdim=True), modes.square().sum(1)
        return (own - 2 * alpha * (flat @ modes.T) + alpha**2 * theirs).clamp_min(0)

    def _excluded(self, labels: Tensor | None, like: Tensor) -> Tensor:
        """(B, N), or (1, N) without labels: True for modes outside a sample's group."""
        groups = self._groups.on(like.device)[None, :]
        if labels is None:
            return torch.zeros_like(groups, dtype=torch.bool)
        return (labels[:, None] != NULL_LABEL) & (labels[:, None] != groups)
