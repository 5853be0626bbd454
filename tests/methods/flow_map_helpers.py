"""Exact flow maps of a Gaussian as networks that are told where to end; data and settings of small runs."""

from __future__ import annotations

import torch
from method_helpers import SD, f64, spatial
from torch import nn

from fastdiff.data.rejects import Rejects
from fastdiff.diffusion import FlowSchedule, Gaussian, NoiseSchedule, Prediction, Terminal
from fastdiff.engine import Settings
from fastdiff.methods import Batch
from fastdiff.models.analytic import ExactNetwork
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.embeddings import time_features

LAW = Gaussian(f64([1.3, -0.4]), f64([[0.49, 0.2], [0.2, 0.9]]))
PROCESSES = {
    "epsilon": (SD, "epsilon", [4.5, 250.0, 612.25, 998.5], [-1.0, 3.5, 400.0, 20.0]),
    "v_prediction": (SD, "v_prediction", [4.5, 250.0, 612.25, 998.5], [-1.0, 3.5, 400.0, 20.0]),
    "flow": (FlowSchedule(), "flow", [0.03, 0.4, 0.75, 1.0], [0.0, 0.01, 0.6, 0.0]),
}


def told_end(timestep_cond: torch.Tensor, place: int = 0) -> torch.Tensor:
    """The number that `time_features` embedded in its block number `place`, from its slowest sine."""
    block = timestep_cond[:, 256 * place : 256 * (place + 1)]
    return torch.atan2(block[:, 127], block[:, 255]) * 1e4


def schedule_time(schedule: NoiseSchedule, time: torch.Tensor) -> torch.Tensor:
    return time / 1000 if isinstance(schedule, FlowSchedule) else time


class ConsistencyNetwork(nn.Module):
    """The exact consistency function of a Gaussian as a network; `tilt` spoils it, the less the cleaner its input."""

    def __init__(self, schedule, kind: str, tilt: float | nn.Parameter = 0.0) -> None:
        super().__init__()
        self.schedule, self.kind, self.tilt = schedule, kind, tilt
        self.register_buffer("anchor", torch.zeros((), dtype=torch.float64))

    def forward(self, x_t, time, labels):
        t = schedule_time(self.schedule, time)
        alpha, sigma = self.schedule.levels(t, x_t)
        x0 = LAW.flow_map(x_t, t, Terminal.CLEAN, self.schedule) + self.tilt * sigma / (alpha + sigma) * x_t
        return Prediction.from_x0(x0, x_t, t, self.schedule).as_kind(self.kind)

    def enable_gradient_checkpointing(self, _function):
        pass


class MapNetwork(nn.Module):
    """Predicts the pair (x0, eps) whose straight line leads from x_t to where the exact flow leads; `tilt` spoils it."""

    def __init__(
        self, schedule: NoiseSchedule, kind: str, tilt: float | nn.Parameter = 0.0, law: Gaussian = LAW
    ) -> None:
        super().__init__()
        self.schedule, self.kind, self.tilt, self.law = schedule, kind, tilt, law
        self.register_buffer("anchor", torch.zeros((), dtype=torch.float64))

    def forward(self, x_t, time, labels, timestep_cond):
        t, s = (schedule_time(self.schedule, v) for v in (time, told_end(timestep_cond)))
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.schedule.levels(t, x_t), self.schedule.levels(s, x_t)
        there = self.law.flow_map(x_t, t, s, self.schedule)
        x0 = (sigma_t * there - sigma_s * x_t) / (alpha_s * sigma_t - alpha_t * sigma_s)
        still = ((t - s).abs() < 1e-5 * self.schedule.t_max)[:, None, None, None]  # the quotient's limit
        x0 = torch.where(still, self.law.denoise(x_t, t, self.schedule), x0)
        x0 = x0 + self.tilt * x_t * (1 + s[:, None, None, None] / self.schedule.t_max)
        return Prediction.from_x0(x0, x_t, t, self.schedule).as_kind(self.kind)

    def enable_gradient_checkpointing(self, _function):
        pass


class OwnScore(nn.Module):
    """The exact denoiser of the one-step samples that a student of a flow, affine in its noise, makes now."""

    def __init__(self, student: nn.Module, tells_end: bool = True) -> None:
        super().__init__()
        self.student, self.tells_end = (student,), tells_end
        self.register_buffer("anchor", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def law(self) -> Gaussian:
        z, none = spatial(torch.eye(3, 2, dtype=torch.float64)), torch.zeros(3, dtype=torch.float64)
        end = [time_features([none])] if self.tells_end else []
        samples = (z - self.student[0](z, none + 1000, None, *end)).flatten(1)  # the last is that of no noise
        A = (samples[:2] - samples[2]).T
        return Gaussian(samples[2], A @ A.T)

    def forward(self, x_t: torch.Tensor, time: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return ExactNetwork(self.law(), FlowSchedule(), "flow")(x_t, time, labels)

    def enable_gradient_checkpointing(self, _function):
        pass


def teacher_network(process: str, law: Gaussian = LAW) -> ExactNetwork:
    schedule, kind, *_ = PROCESSES[process]
    return ExactNetwork(law, schedule, kind)


def settings(**changes) -> Settings:
    return Settings(**{"train_batch_size": 2, "lora_rank": 2, "report_to": "none"} | changes)


def sd_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(3, 16, 16, generator=generator)
    cond, null = Conditioning({"prompt_embeds": embeds[:2]}), Conditioning({"prompt_embeds": embeds[2:]})
    return Batch(torch.arange(2), cond, null, (4, 16, 16), torch.randn(2, 4, 16, 16, generator=generator))


class Latents:
    """Data in memory."""

    def __init__(self, latents: torch.Tensor) -> None:
        self.latents, self.rejects = latents, Rejects(len(latents), source="memory")

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, visit):
        return {"prompt": "a sample", "latents": self.latents[getattr(visit, "item", visit)]}

    def collate(self, items):
        return {"prompt": [item["prompt"] for item in items], "latents": torch.stack([i["latents"] for i in items])}
