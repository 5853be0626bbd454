"""Gaussian teachers and affine students with their exact fake scores, and gradients of divergences in closed form."""

from __future__ import annotations

import torch
from method_helpers import SD, AffineGenerator, FixedLevels, OracleFake, denoiser_of, f64, signs, spatial
from torch import Tensor

from fastdiff.diffusion import Gaussian
from fastdiff.models.analytic import ExactNetwork

MU, COV = f64([0.7, -0.4]), f64([[0.64, 0.2], [0.2, 0.5]])
A, B = f64([[1.1, 0.3], [-0.2, 0.8]]), f64([-0.2, 0.5])

# Scalar teacher N(.7, .64), student N(-.2, a^2): levels, a, and the derivatives of the reverse KL by a and b.
GOLDEN = {
    "I": ((0.6, 0.4), 1.1, (0.3494685068, -0.8299180328)),
    "II": ((0.6, 0.8), 1.3, (0.1628039773, -0.3722426471)),
}


def denoiser_with_fake(schedule=SD, kind="epsilon", mu=MU, cov=COV, a=A, b=B):
    """An affine student of N(mu, cov) and a denoiser whose fake score is always exact."""
    student = AffineGenerator(a, b, schedule, kind)
    base = ExactNetwork(Gaussian(mu, cov), schedule, kind)
    return student, denoiser_of(base, schedule, kind, student=student, fake_score=OracleFake(student))


def golden_setup(case: str):
    """Student, denoiser, exact design points, levels, and the golden derivatives by a and b."""
    levels, a, gold = GOLDEN[case]
    student, denoiser = denoiser_with_fake(
        FixedLevels(*levels), mu=f64([0.7]), cov=f64([[0.64]]), a=f64([[a]]), b=f64([-0.2])
    )
    return student, denoiser, signs(2), levels, gold


def draws(points: Tensor, dim: int, index: int) -> dict:
    """z for the student's input and eps for the comparison of scores, at one time for all."""
    return {
        "student/0": spatial(points[:, :dim]),
        "student/eps": spatial(points[:, dim : 2 * dim]),
        "student/t": torch.full((len(points),), index),
    }


def divergence_gradient(schedule, t: Tensor, repulsion: bool = True) -> tuple[Tensor, Tensor]:
    """Derivatives by b and A of KL(student || teacher) of the noisy laws; without the term that repels samples: SDS."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    eye = torch.eye(2, dtype=torch.float64)
    real, fake = (torch.linalg.inv(alpha**2 * cov + sigma**2 * eye) for cov in (COV, A @ A.T))
    return alpha**2 * real @ (B - MU), alpha**2 * (real - repulsion * fake) @ A


def exactness(kind: str) -> dict[str, float]:
    """Tolerances; the times of a flow are fractions, and float32 as everywhere."""
    return {"rtol": 1e-9, "atol": 1e-11} if kind == "epsilon" else {"rtol": 1e-6, "atol": 1e-8}
