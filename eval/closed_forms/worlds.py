"""Three teachers in closed form, the data and pairs that methods may ask for, and the networks that students start from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdiff.data import PromptData
from fastdiff.diffusion.kernel import KernelTeacher
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.randomness import Randomness
from fastdiff.models.analytic import AnalyticTeacher, pretrain
from fastdiff.models.analytic_networks import ResidualNet
from fastdiff.models.sampler import SamplerSpec, sample

ROWS = 8192
PAIR_STEPS = 50  # of DDIM by the exact teacher: the trajectory that pairs and baselines follow
RING_CENTRE = (1.0, -0.6)
RING_BANDWIDTH = 0.08


@dataclass(frozen=True)
class Ring:
    """Narrow Gaussians of equal weights on a circle, one caption."""

    radius: float
    modes: int
    centre: tuple[float, float] = RING_CENTRE


NESTED = {"inner ring": Ring(0.5, 5), "outer ring": Ring(1.2, 7)}
FAR = {"left ring": Ring(0.6, 5, (-1.2, -0.6)), "right ring": Ring(0.6, 7, (1.2, 0.6))}
EQUAL = {"left ring": Ring(0.9, 5, (0.1, -0.6)), "right ring": Ring(0.9, 7, (1.0, -0.6))}


@dataclass(frozen=True)
class World:
    """A teacher and how it is learned and judged.

    Args:
        name: in the results.
        build: a fresh teacher; its `start` is untrained.
        pretrain_steps: of the network that students and critics start from.
        samples: drawn for each caption when a student is judged.
        headline: the figure it is judged by.
    """

    name: str
    build: Callable[[], AnalyticTeacher]
    pretrain_steps: int
    samples: int
    headline: str


def gaussian() -> AnalyticTeacher:
    """N(mean, cov) in two dimensions, correlated and off centre."""
    mean = torch.tensor([0.7, -0.4], dtype=torch.float64)
    cov = torch.tensor([[0.64, 0.2], [0.2, 0.5]], dtype=torch.float64)
    return AnalyticTeacher.gaussian(mean, cov, start=_network(2, 1, 96, 2), prediction_type="v_prediction")


def rings(width: int = 96, depth: int = 2, parts: Mapping[str, Ring] = NESTED) -> AnalyticTeacher:
    """Narrow Gaussians in the plane on two rings, which are the two captions."""
    points, groups = [], []
    for group, ring in enumerate(parts.values()):
        angle = 2 * math.pi * torch.arange(ring.modes, dtype=torch.float64) / ring.modes
        points.append(torch.tensor(ring.centre) + ring.radius * torch.stack([angle.cos(), angle.sin()], dim=1))
        groups += [group] * ring.modes
    law = KernelTeacher(torch.cat(points)[:, :, None, None], torch.tensor(groups), RING_BANDWIDTH)
    captions = {caption: group for group, caption in enumerate(parts)}
    start = _network(2, len(captions), width, depth)
    return AnalyticTeacher(law, (2, 1, 1), captions, prediction_type="v_prediction", start=start, source="two-rings")


def small_rings() -> AnalyticTeacher:
    """The nested rings with a student of about a tenth of the weights."""
    return rings(32, 1)


def far_rings() -> AnalyticTeacher:
    """Captions that little noise tells apart: guidance changes little."""
    return rings(parts=FAR)


def equal_rings() -> AnalyticTeacher:
    """Captions that overlap: guidance changes much."""
    return rings(parts=EQUAL)


def kernel() -> AnalyticTeacher:
    """The shipped kernel density over 375 latents, with a smaller network than the example's, for time's sake."""
    teacher = AnalyticTeacher.kernel()
    start = _network(math.prod(teacher.shape), len(teacher.captions), 256, 3)
    return AnalyticTeacher.kernel(start=start, prediction_type="v_prediction")


def _network(size: int, captions: int, width: int, depth: int) -> ResidualNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ResidualNet(size, captions, width=width, depth=depth)


WORLDS = {
    world.name: world
    for world in (
        World("gaussian", gaussian, 500, 4000, "wasserstein"),
        World("mixture", rings, 1200, 4000, "sliced_wasserstein"),
        World("kernel", kernel, 1000, 1000, "total_variation"),
    )
}


def started(world: World, folder: Path) -> AnalyticTeacher:
    """The teacher with its starting network fitted, one for all seeds as a teacher's weights are; kept in `folder`."""
    teacher, file = world.build(), folder / f"{world.name}.safetensors"
    if world.pretrain_steps == 0:
        return teacher
    if file.is_file():
        teacher.start.load_state_dict(load_file(file))
    else:
        pretrain(teacher.start, teacher, world.pretrain_steps, batch_size=256)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(teacher.start.state_dict(), file)
    return teacher


class Draws(PromptData):
    """Captions with exact latents of a teacher; as pairs, with the noise that its own sampler takes to them.

    An item is its number, and a batch is taken whole: reading rows one by one would cost more than training on them.
    """

    def __init__(self, captions: list[str], **tensors: Tensor) -> None:
        super().__init__(captions)
        self.tensors = tensors

    def __getitem__(self, index):
        return index if isinstance(index, int) else index.item

    def collate(self, items):
        return {"prompt": [self.prompts[item] for item in items]} | {n: t[items] for n, t in self.tensors.items()}


@cache
def draws(world: World, pairs: bool) -> Draws:
    """The data of all runs in a world."""
    teacher = world.build()
    captions = [caption for caption, _ in zip(_cycle(teacher.captions), range(ROWS))]
    labels = teacher.encode(captions, 0).tensors["labels"]
    random = Randomness(1, 0, torch.arange(ROWS))
    z = random.normal("z", teacher.shape)
    if not pairs:
        return Draws(captions, latents=teacher.sample(z, random.uniform("mode"), labels), labels=labels)
    samples = teacher_samples(teacher, SamplerSpec.trailing("ddim", PAIR_STEPS), z, labels)
    return Draws(captions, latents=samples, noise=z, labels=labels)


@torch.no_grad()
def teacher_samples(teacher: AnalyticTeacher, spec: SamplerSpec, z: Tensor, labels: Tensor) -> Tensor:
    """What the exact teacher makes of the noise `z` `(B, C, H, W)` with a sampler."""
    random = Randomness(3, 0, torch.arange(len(z)))

    def predict(x_t: Tensor, t: Tensor, _s: Tensor) -> Prediction:
        x0 = teacher.law.denoise(x_t, t, teacher.schedule, labels)
        return Prediction.from_x0(x0, x_t, t, teacher.schedule)

    return sample(spec, predict, z, lambda step: random.normal(f"step/{step}", teacher.shape), teacher.schedule)


def _cycle(captions):
    while True:
        yield from captions
