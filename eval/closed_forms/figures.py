"""What is measured of samples whose law is known; each figure is 0 for perfect, up to what so many samples can tell."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from closed_forms.worlds import World, teacher_samples
from fastdiff.diffusion.gaussian import Gaussian
from fastdiff.diffusion.kernel import KernelTeacher
from fastdiff.diffusion.randomness import Randomness
from fastdiff.models.analytic import AnalyticTeacher
from fastdiff.models.sampler import SamplerSpec

STARTS = (999, 899, 749, 599, 449, 299)
_DIRECTIONS = 64


def figures(teacher: AnalyticTeacher, samples: Tensor, labels: Tensor) -> dict[str, float]:
    """All figures of samples `(B, C, H, W)` with labels `(B,)`."""
    if isinstance(teacher.law, Gaussian):
        return _gaussian_figures(teacher.law, samples)
    found = _mode_figures(teacher.law, samples, labels)
    if samples[0].numel() == 2:
        found["sliced_wasserstein"] = _sliced_wasserstein(samples, _even_draws(teacher, labels), labels)
    return found


def exact_draws(teacher: AnalyticTeacher, labels: Tensor) -> Tensor:
    """Perfect samples, shaped like a student's."""
    random = Randomness(4, 0, torch.arange(len(labels)))
    return teacher.sample(random.normal("z", teacher.shape), random.uniform("mode"), labels)


def _even_draws(teacher: AnalyticTeacher, labels: Tensor) -> Tensor:
    """Perfect samples with each mode exactly at its weight, as the other side of a distance."""
    random = Randomness(5, 0, torch.arange(len(labels)))
    place = torch.empty(len(labels))
    for label in labels.unique():
        count = int((labels == label).sum())
        place[labels == label] = (torch.arange(count) + 0.5) / count
    return teacher.sample(random.normal("z", teacher.shape), place, labels)


def labels_of(world: World, teacher: AnalyticTeacher) -> Tensor:
    """The labels `(B,)` of the samples that are judged."""
    captions = [caption for caption in teacher.captions for _ in range(world.samples)]
    return teacher.encode(captions, 0).tensors["labels"]


@cache
def floor(world: World) -> dict[str, float]:
    """Figures of exact draws."""
    teacher = world.build()
    labels = labels_of(world, teacher)
    return figures(teacher, exact_draws(teacher, labels), labels)


@cache
def undistilled(world: World, calls: int) -> dict[str, float]:
    """Figures of the exact teacher at so many calls with the start time, among `STARTS`, that is best by the headline."""
    teacher = world.build()
    labels = labels_of(world, teacher)
    z = Randomness(6, 0, torch.arange(len(labels))).normal("z", teacher.shape)
    rows = []
    for start in STARTS:
        spec = SamplerSpec.trailing("ddim", calls, start)
        rows.append(figures(teacher, teacher_samples(teacher, spec, z, labels), labels) | {"start": start})
    return min(rows, key=lambda row: row[world.headline])


def score(world: World, found: dict[str, float], calls: int) -> float:
    """Excess of the headline over the floor, as a share of the best undistilled sampling's: 0 is perfect."""
    least = floor(world)[world.headline]
    return (found[world.headline] - least) / (undistilled(world, calls)[world.headline] - least)


def _gaussian_figures(law: Gaussian, samples: Tensor) -> dict[str, float]:
    """Wasserstein-2 distance of the normal law with the samples' moments to the exact one, and its two parts."""
    flat = samples.flatten(1).double()
    mean, cov = flat.mean(0), torch.cov(flat.T)
    root = _root(law.cov)
    spread = torch.trace(law.cov + cov - 2 * _root(root @ cov @ root)).clamp_min(0)
    return {
        "wasserstein": ((mean - law.mean).square().sum() + spread).sqrt().item(),
        "mean_error": (mean - law.mean).norm().item(),
        "covariance_error": (cov - law.cov).norm().item(),
    }


def _root(matrix: Tensor) -> Tensor:
    values, basis = torch.linalg.eigh(matrix)
    return basis * values.clamp_min(0).sqrt() @ basis.T


def _mode_figures(law: KernelTeacher, samples: Tensor, labels: Tensor) -> dict[str, float]:
    offset = samples - law.modes(samples)[law.nearest_mode(samples)]
    return {
        "total_variation": law.mode_total_variation(samples, labels),
        "coverage": law.mode_coverage(samples, labels),
        "distance_to_mode": offset.flatten(1).norm(dim=1).mean().item(),
    }


def _sliced_wasserstein(samples: Tensor, exact: Tensor, labels: Tensor) -> float:
    """Root mean square over directions of the distance of sorted projections, mean over labels."""
    angle = torch.pi * torch.arange(_DIRECTIONS) / _DIRECTIONS
    directions = torch.stack([angle.cos(), angle.sin()])
    distances = []
    for label in labels.unique():
        ours, theirs = (x[labels == label].flatten(1) @ directions for x in (samples, exact))
        distances.append((ours.sort(0).values - theirs.sort(0).values).square().mean().sqrt())
    return torch.stack(distances).mean().item()
