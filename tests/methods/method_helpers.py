"""Affine oracle networks, exact noise designs and a loop like the engine's, for the closed forms of methods."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fastdiff.diffusion import Gaussian, InjectedRandomness, NoiseSchedule, Prediction, Randomness, VPSchedule
from fastdiff.methods import Batch, Context
from fastdiff.models.analytic import AnalyticFamily, ExactNetwork, _schedule_time
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.roles import FullSpec, Roles

SD_BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD = VPSchedule.from_scheduler_config(SD_BETAS)


def f64(values) -> Tensor:
    """Numbers that were never rounded to float32."""
    return torch.tensor(values, dtype=torch.float64)


class FixedLevels(NoiseSchedule):
    """One pair of levels at every time, for golden numbers given at (alpha, sigma)."""

    t_min, t_max = 0.0, 999.0

    def __init__(self, alpha: float, sigma: float) -> None:
        self.values = alpha, sigma

    def alpha(self, t):
        return torch.full_like(torch.as_tensor(t, dtype=torch.float64), self.values[0])

    def sigma(self, t):
        return torch.full_like(torch.as_tensor(t, dtype=torch.float64), self.values[1])

    def d_alpha(self, t):
        return torch.zeros_like(t)

    d_sigma = d_alpha

    def network_time(self, t):
        return torch.as_tensor(t)

    def time_of_kappa(self, kappa):
        return torch.zeros_like(kappa)


class CleanMap(nn.Module):
    """A network given by its x0; the native output is derived. `x0(flat x, time, labels)` -> flat x0."""

    def __init__(self, schedule: NoiseSchedule, kind: str) -> None:
        super().__init__()
        self.schedule, self.kind = schedule, kind
        self.register_buffer("anchor", torch.zeros((), dtype=torch.float64))

    def x0(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        raise AssertionError("a subclass says")

    def forward(self, x_t: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        x0 = self.x0(x_t.flatten(1), time, labels).reshape(x_t.shape)
        return Prediction.from_x0(x0, x_t, _schedule_time(self.schedule, time), self.schedule).as_kind(self.kind)

    def enable_gradient_checkpointing(self, _function: Callable) -> None:
        pass


class AffineGenerator(CleanMap):
    """x0 = A x + b at every time: a one-step student with output law N(b, A A^T) on plain noise."""

    def __init__(self, A: Tensor, b: Tensor, schedule: NoiseSchedule = SD, kind: str = "epsilon") -> None:
        super().__init__(schedule, kind)
        self.A, self.b = nn.Parameter(A.double().clone()), nn.Parameter(b.double().clone())

    def x0(self, x, time, labels):
        return x @ self.A.T + self.b


class TableGenerator(CleanMap):
    """x0 is a free table, one row a sample: its gradient is dL/dx."""

    def __init__(self, table: Tensor, schedule: NoiseSchedule = SD, kind: str = "epsilon") -> None:
        super().__init__(schedule, kind)
        self.table = nn.Parameter(table.double().clone())

    def x0(self, x, time, labels):
        return self.table


class OracleFake(nn.Module):
    """The exact denoiser of whatever law an `AffineGenerator` has now."""

    def __init__(self, student: AffineGenerator, jitter: float = 0.0) -> None:
        super().__init__()
        self.student, self.jitter = (student,), jitter
        self.register_buffer("anchor", torch.zeros((), dtype=torch.float64))

    def forward(self, x_t: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        (student,) = self.student
        A = student.A.detach()
        law = Gaussian(student.b.detach(), A @ A.T + self.jitter * torch.eye(len(A), dtype=A.dtype))
        return ExactNetwork(law, student.schedule, student.kind)(x_t, time, labels)


class LabelledGaussians(nn.Module):
    """Exact network of N(means[label], cov[label]); the last row stands for label -1."""

    def __init__(self, laws: list[Gaussian], schedule: NoiseSchedule = SD, kind: str = "epsilon") -> None:
        super().__init__()
        self.networks = [ExactNetwork(law, schedule, kind) for law in laws]
        self.register_buffer("anchor", torch.zeros((), dtype=torch.float64))

    def forward(self, x_t: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        every = torch.stack([network(x_t, time, labels) for network in self.networks])
        return every[labels % len(self.networks), torch.arange(len(x_t))]


def denoiser_of(base: nn.Module, schedule: NoiseSchedule = SD, kind: str = "epsilon", **roles: nn.Module) -> Denoiser:
    """A float64 denoiser over full modules."""
    specs = {role: FullSpec(module, torch.float64) for role, module in roles.items()}
    base.double()
    return Denoiser(Roles(base, specs), AnalyticFamily(""), schedule, kind, torch.float64)


def batch_of(rows: int, dim: int, latents: Tensor | None = None, label: int = 0) -> Batch:
    """`rows` samples of `(dim, 1, 1)` with one label."""
    return Batch(
        torch.arange(rows),
        Conditioning({"labels": torch.full((rows,), label)}),
        Conditioning({"labels": torch.tensor([-1])}),
        (dim, 1, 1),
        latents,
    )


def context(
    denoiser: Denoiser, rows: int, draws: Mapping | None = None, step: int = 0, modules: Mapping | None = None, seed=0
) -> Context:
    """A context with injected draws."""
    random = InjectedRandomness(draws or {}, Randomness(seed, step, torch.arange(rows)))
    return Context(denoiser, step, random, modules or {}, {}, lambda name, value: None)


def sigma_points(dim: int) -> Tensor:
    """`(2 dim, dim)` equal-weight points with mean 0 and covariance I: quadratic expectations are plain means."""
    root = dim**0.5 * torch.eye(dim)
    assert float(root[0, 0]).is_integer(), "roots must be exact in float32, which is what methods draw in"
    return torch.cat([root, -root])


def signs(dim: int) -> Tensor:
    """All `2^dim` sign patterns: mean 0, covariance I, exact in any precision."""
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=dim)))


def spatial(rows: Tensor) -> Tensor:
    """`(B, d)` -> `(B, d, 1, 1)`."""
    return rows[:, :, None, None]


def run(
    method,
    denoiser: Denoiser,
    optimizers: Mapping,
    batch: Batch,
    steps: int,
    after=lambda step: None,
    modules: Mapping | None = None,
) -> None:
    """The engine's loop on one batch shape, with fresh counter-based draws a step."""
    for step in range(steps):
        ctx = context(denoiser, len(batch), step=step, modules=modules)
        for update in method.updates(step):
            if optimizers.keys().isdisjoint(update.trains):
                continue  # an oracle's turn
            trained = [p for group in update.trains for p in _parameters(group, denoiser, modules or {})]
            sum(update.loss(batch, ctx).values()).backward(inputs=trained) if trained else None
            for group in update.trains:
                if group in optimizers:
                    optimizers[group].step()
                    optimizers[group].zero_grad()
        after(step)


