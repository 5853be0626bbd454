"""A student of few numbers whose fake score and density ratio are exact: what a divergence alone does, with nothing learned
but the student."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastdiff.diffusion.gaussian import Gaussian
from fastdiff.diffusion.mixture import GaussianMixture
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.randomness import Randomness
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.methods import Batch, Context, FDistill
from fastdiff.models.analytic import AnalyticFamily, AnalyticTeacher, ExactNetwork
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.roles import FullSpec, Roles

KIND = "epsilon"


class AffineStudent(nn.Module):
    """x0 = A x + b at every time: from plain noise it draws N(b, A A^T)."""

    def __init__(self, a: Tensor, b: Tensor, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.a, self.b, self.schedule = nn.Parameter(a.clone()), nn.Parameter(b.clone()), schedule

    def forward(self, x_t: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        x0 = (x_t.flatten(1) @ self.a.T + self.b).reshape(x_t.shape)
        return Prediction.from_x0(x0, x_t, time, self.schedule).as_kind(KIND)

    def law(self) -> Gaussian:
        """What it draws now."""
        a = self.a.detach()
        return Gaussian(self.b.detach(), a @ a.T + 1e-9 * torch.eye(len(a), dtype=a.dtype))

    def enable_gradient_checkpointing(self, _function: Callable) -> None:
        """There is nothing to recompute."""


class ExactFake(nn.Module):
    """The fake score of whatever the student draws now."""

    def __init__(self, student: AffineStudent) -> None:
        super().__init__()
        self.student = (student,)  # in a tuple, so that its weights stay its own
        self.register_buffer("anchor", torch.zeros((), dtype=torch.float64))

    def forward(self, x_t: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        (student,) = self.student
        return ExactNetwork(student.law(), student.schedule, KIND)(x_t, time, labels)

    def enable_gradient_checkpointing(self, _function: Callable) -> None:
        """There is nothing to recompute."""


class ExactRatio(nn.Module):
    """Discriminator heads on the exact teacher's features whose logit is log p_teacher,t / p_student,t."""

    def __init__(self, teacher: ExactNetwork, student: AffineStudent) -> None:
        super().__init__()
        self.laws, self.time = (teacher.law, student), torch.zeros(())
        teacher.register_forward_pre_hook(self._remember)

    def _remember(self, _network: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.time = arguments[1]

    def forward(self, noisy: Tensor, clean: Tensor) -> Tensor:
        law, student = self.laws
        schedule = student.schedule
        ratio = law.log_prob(noisy, self.time, schedule) - student.law().log_prob(noisy, self.time, schedule)
        return ratio[:, None]


def distilled(
    method: FDistill,
    law: GaussianMixture,
    student: AffineStudent,
    steps: int,
    rows: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Trains the student in place on the whole mixture by the method's own loss."""
    base = ExactNetwork(law, student.schedule, KIND).double()
    heads = ExactRatio(base, student)
    specs = {"student": FullSpec(student, torch.float64), "fake_score": FullSpec(ExactFake(student), torch.float64)}
    denoiser = Denoiser(Roles(base, specs), AnalyticFamily(""), student.schedule, KIND, torch.float64)
    null = Conditioning({"labels": torch.tensor([-1])})
    size = len(student.b)
    optimizer = torch.optim.Adam(student.parameters(), lr=learning_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        indices = torch.arange(step * rows, (step + 1) * rows)
        batch = Batch(indices, null.expand(rows), null, (size, 1, 1))
        random = Randomness(seed, step, indices)
        ctx = Context(denoiser, step, random, {"discriminator": heads}, {}, lambda name, value: None)
        # Beside the divergence stands the GAN's term, which here knows the ratio exactly: left out, it is another one.
        method.student_loss(batch, ctx)["distribution_matching"].backward(inputs=list(student.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        decay.step()


def schedule() -> NoiseSchedule:
    """The analytic teachers' own."""
    return AnalyticTeacher.gaussian(torch.zeros(1), torch.eye(1)).schedule
