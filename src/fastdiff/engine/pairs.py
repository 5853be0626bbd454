"""Pairs of noise and the teacher's deterministic sample from it, made once and read by every method that needs pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastdiff.data import CacheMeta, CacheWriter, ImageTextData
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.randomness import Randomness
from fastdiff.diffusion.solvers import Solver, invert, solve, teacher_times
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.roles import TEACHER, Roles, anchor
from fastdiff.models.teacher import TeacherLike


@dataclass(frozen=True)
class PairSettings:
    """How pairs are made; all of it must agree for a folder to be extended.

    Args:
        num_inference_steps: steps of the solver.
        guidance_scale: w of the teacher, 1 means none.
        solver: ddim (Euler for flows), heun (second order, two calls a step) or dpm++ (DPM-Solver++ 2M).
        seed: of the noise, which depends on it and on the position of the pair only.
        real_share: share of pairs that are images of --real_images with the noise from which the teacher would make
            them (DDIM backwards), as 2-rectified flow++ mixes them in (arXiv 2405.20320).
    """

    num_inference_steps: int = 25
    guidance_scale: float = 6.0
    solver: Solver = "dpm++"
    seed: int = 0
    real_share: float = 0.0

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {self.num_inference_steps}")
        if not 0 <= self.guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale must be a finite number of at least 0, got {self.guidance_scale}")
        if not 0 <= self.real_share <= 1:
            raise ValueError(f"real_share must be from 0 to 1, got {self.real_share}")

    def is_real(self, position: int) -> bool:
        """Whether the pair at this position is an inverted image; spread evenly."""
        return int((position + 1) * self.real_share) > int(position * self.real_share)


def build_pairs(
    folder: Path,
    teacher: TeacherLike,
    prompts: Sequence[str],
    settings: PairSettings,
    count: int,
    resolution: int,
    *,
    images: ImageTextData | None = None,
    embeddings: bool = True,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    batch_size: int = 16,
    shard_size: int = 1024,
) -> int:
    """Writes `count` pairs as a cache with the fields `noise` and `latents`; goes on where it stopped.

    The pair at position p takes prompt p modulo their number. Noise is rounded to `dtype` before it is solved, so that
    what is stored is what the sample was made from. Batches do not straddle files: a run that was killed and resumed
    writes the same files as a straight one.

    Args:
        folder: new, or begun with the same settings; a larger `count` extends it.
        teacher: whose samples they are.
        prompts: at least one.
        settings: solver, guidance and seed.
        resolution: image side in pixels.
        images: captioned images for the share of real pairs.
        embeddings: store the prompts' embeddings too; without them training encodes the prompts.
        dtype: of stored noise and samples.
        compute_dtype: what the network computes in; its own type if not given.
        batch_size, shard_size: pairs solved at once, and pairs a file.

    Returns:
        The number of pairs in the folder.

    Raises:
        CacheMismatchError: if the folder was begun with other settings, prompts or another teacher.
        CacheError: for a folder of something else, or samples that are not finite.
        ValueError: if there are no prompts, or real pairs are wanted without images.
    """
    if not prompts or count < 1:
        raise ValueError(f"{count} pairs from {len(prompts)} prompts: at least one of each is needed")
    if settings.real_share and images is None:
        raise ValueError(f"real_share is {settings.real_share}, but there are no images: give --real_images")
    details = {"kind": "pairs", **asdict(settings), "embeddings": embeddings, "prompts": _digest(prompts)}
    if images is not None:
        details |= {"images": _digest([images.images.caption(n) for n in range(len(images))])}
    meta = CacheMeta(teacher.identity()["fingerprint"], resolution, str(dtype).removeprefix("torch."), details)
    with CacheWriter(folder, meta, shard_size) as writer:
        if embeddings:
            writer.write_null({name: tensor[0] for name, tensor in teacher.null(resolution).tensors.items()})
        maker = _Maker(teacher, prompts, settings, resolution, images, dtype, compute_dtype)
        with tqdm(total=count, initial=min(writer.next_position, count), desc="pairs", unit="pair") as bar:
            for positions in _groups(writer.next_position, count, batch_size, shard_size):
                for record, caption, position in maker.make(positions, embeddings):
                    writer.add(record, caption, position)
                bar.update(len(positions))
    return writer.count


class _Maker:
    """Solves one batch of positions."""

    def __init__(
        self,
        teacher: TeacherLike,
        prompts: Sequence[str],
        settings: PairSettings,
        resolution: int,
        images: ImageTextData | None,
        dtype: torch.dtype,
        compute_dtype: torch.dtype | None,
    ) -> None:
        weight = anchor(teacher.network)
        self.teacher, self.prompts, self.settings, self.images = teacher, prompts, settings, images
        self.resolution, self.dtype, self.device = resolution, dtype, weight.device
        self.shape = teacher.latent_shape(resolution)
        self.schedule = teacher.schedule_at(resolution)
        self.times = teacher_times(self.schedule, settings.num_inference_steps)
        self.null = teacher.null(resolution).to(self.device)
        roles = Roles(teacher.network, {})
        kind, computed = teacher.prediction_type, compute_dtype or weight.dtype
        self.denoiser = Denoiser(roles, teacher.family, self.schedule, kind, computed)

    @torch.no_grad()
    def make(self, positions: range, embeddings: bool) -> Iterator[tuple[dict[str, Tensor], str, int]]:
        """(fields, caption, position) of each pair."""
        items = [self._item(position) for position in positions]
        cond = self.teacher.encode([caption for caption, _ in items], self.resolution).to(self.device)
        noise, latents = self._pairs(positions, cond, [image for _, image in items])
        for row, (caption, _) in enumerate(items):
            stored = {name: tensor[row] for name, tensor in cond.tensors.items()} if embeddings else {}
            yield stored | {"noise": noise[row], "latents": latents[row]}, caption, positions[row]

    def _item(self, position: int) -> tuple[str, Tensor | None]:
        if not self.settings.real_share or not self.settings.is_real(position):
            return self.prompts[position % len(self.prompts)], None
        place = int(position * self.settings.real_share) % len(self.images)
        item = self.images[place]
        self.images.rejects.absorb(item["rejected"])
        return item["prompt"], item["image"]

    def _pairs(self, positions: range, cond: Conditioning, images: list[Tensor | None]) -> tuple[Tensor, Tensor]:
        random = Randomness(self.settings.seed, 0, torch.tensor(positions, device=self.device))
        noise = random.normal("pairs/noise", self.shape).to(self.dtype)
        latents = torch.empty_like(noise)
        made = [row for row, image in enumerate(images) if image is None]
        real = [row for row, image in enumerate(images) if image is not None]
        if made:
            found = solve(self._predict(cond, made), noise[made].float(), self.times, self.settings.solver)
            latents[made] = found.to(self.dtype)
        if real:
            pixels = torch.stack([images[row] for row in real]).to(self.device)
            posterior = random.normal("autoencoder", self.shape)[real]
            latents[real] = self.teacher.encode_images(pixels, posterior).to(self.dtype)
            found = invert(self._predict(cond, real), latents[real].float(), self.times, self.schedule)
            noise[real] = found.to(self.dtype)
        return noise, latents

    def _predict(self, cond: Conditioning, rows: list[int]):
        asked = cond[torch.tensor(rows, device=self.device)]

        def predict(x: Tensor, t: Tensor) -> Prediction:
            return self.denoiser(x, t, asked, TEACHER, self.null, self.settings.guidance_scale)

        return predict


def _groups(start: int, count: int, batch_size: int, shard_size: int) -> Iterator[range]:
    """Batches of positions that do not straddle shards."""
    while start < count:
        end = min(start + batch_size, (start // shard_size + 1) * shard_size, count)
        yield range(start, end)
        start = end


def _digest(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]
