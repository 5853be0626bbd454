"""For methods whose gradient passes through both scores: exact expectations in one dimension, with chosen weights."""

from __future__ import annotations

import torch
from method_helpers import AffineGenerator, FixedLevels, OracleFake, batch_of, context, denoiser_of, f64, spatial
from torch import Tensor, nn

from fastdiff.diffusion import Gaussian
from fastdiff.models.analytic import ExactNetwork

# Scenario I of the golden numbers: levels, teacher N(.7, .64), student N(-.2, 1.21).
ALPHA, SIGMA, MEAN, VARIANCE, SCALE, SHIFT = 0.6, 0.4, 0.7, 0.64, 1.1, -0.2
LEVELS = FixedLevels(ALPHA, SIGMA)


def normal_nodes() -> tuple[Tensor, Tensor]:
    """Pairs (z, eps), each exact in float32, and weights: the trapezoidal rule, exact far below rounding."""
    nodes = torch.arange(-9, 9.01, 0.25)
    weights = torch.exp(-(nodes.double() ** 2) / 2)
    return torch.cartesian_prod(nodes, nodes), torch.outer(weights, weights).flatten() / weights.sum() ** 2


class RatioFake(OracleFake):
    """The student's exact denoiser whose middle activation is log p_teacher,t(x_t) / p_student,t(x_t)."""

    feature_channels = 1

    def __init__(self, student: AffineGenerator, teacher: Gaussian) -> None:
        super().__init__(student)
        self.teacher = teacher
        self.mid_block = nn.Identity()

    def forward(self, x_t, time, labels):
        (student,) = self.student
        A = student.A.detach()
        law = Gaussian(student.b.detach(), A @ A.T)
        of_teacher, of_student = (one.log_prob(x_t, time, student.schedule) for one in (self.teacher, law))
        self.mid_block((of_teacher - of_student)[:, None, None, None])
        return super().forward(x_t, time, labels)


def scalar_setup(scale: float = SCALE, shift: float = SHIFT):
    """Student, denoiser with a fake score that knows the ratio, batch, draws and node weights."""
    points, node_weights = normal_nodes()
    rows = len(points)
    student = AffineGenerator(f64([[scale]]), f64([shift]), LEVELS)
    teacher = Gaussian(f64([MEAN]), f64([[VARIANCE]]))
    base = ExactNetwork(teacher, LEVELS, "epsilon")
    denoiser = denoiser_of(base, LEVELS, student=student, fake_score=RatioFake(student, teacher))
    denoiser.family.feature_tap = "mid_block"
    draws = {
        "student/0": spatial(points[:, :1]),
        "student/eps": spatial(points[:, 1:]),
        "student/t": torch.full((rows,), 400),
    }
    return student, denoiser, batch_of(rows, 1), draws, node_weights


def scalar_gradient(cls, config, factor: float) -> tuple[float, float]:
    """Expectation, `(dA, db)`, of `factor` times the gradient of a sample's loss in scenario I."""
    student, denoiser, batch, draws, node_weights = scalar_setup()

    class Weighted(cls):
        def weight(self, x, real):
            return factor * len(node_weights) * node_weights

    terms = Weighted(config).student_loss(batch, context(denoiser, len(batch), draws))
    terms["score_identity"].backward()
    return student.A.grad.item(), student.b.grad.item()
