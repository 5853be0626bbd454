"""Exact students of linear couplings, their pairs, and stock sampling, for the methods on straight lines."""

from __future__ import annotations

from dataclasses import replace

import torch
from method_helpers import SD, SD_BETAS, batch_of, f64, spatial
from torch import Tensor, nn

from fastdiff.data.rejects import Rejects
from fastdiff.diffusion import FlowSchedule, Gaussian, NoiseSchedule, Prediction
from fastdiff.methods import Batch
from fastdiff.models.sampler import SamplerSpec

FLOW = FlowSchedule()
KINDS = {"vp": (SD, "epsilon"), "v": (SD, "v_prediction"), "flow": (FLOW, "flow")}
LAW = Gaussian(f64([1.3, -0.4]), f64([[0.49, 0.1], [0.1, 0.3]]))


def root(cov: Tensor) -> Tensor:
    """The symmetric square root."""
    values, basis = torch.linalg.eigh(cov)
    return basis @ torch.diag(values.sqrt()) @ basis.T


A = root(LAW.cov)
"""x0 = mean + A z is the probability-flow ODE's exact map from pure noise (a flow's; a table of betas comes close)."""


def noise(rows: int, dim: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs(z: Tensor, x0: Tensor) -> Batch:
    """A batch of pairs from `(B, d)` noise and samples."""
    return replace(batch_of(len(z), z.shape[1], spatial(x0)), extra={"noise": spatial(z)})


class LinearNetwork(nn.Module):
    """A network whose clean prediction is affine: `maps(t)` -> (slope (B, d, d), offset (B, d))."""

    def __init__(self, schedule: NoiseSchedule, kind: str) -> None:
        super().__init__()
        self.schedule, self.kind = schedule, kind
        self.register_buffer("anchor", torch.zeros((), dtype=torch.float64))

    def maps(self, t: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("a subclass says")

    def forward(self, x_t: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        t = time / 1000 if isinstance(self.schedule, FlowSchedule) else time
        slope, offset = self.maps(t)
        x0 = (torch.einsum("bij,bj->bi", slope, x_t.flatten(1)) + offset).reshape(x_t.shape)
        return Prediction.from_x0(x0, x_t, t, self.schedule).as_kind(self.kind)

    def enable_gradient_checkpointing(self, _function) -> None:
        pass


class StraightNetwork(LinearNetwork):
    """The exact student of the coupling x0 = mean + A z on the straight line that starts at `start`."""

    def __init__(self, mean: Tensor, matrix: Tensor, schedule=SD, kind="epsilon", start: float | None = None) -> None:
        super().__init__(schedule, kind)
        self.mean, self.matrix = mean, matrix
        self.start = schedule.t_max if start is None else start

    def maps(self, t):
        alpha, sigma = self.schedule.alpha(t.double()), self.schedule.sigma(t.double())
        top = torch.tensor(self.start, dtype=torch.float64)
        on_noise = sigma / self.schedule.sigma(top)
        on_clean = (alpha - self.schedule.alpha(top) * on_noise)[:, None, None]
        # x_t = on_noise z + on_clean (mean + A z), solved for z
        solved = torch.linalg.inv(
            on_noise[:, None, None] * torch.eye(len(self.mean)).double() + on_clean * self.matrix
        )
        slope = self.matrix @ solved
        return slope, self.mean - (slope @ (on_clean[:, 0] * self.mean)[:, :, None])[:, :, 0]


class Free(LinearNetwork):
    """One trainable affine map for all times."""

    def __init__(self, slope: Tensor, offset: Tensor, schedule=SD, kind="epsilon") -> None:
        super().__init__(schedule, kind)
        self.slope, self.offset = nn.Parameter(slope.double().clone()), nn.Parameter(offset.double().clone())

    def maps(self, t):
        return self.slope.expand(len(t), -1, -1), self.offset.expand(len(t), -1)


def stock_samples(spec: SamplerSpec, network: nn.Module, z: Tensor, kind: str) -> Tensor:
    """`(B, d)` samples by the stock scheduler of the spec, from noise `(B, d)`, network and state in float64."""
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0} if kind == "flow" else SD_BETAS
    scheduler = spec.build_scheduler(config, kind)
    scheduler.set_timesteps(len(spec))
    x = spatial(z)
    for t in scheduler.timesteps:
        output = network(x, t.double().expand(len(x)), torch.zeros(len(x), dtype=torch.int64))
        x = scheduler.step(output, t, x).prev_sample.double()
    return x[:, :, 0, 0]


class PairData:
    """Pairs in memory, as `fastdiff pairs` stores them."""

    def __init__(self, z: Tensor, x0: Tensor, prompts: tuple[str, ...] = ("a sample",)) -> None:
        self.z, self.x0, self.prompts = z.float(), x0.float(), prompts
        self.rejects = Rejects(len(z), source="memory")

    def __len__(self) -> int:
        return len(self.z)

    def __getitem__(self, visit):
        item = getattr(visit, "item", visit)
        item = item if isinstance(item, int) else visit
        prompt = self.prompts[item % len(self.prompts)]
        return {"prompt": prompt, "noise": self.z[item], "latents": self.x0[item]}

    def collate(self, items):
        tensors = {name: torch.stack([item[name] for item in items]) for name in ("noise", "latents")}
        return tensors | {"prompt": [item["prompt"] for item in items]}
