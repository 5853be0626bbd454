"""A one-dimensional Gaussian teacher and its maps in closed form, written without the code under test."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from method_helpers import SD, batch_of, context, denoiser_of, f64
from torch import Tensor, nn

from fastdiff.data.rejects import Rejects
from fastdiff.diffusion import FlowSchedule, Gaussian, NoiseSchedule, Prediction, jump
from fastdiff.engine import Settings
from fastdiff.models.analytic import ExactNetwork
from fastdiff.models.analytic_networks import AffinePerBin
from fastdiff.models.denoiser import Denoiser

MU, S = 1.3, 0.49
LAW = Gaussian(f64([MU]), f64([[S]]))
FLOW = FlowSchedule()
KINDS = {SD: "epsilon", FLOW: "flow"}
PROCESSES = {"epsilon": (SD, "epsilon"), "v_prediction": (SD, "v_prediction"), "flow": (FLOW, "flow")}

Map = Callable[[Tensor, Tensor, Tensor], Tensor]


def levels(index: Tensor | float, schedule: NoiseSchedule = SD) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) at whole indices from -1, from betas or the line alone."""
    index = torch.as_tensor(index, dtype=torch.float64)
    if schedule is not SD:
        level = (index + 1) / 1000
        return 1 - level, level
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cat([f64([1.0]), torch.cumprod(1 - betas, 0)])[(index.round() + 1).long()]
    return kept.sqrt(), (1 - kept).sqrt()


def factor(t: float, s: float, schedule: NoiseSchedule = SD, variance: float = S) -> float:
    """What one DDIM step with the exact denoiser multiplies x_t - alpha_t mu by."""
    (at, st), (as_, ss) = levels(t, schedule), levels(s, schedule)
    return ((as_ * at * variance + ss * st) / (at**2 * variance + st**2)).item()


