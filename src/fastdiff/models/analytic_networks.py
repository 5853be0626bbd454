"""Small trainable networks for closed-form teachers: `network(x_t, time, labels)` -> native prediction like `x_t`."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TIME_FEATURES = 32


class WidenableNetwork(nn.Module):
    """A network that can be given a slot `timestep_cond` for further scalars, as networks of diffusers can."""

    @abstractmethod
    def widened(self, features: int) -> nn.Module:
        """A copy that takes `timestep_cond` `(B, features)` through a zero-initialised layer."""


class PointNet(WidenableNetwork):
    """A perceptron on the `size` numbers of a sample, with time and class embeddings.

    The output adds a multiple of the input that depends on time alone: an exact denoiser is linear far from the data.
    """

    feature_tap = "mid_block"

    def __init__(self, size: int, classes: int, width: int = 96) -> None:
        super().__init__()
        self.feature_channels = width
        self.time = nn.Sequential(nn.Linear(_TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width)
        self.enter = nn.Conv2d(size, width, 1)
        self.mid_block = nn.Sequential(nn.SiLU(), nn.Conv2d(width, width, 1), nn.SiLU())
        self.leave = nn.Conv2d(width, size, 1)
        self.skip = nn.Linear(width, 1)
        self.slot: nn.Linear | None = None

    def widened(self, features: int) -> PointNet:
        wide = copy.deepcopy(self)
        wide.slot = zero_linear(features, self.feature_channels, wide.skip.weight)
        return wide

    def forward(self, x_t: Tensor, time: Tensor, labels: Tensor, timestep_cond: Tensor | None = None) -> Tensor:
        embedding = self.time(time_features(time).to(x_t.dtype)) + self.label(labels + 1)
        if timestep_cond is not None:
            embedding = embedding + self.slot(timestep_cond.to(x_t.dtype))
        points = x_t.reshape(len(x_t), -1, 1, 1)
        hidden = self.mid_block(self.enter(points) + embedding[:, :, None, None])
        return (self.leave(hidden) + self.skip(embedding)[:, :, None, None] * points).reshape(x_t.shape)

    def enable_gradient_checkpointing(self, _function: Callable) -> None:
        """Too small to be worth it."""


class AffinePerBin(nn.Module):
    """One affine map a time bin, which is what the exact denoiser of a Gaussian is; labels change nothing.

    Args:
        size: numbers in a sample.
        times: the network time of each bin, rising; a time belongs to the nearest.
    """

    def __init__(self, size: int, times: Sequence[float]) -> None:
        super().__init__()
        centres = torch.tensor(times, dtype=torch.float64)
        self.register_buffer("edges", (centres[1:] + centres[:-1]) / 2)
        self.slopes = nn.Parameter(torch.zeros(len(times), size, size))
        self.offsets = nn.Parameter(torch.zeros(len(times), size))

    def forward(self, x_t: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        number = torch.bucketize(time.to(self.edges.dtype), self.edges)
        moved = torch.einsum("bij,bj->bi", self.slopes[number], x_t.flatten(1)) + self.offsets[number]
        return moved.reshape(x_t.shape)

    def enable_gradient_checkpointing(self, _function: Callable) -> None:
        """Nothing to recompute."""


class ResidualNet(WidenableNetwork):
    """A residual perceptron on all numbers of a larger sample, modulated by time and class.

    A density made of a few hundred modes is a matter of memory, not of locality, so this learns it several times faster
    than a convolutional network of the same cost. `mid_block` gives `(B, width, 1, 1)` for discriminator heads.
    """

    feature_tap = "mid_block"

    def __init__(self, size: int, classes: int, width: int = 512, depth: int = 4) -> None:
        super().__init__()
        self.feature_channels = width
        self.time = nn.Sequential(nn.Linear(_TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width)
        self.enter = nn.Linear(size, width)
        self.blocks = nn.ModuleList(_ModulatedBlock(width) for _ in range(depth))
        self.mid_block = nn.Sequential(nn.LayerNorm(width), nn.Unflatten(1, (width, 1, 1)))
        self.leave = nn.Linear(width, size)
        self.skip = nn.Linear(width, 1)
        self.slot: nn.Linear | None = None
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def widened(self, features: int) -> ResidualNet:
        wide = copy.deepcopy(self)
        wide.slot = zero_linear(features, self.feature_channels, wide.skip.weight)
        return wide

    def forward(self, x_t: Tensor, time: Tensor, labels: Tensor, timestep_cond: Tensor | None = None) -> Tensor:
        embedding = self.time(time_features(time).to(x_t.dtype)) + self.label(labels + 1)
        if timestep_cond is not None:
            embedding = embedding + self.slot(timestep_cond.to(x_t.dtype))
        embedding = F.silu(embedding)
        points = x_t.flatten(1)
        hidden = self.enter(points)
        for block in self.blocks:
            hidden = block(hidden, embedding)
        output = self.leave(self.mid_block(hidden).flatten(1)) + self.skip(embedding) * points
        return output.reshape(x_t.shape)

    def enable_gradient_checkpointing(self, _function: Callable) -> None:
        """Too small to be worth it."""


class _ModulatedBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.modulation = nn.Linear(width, 2 * width)
        self.enter, self.leave = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding).chunk(2, dim=1)
        return hidden + self.leave(F.silu(self.enter(self.norm(hidden) * (1 + scale) + shift)))


def zero_linear(inputs: int, outputs: int, like: Tensor) -> nn.Linear:
    """A layer without a bias that gives zeros, of the type and on the device of `like`."""
    layer = nn.Linear(inputs, outputs, bias=False, device=like.device, dtype=like.dtype)
    nn.init.zeros_(layer.weight)
    return layer


def time_features(time: Tensor) -> Tensor:
    """Sines and cosines `(B, 32)` of a network time up to 1000, from one turn over the range to sixteen."""
    angles = (time / 1000 * math.pi)[:, None] * torch.arange(1, _TIME_FEATURES // 2 + 1, device=time.device)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
