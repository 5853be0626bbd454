"""From training data to the batches a method sees; text encoder and autoencoder run only for what is not cached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastdiff.data.sampler import EpochPermutation, StepBatches
from fastdiff.data.source import ChosenData, TrainingData
from fastdiff.diffusion.randomness import Randomness
from fastdiff.engine.settings import Settings
from fastdiff.methods import Batch, Method
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.teacher import TeacherLike

_MEMORY_BYTES = 2 << 30
"""Of encoded prompts that are kept, in the host's memory: a row is 0.6 MB for SDXL and 8.4 MB for FLUX."""


def chosen_data(method: Method, data: TrainingData, teacher: TeacherLike, settings: Settings) -> TrainingData:
    """What of the data a method trains on: all of it, or the samples it chooses by their prompts."""
    resolution = settings.resolution or teacher.default_resolution
    items = method.choose(_Captions(data), lambda prompts: teacher.encode(prompts, resolution))
    return data if items is None else ChosenData(data, items)


class _Captions(Sequence):
    """The prompts of data, one at a time."""

    def __init__(self, data: TrainingData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> str:
        if index >= len(self):
            raise IndexError(index)
        return self.data.caption(index)


class Batches:
    """Yields the micro-batches of every step, the same whatever the number of processes.

    Args:
        data: prompts, captioned images or cached tensors.
        teacher: encodes what is not cached.
        settings: batch sizes, seed and resolution.
        device: where batches go.
        rank, world: this process and how many there are.
    """

    def __init__(
        self, data: TrainingData, teacher: TeacherLike, settings: Settings, device: torch.device, rank: int, world: int
    ) -> None:
        self.data = data
        self.teacher = teacher
        self.settings = settings
        self.device = device
        self.rank, self.world = rank, world
        self.resolution = settings.resolution or teacher.default_resolution
        self.latent_shape = teacher.latent_shape(self.resolution)
        self.null = teacher.null(self.resolution).to(device)
        self._rows: dict[str, Conditioning] = {}
        self._row_bytes = sum(tensor.numel() * tensor.element_size() for tensor in self.null.tensors.values())

    def steps(self, first_step: int) -> Iterator[list[Batch]]:
        """The micro-batches of step `first_step`, then of the next, up to the last."""
        settings = self.settings
        accumulation, size = settings.gradient_accumulation_steps, settings.train_batch_size
        order = StepBatches(
            EpochPermutation(len(self.data), settings.seed),
            batch_size=size,
            first_step=first_step,
            last_step=settings.max_train_steps,
            accumulation=accumulation,
            rank=self.rank,
            world=self.world,
        )
        loader = iter(
            DataLoader(
                self.data,
                batch_sampler=order,
                collate_fn=self.data.collate,
                num_workers=settings.dataloader_num_workers,
                pin_memory=self.device.type == "cuda",
            )
        )
        for step in order.steps:
            yield [self._batch(next(loader), step, micro) for micro in range(accumulation)]

    def _batch(self, items: dict[str, Any], step: int, micro: int) -> Batch:
        size = self.settings.train_batch_size
        start = ((step * self.settings.gradient_accumulation_steps + micro) * self.world + self.rank) * size
        indices = torch.arange(start, start + size).to(self.device, non_blocking=True)
        if "rejected" in items:
            self.data.rejects.absorb(items["rejected"])
        return Batch(
            indices=indices,
            cond=self._conditioning(items),
            null=self.null,
            latent_shape=self.latent_shape,
            latents=self._latents(items, Randomness(self.settings.seed, step, indices)),
            extra={n: items[n].to(self.device, torch.float32, non_blocking=True) for n in ("noise",) if n in items},
            prompts=tuple(items.get("prompt", ())),
        )

    def _latents(self, items: dict[str, Any], random: Randomness) -> Tensor | None:
        if "latents" in items:
            return items["latents"].to(self.device, torch.float32, non_blocking=True)
        if "image" not in items:
            return None
        images = items["image"].to(self.device, non_blocking=True)
        return self.teacher.encode_images(images, random.normal("autoencoder", self.latent_shape))

    def _conditioning(self, items: dict[str, Any]) -> Conditioning:
        names = self.null.tensors
        if all(name in items for name in names):
            return Conditioning({name: items[name].to(self.device, non_blocking=True) for name in names})
        prompts = items["prompt"]
        new = sorted({prompt for prompt in prompts if prompt not in self._rows})
        if new:
            if (len(self._rows) + len(new)) * self._row_bytes > _MEMORY_BYTES:
                self._rows.clear()
                new = sorted(set(prompts))
            encoded = self.teacher.encode(new, self.resolution)
            self._rows.update({prompt: self._kept(encoded[row : row + 1]) for row, prompt in enumerate(new)})
        return Conditioning.cat([self._rows[prompt].to(self.device) for prompt in prompts])

    def _kept(self, row: Conditioning) -> Conditioning:
        """A copy of its own on the host; pinned, it goes there and back in the device's own order, and nobody waits."""

        def copy(tensor: Tensor) -> Tensor:
            kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            return kept.copy_(tensor, non_blocking=True)

        return Conditioning({name: copy(tensor) for name, tensor in row.tensors.items()})