def exact_map(schedule: NoiseSchedule = SD, mu: float = MU, variance: float = S) -> Map:
    """The flow map of the ODE between whole indices."""

    def f(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        (at, st), (as_, ss) = levels(t, schedule), levels(s, schedule)
        return as_ * mu + ((as_**2 * variance + ss**2) / (at**2 * variance + st**2)).sqrt() * (x - at * mu)

    return f


def product_map(points: list[int], schedule: NoiseSchedule = SD, mu: float = MU, variance: float = S) -> Map:
    """DDIM with the exact denoiser from grid point to grid point."""

    def f(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        slopes = []
        for start, end in zip(t.flatten().tolist(), s.flatten().tolist(), strict=True):
            way = [p for p in reversed(points) if end <= p <= start]
            slopes.append(f64([factor(a, b, schedule, variance) for a, b in pairwise(way)]).prod())
        (at, _), (as_, _) = levels(t, schedule), levels(s, schedule)
        return as_ * mu + torch.stack(slopes).reshape(t.shape) * (x - at * mu)

    return f


def behind_boundary(value: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The clean prediction at whole indices `t` that LCM's boundary weights on the table make `value`."""
    tau = 10 * t
    skip, out = 0.25 / (tau**2 + 0.25), tau / (tau**2 + 0.25).sqrt()
    return torch.where(tau > 0, (value - skip * x) / out.clamp_min(1e-9), x)


class JumpNet(nn.Module):
    """A network given by its jumps: its DDIM step from `time` to `end(time)`, or to the told end, is `f`."""

    def __init__(
        self,
        f: Map,
        end: Callable[[Tensor], Tensor] | None = None,
        schedule: NoiseSchedule = SD,
        kind: str | None = None,
    ) -> None:
        super().__init__()
        self.f, self.end, self.schedule, self.kind = f, end, schedule, kind or KINDS[schedule]
        self.register_buffer("anchor", torch.zeros((), dtype=torch.float64))

    def forward(self, x_t: Tensor, time: Tensor, labels: Tensor, timestep_cond: Tensor | None = None) -> Tensor:
        x, index = x_t.flatten(1), self.index(time)[:, None]
        end = self.end(index) if timestep_cond is None else self.index(told(timestep_cond))[:, None]
        (at, st), (as_, ss) = levels(index, self.schedule), levels(end, self.schedule)
        ratio = ss / st
        stays = end == index  # any clean prediction does; the denoiser is the limit
        x0 = (self.f(x, index, end) - ratio * x) / torch.where(stays, 1.0, as_ - ratio * at)
        x0 = torch.where(stays, MU + at * S * (x - at * MU) / (at**2 * S + st**2), x0).reshape(x_t.shape)
        t = index[:, 0] if self.schedule is SD else (index[:, 0] + 1) / 1000
        return Prediction.from_x0(x0, x_t, t, self.schedule).as_kind(self.kind)

    def index(self, time: Tensor) -> Tensor:
        return (time if self.schedule is SD else time - 1).double().round()

    def enable_gradient_checkpointing(self, _function: Callable) -> None:
        pass


def told(features: Tensor) -> Tensor:
    """The number that features stand for: their slowest sine has a frequency of 1e-4."""
    return features.double()[:, 127].asin() * 1e4


def gaussian_denoiser(schedule: NoiseSchedule = SD, kind: str | None = None, **roles: nn.Module) -> Denoiser:
    """The exact teacher and other roles."""
    kind = kind or KINDS[schedule]
    return denoiser_of(ExactNetwork(LAW, schedule, kind), schedule, kind, **roles)


def data(rows: int) -> Tensor:
    """Samples of the law, `(rows, 1, 1, 1)`."""
    return MU + S**0.5 * torch.randn(rows, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def student_loss(method, denoiser: Denoiser, rows: int, draws: dict | None = None, **ctx) -> dict[str, Tensor]:
    """The student's terms on data of the law."""
    return method.student_loss(batch_of(rows, 1, data(rows)), context(denoiser, rows, draws, **ctx))


def every_pair(method, denoiser: Denoiser, draws: dict | None = None, copies: int = 4) -> float:
    """The consistency loss over all pairs of the grid."""
    count = method.config.num_ddim_timesteps
    draws = {"pair": torch.arange(count).repeat(copies)} | (draws or {})
    return student_loss(method, denoiser, copies * count, draws)["consistency"].item()


class Latents:
    """Data in memory: latents of one caption."""

    def __init__(self, latents: Tensor, caption: str = "a sample") -> None:
        self.latents, self.caption, self.rejects = latents, caption, Rejects(len(latents), source="memory")

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, visit):
        return {"prompt": self.caption, "latents": self.latents[getattr(visit, "item", visit)]}

    def collate(self, items):
        return {"prompt": [item["prompt"] for item in items], "latents": torch.stack([i["latents"] for i in items])}


def settings(tmp_path, **changes) -> Settings:
    """Of a short run."""
    own = {"train_batch_size": 2, "lora_rank": 2, "report_to": "none", "max_train_steps": 2, "learning_rate": 1e-2}
    return Settings(**own | {"output_dir": str(tmp_path)} | changes)


def images(count: int = 4) -> Latents:
    """Latents for `tiny_sd`."""
    return Latents(torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(0)), "ab")


def orders(losses: list[float]) -> list[float]:
    """Order in the step of each residual whose square is given, for steps that halve."""
    return [math.log2(a / b) / 2 for a, b in pairwise(losses)]


def coefficients(make: Callable[[Tensor, list[Tensor]], Tensor], draws: int) -> tuple[float, list[float], float]:
    """(slope in the input, slopes in the draws, constant) of an affine map of `(B, 1, 1, 1)` tensors."""
    basis = torch.eye(draws + 1, dtype=torch.float64)
    rows = torch.cat([torch.zeros(1, draws + 1, dtype=torch.float64), basis])[:, :, None, None, None]
    out = make(rows[:, 0], [rows[:, k] for k in range(1, draws + 1)]).flatten()
    constant = out[0].item()
    slope, *noise = (out[1:] - constant).tolist()
    return slope, noise, constant


class ToldAffine(AffinePerBin):
    """Affine at each network time, or for each told end; what else it is told changes nothing."""

    def __init__(self, times: list[float], by_end: bool = False) -> None:
        super().__init__(1, times)
        self.by_end = by_end

    def forward(self, x_t: Tensor, time: Tensor, labels: Tensor, timestep_cond: Tensor | None = None) -> Tensor:
        return super().forward(x_t, told(timestep_cond) if self.by_end else time, labels)


def jumps(denoiser: Denoiser, x: Tensor, t: int, s: int, **inputs: Tensor) -> Tensor:
    """`(B,)` where the student jumps to from `x` `(B,)`, between whole indices."""
    start, end = (denoiser.schedule.time_of_index(torch.full((len(x),), float(index))) for index in (t, s))
    cond = batch_of(len(x), 1).cond
    with torch.no_grad():
        return jump(denoiser(x[:, None, None, None], start, cond, "student", **inputs), end).flatten()


def mapped(f: Map, x: Tensor, t: int, s: int) -> Tensor:
    """`(B,)` where a map between whole indices takes `x` `(B,)`."""
    return f(x[:, None], *(torch.full((len(x), 1), float(index)) for index in (t, s)))[:, 0]
