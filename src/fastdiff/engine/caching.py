"""Encodes data once: latents and text embeddings in a cache that training reads instead of running encoders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastdiff.data import CacheMeta, CacheWriter, ImageTextData, PromptData, RejectedImage
from fastdiff.data.transform import visit_rng
from fastdiff.diffusion.randomness import Randomness
from fastdiff.models.teacher import Teacher


@dataclass(frozen=True)
class _Item:
    position: int
    caption: str
    image: Tensor | None = None


def build_cache(
    folder: Path,
    teacher: Teacher,
    data: PromptData | ImageTextData,
    resolution: int,
    seed: int = 0,
    batch_size: int = 16,
    shard_size: int = 1024,
) -> int:
    """Writes a cache of prompts (embeddings) or captioned images (latents and embeddings); goes on where it stopped.

    An image is cropped once, as in the first epoch of a run, and its latent is one sample of the autoencoder's
    posterior; both follow from (seed, position) alone. The null conditioning is stored once.

    Args:
        folder: the cache folder, new or begun with the same settings.
        teacher: whose encoders run.
        data: prompts, or captioned images; unreadable ones are counted in `data.rejects` and left out.
        resolution: image side in pixels.
        seed: of the posterior's noise (that of crops is the data's).
        batch_size: samples encoded at once.
        shard_size: samples a file.

    Returns:
        The number of records in the cache.

    Raises:
        CacheMismatchError: if the folder was begun with other settings.
        CacheError: for non-finite tensors, or a folder of something else.
        TooManyRejects: above the data's share of unreadable images.
    """
    details = {"seed": seed}
    if isinstance(data, ImageTextData):
        details |= {"transform": repr(data.transform), "crop_seed": data.seed}
    meta = CacheMeta(teacher.identity()["fingerprint"], resolution, "float32", details)
    with CacheWriter(folder, meta, shard_size) as writer:
        writer.write_null({name: tensor[0] for name, tensor in teacher.null(resolution).tensors.items()})
        start = writer.next_position
        with tqdm(total=len(data), initial=start, desc="cache", unit="sample") as bar:
            for group in _groups(_items(data, start), batch_size):
                for item, tensors in zip(group, _encoded(teacher, group, resolution, seed), strict=True):
                    writer.add(tensors, item.caption, item.position)
                bar.update(group[-1].position + 1 - bar.n)
    return writer.count


def _items(data: PromptData | ImageTextData, start: int) -> Iterator[_Item]:
    for position in range(start, len(data)):
        if isinstance(data, PromptData):
            yield _Item(position, data.prompts[position])
            continue
        try:
            example = data.images[position]
        except RejectedImage as error:
            data.rejects.absorb([error.reject])
            continue
        yield _Item(position, example.caption, data.transform(example.image, visit_rng(data.seed, 0, position)))


def _groups(items: Iterator[_Item], size: int) -> Iterator[list[_Item]]:
    group: list[_Item] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _encoded(teacher: Teacher, group: list[_Item], resolution: int, seed: int) -> list[dict[str, Tensor]]:
    """The tensors of each item, without batch dimension."""
    fields = dict(teacher.encode([item.caption for item in group], resolution).tensors)
    if group[0].image is not None:
        device = next(teacher.pipeline.vae.parameters()).device
        images = torch.stack([item.image for item in group]).to(device)
        random = Randomness(seed, 0, torch.tensor([item.position for item in group], device=device))
        fields["latents"] = teacher.encode_images(
            images, random.normal("autoencoder", teacher.latent_shape(resolution))
        )
    return [{name: tensor[row] for name, tensor in fields.items()} for row in range(len(group))]