def _parameters(group: str, denoiser: Denoiser, modules: Mapping) -> list[nn.Parameter]:
    return list(modules[group].parameters()) if group in modules else denoiser.roles.parameters(group)


def settle(loss: Callable[[], Tensor], weights: list[nn.Parameter], sweeps: int = 1) -> None:
    """Newton's steps on a squared error with its targets held, as gradients hold them: training to its end, at once.

    Predictions linear in the weights fit their targets in one step; targets that the student makes itself need one
    more for each step they are away from what is given.
    """
    sizes = [weight.numel() for weight in weights]
    for _ in range(sweeps):
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), weights, create_graph=True)])
        rows = [torch.autograd.grad(g, weights, retain_graph=True) for g in gradient]
        hessian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        step = torch.linalg.solve(hessian, gradient.detach())
        with torch.no_grad():
            for weight, change in zip(weights, step.split(sizes), strict=True):
                weight -= change.view_as(weight)


def rest(loss: Callable[[], Tensor], weights: list[nn.Parameter]) -> None:
    """Where descent ends on a loss whose targets move with the weights, its gradient being affine in them.

    Raises:
        AssertionError: if the gradient is not, or descent would run away from there even by the shortest steps.
    """

    def slope(at: Tensor) -> Tensor:
        with torch.no_grad():
            for weight, value in zip(weights, at.split([weight.numel() for weight in weights]), strict=True):
                weight.copy_(value.view_as(weight))
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss(), weights)])

    unit = torch.eye(sum(weight.numel() for weight in weights), dtype=torch.float64)
    constant = slope(0 * unit[0])
    change = torch.stack([slope(row) - constant for row in unit], dim=1)
    assert torch.linalg.eigvals(change).real.min() > 0, "descent runs away"
    assert slope(torch.linalg.solve(change, -constant)).norm() < 1e-3 * constant.norm(), "not affine"
