"""Small trainable networks for closed-form teachers: `network(x_t, time, labels)` -> native prediction like `x_t`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

_TIME_FEATURES = 32


class PointNet(nn.Module):
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

    def forward(self, x_t: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        embedding = self.time(time_features(time).to(x_t.dtype)) + self.label(labels + 1)
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


class ClassUNet(nn.Module):
    """A small class-conditional diffusers UNet for samples `(channels, side, side)`; class 0 stands for none."""

    feature_tap = "unet.mid_block"

    def __init__(self, channels: int, side: int, classes: int, widths: tuple[int, int] = (64, 128)) -> None:
        from diffusers import UNet2DModel

        super().__init__()
        self.feature_channels = widths[-1]
        self.unet = UNet2DModel(
            sample_size=side,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=widths,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=32,
            norm_num_groups=16,
            num_class_embeds=classes + 1,
        )

    def forward(self, x_t: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        return self.unet(x_t, time, class_labels=labels + 1, return_dict=False)[0]

    def enable_gradient_checkpointing(self, function: Callable) -> None:
        """As for any diffusers network."""
        self.unet.enable_gradient_checkpointing(function)


def time_features(time: Tensor) -> Tensor:
    """Sines and cosines `(B, 32)` of a network time up to 1000, from one turn over the range to sixteen."""
    angles = (time / 1000 * math.pi)[:, None] * torch.arange(1, _TIME_FEATURES // 2 + 1, device=time.device)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
