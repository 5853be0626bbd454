"""Losses in float32 or better. They average over every element, batch included; `sample_...` leave the batch, (B,).

Published loss weights assume a reduction; those of consistency distillation, DMD and DMD2 assume this one.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .tensors import compute_dtype

__all__ = [
    "discriminator_hinge",
    "discriminator_softplus",
    "dmd_normaliser",
    "generator_hinge",
    "generator_margin",
    "generator_softplus",
    "mse",
    "pseudo_huber",
    "sample_huber",
    "sample_mse",
    "surrogate",
]


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference."""
    return _difference(prediction, target).square().mean()


def pseudo_huber(prediction: Tensor, target: Tensor, c: float = 1e-3) -> Tensor:
    """Mean of ``sqrt(d^2 + c^2) - c`` over elements; ``d^2/(2c)`` for small ``d`` (arXiv 2310.04378 uses c = 0.001).

    Raises:
        ValueError: unless ``c > 0``.
    """
    if not c > 0:
        raise ValueError(f"pseudo-Huber c is {c!r}: give a positive number, such as 0.001")
    squared = _difference(prediction, target).square()
    return (squared / ((squared + c * c).sqrt() + c)).mean()  # the same number, without cancellation at small d


def sample_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference of each sample, (B,)."""
    return _difference(prediction, target).square().flatten(1).mean(1)


def sample_huber(prediction: Tensor, target: Tensor, c: float = 5.4e-4) -> Tensor:
    """``(sqrt(|d|^2 + w^2) - w) / n`` of each sample of n numbers, with ``w = c n``; (B,) (arXiv 2405.20320)."""
    difference = _difference(prediction, target).flatten(1)
    size, squared = difference.shape[1], difference.square().sum(1)
    width = c * size
    return squared / ((squared + width * width).sqrt() + width) / size


def surrogate(x: Tensor, gradient: Tensor) -> Tensor:
    """A loss whose gradient with respect to ``x`` is ``gradient / x.numel()``: ``mean((x - sg[x - g])^2) / 2``."""
    x = x.to(compute_dtype(x))
    return 0.5 * (x - (x - gradient).detach()).square().mean()


def dmd_normaliser(x: Tensor, x0_real: Tensor, floor: float = 1e-5) -> Tensor:
    """Per-sample mean of ``|x - x0_real|``, at least ``floor``, detached, shaped (B, 1, ...) to divide a gradient.

    The denominator of the distribution-matching gradient in the released code of DMD and DMD2 (arXiv 2405.14867,
    which drops the factor alpha that the paper prints).
    """
    distance = _difference(x, x0_real).detach().abs()
    return distance.mean(dim=tuple(range(1, x.dim())), keepdim=True).clamp_min(floor)


def generator_softplus(fake_logits: Tensor) -> Tensor:
    """Non-saturating generator loss: mean softplus(-logit)."""
    return F.softplus(-_full(fake_logits)).mean()


def discriminator_softplus(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Cross-entropy discriminator loss; its optimal logit is log(p_real / p_fake)."""
    return F.softplus(_full(fake_logits)).mean() + F.softplus(-_full(real_logits)).mean()


def generator_hinge(fake_logits: Tensor) -> Tensor:
    """Mean of minus the logit."""
    return -_full(fake_logits).mean()


def generator_margin(fake_logits: Tensor) -> Tensor:
    """Mean relu(1 - logit): the hinge generator that stops pushing samples taken for real (PCM's released code)."""
    return F.relu(1 - _full(fake_logits)).mean()


def discriminator_hinge(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge discriminator loss; its optimal logit is not a log-ratio."""
    return F.relu(1 + _full(fake_logits)).mean() + F.relu(1 - _full(real_logits)).mean()


def _difference(a: Tensor, b: Tensor) -> Tensor:
    if a.shape != b.shape:  # broadcasting would hide a wrong axis in a plausible number
        raise ValueError(f"cannot compare shapes {tuple(a.shape)} and {tuple(b.shape)}: give tensors of equal shape")
    dtype = compute_dtype(a, b)
    return a.to(dtype) - b.to(dtype)


def _full(logits: Tensor) -> Tensor:
    return logits.to(compute_dtype(logits))
