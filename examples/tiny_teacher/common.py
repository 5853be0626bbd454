"""Helpers shared by the training scripts of the tiny teacher: data, seeds, time, metrics and records."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

LEVELS = ("group", "concept", "style")
LEVEL_PROBABILITIES = (0.25, 0.35, 0.40)


def parser(description: str, **defaults) -> argparse.ArgumentParser:
    """Flags that every stage has; ``defaults`` override theirs."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.add_argument("--data", type=Path, required=True, help="emoji.parquet")
    flags.add_argument("--output", type=Path, required=True, help="folder for weights and the record")
    flags.add_argument("--init_from", type=Path, default=None, help="folder of an earlier run to continue from")
    flags.add_argument("--minutes", type=float, default=10.0, help="wall-clock budget; the learning rate follows it")
    flags.add_argument("--steps", type=int, default=None, help="fixed number of steps instead (repeats a run exactly)")
    flags.add_argument("--batch", type=int, default=64)
    flags.add_argument("--lr", type=float, default=1e-3)
    flags.add_argument("--weight_decay", type=float, default=0.01)
    flags.add_argument("--ema", type=float, default=0.999)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--threads", type=int, default=1)
    flags.set_defaults(**defaults)
    return flags


def seed_everything(seed: int, threads: int = 1) -> torch.Generator:
    """Seed python, numpy and torch; returns a generator for what the script draws itself."""
    torch.set_num_threads(threads)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


class Rows:
    """The data set in memory: uint8 images (N, 3, 32, 32) and the three captions of each."""

    def __init__(self, path: Path, split: str | None = None):
        import pyarrow.parquet as pq

        table = pq.read_table(path)
        rows = [r for r in table.to_pylist() if split is None or r["split"] == split]
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(r["image"])).convert("RGB")) for r in rows])
        self.images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        self.captions = {level: [r[f"caption_{level}"] for r in rows] for level in LEVELS}
        self.concepts = [r["concept"] for r in rows]
        self.styles = [r["style"] for r in rows]

    def __len__(self) -> int:
        return len(self.images)

    def unit(self, index=slice(None)) -> torch.Tensor:
        """Images as float in [0, 1]."""
        return self.images[index].float().div_(255)


def epochs(count: int, batch: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless batches of indices: every index once an epoch, in a new order each time."""
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - batch + 1, batch):
            yield order[start : start + batch]


class Progress:
    """How much of the budget (steps if given, else minutes) is spent, and the cosine learning rate that follows it."""

    def __init__(self, minutes: float, steps: int | None, warmup: int = 100):
        self.seconds, self.steps, self.warmup = minutes * 60, steps, warmup
        self.start, self.step, self.stopped, self.end = time.monotonic(), 0, False, None

    @property
    def elapsed(self) -> float:
        """Seconds since the start, up to the end of training once that is reached."""
        return (self.end or time.monotonic()) - self.start

    @property
    def fraction(self) -> float:
        spent = self.step / self.steps if self.steps else self.elapsed / self.seconds
        return min(1.0, spent)

    @property
    def done(self) -> bool:
        if self.end is None and (self.stopped or self.fraction >= 1.0):
            self.end = time.monotonic()
        return self.end is not None

    def rate(self) -> float:
        """Multiplier of the learning rate: linear warm-up, then half a cosine down to zero."""
        return min(1.0, (self.step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * self.fraction))

    def advance(self, optimizer: torch.optim.Optimizer, lr: float) -> None:
        self.step += 1
        for group in optimizer.param_groups:
            group["lr"] = lr * self.rate()


def split_decay(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups: decay for matrices and kernels, none for biases, gains and scalars."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]


def psnr(squared_error: float) -> float:
    """Decibel of a mean squared error in [0, 1] range, pooled over all images."""
    return -10 * math.log10(squared_error)


def retrieval_at_1(images: torch.Tensor, texts: torch.Tensor) -> float:
    """Share of images whose nearest text (cosine) is their own; features (N, D)."""
    images, texts = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (images, texts))
    return (images @ texts.T).argmax(1).eq(torch.arange(len(images))).float().mean().item()


def count_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_record(folder: Path, settings: argparse.Namespace, **facts) -> None:
    """``training.json`` beside the weights: settings without machine paths, metrics, seconds, versions.

    A stage continued from earlier weights carries the earlier stage's record along.
    """
    plain = {k: (v.name if isinstance(v, Path) else v) for k, v in vars(settings).items()}
    versions = {"torch": torch.__version__}
    record = {"settings": plain, "versions": versions, **facts}
    if settings.init_from and (settings.init_from / "training.json").exists():
        record["continued_from"] = json.loads((settings.init_from / "training.json").read_text())
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def replace_folder(ready: Path, target: Path) -> None:
    """Put a finished folder in the place of another one in two renames, so that readers never see half a folder."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(ready, target)
    shutil.rmtree(old, ignore_errors=True)


def image_grid(images: torch.Tensor, columns: int, scale: int = 2) -> Image.Image:
    """Picture of (N, 3, H, W) images in [0, 1] in rows of ``columns``, enlarged by pixel repetition."""
    pixels = images.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    pad = np.pad(pixels, ((0, (-len(pixels)) % columns), (1, 1), (1, 1), (0, 0)), constant_values=200)
    rows = [np.concatenate(list(pad[i : i + columns]), axis=1) for i in range(0, len(pad), columns)]
    sheet = Image.fromarray(np.concatenate(rows, axis=0))
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)


# --- text and contrastive training -----------------------------------------------------------------------------------

CONTEXT = 24
MERGES = 3582
"""The first merges of open_clip's BPE: 512 bytes + 3,582 merges + 2 marks = a vocabulary of 4,096."""


def write_bpe(path: Path) -> Path:
    """A truncated copy of open_clip's merge table, readable by ``open_clip.SimpleTokenizer(bpe_path=...)``."""
    import gzip

    import open_clip

    source = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(source.read_bytes()).decode().split("\n")
    path.write_bytes(gzip.compress("\n".join(lines[: MERGES + 1]).encode(), mtime=0))
    return path


def open_clip_tokenizer(bpe: Path):
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(bpe_path=str(bpe), context_length=CONTEXT)


def random_shift(images: torch.Tensor, pixels: int, generator: torch.Generator) -> torch.Tensor:
    """Each image (B, C, H, W) moved by up to ``pixels`` in both directions, white flowing in."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (pixels,) * 4, value=1.0)
    dy, dx = torch.randint(0, 2 * pixels + 1, (2, count, 1), generator=generator)
    rows, columns = dy + torch.arange(height), dx + torch.arange(width)
    return padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def colour_jitter(images: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    """Contrast, saturation and a tint of each image (B, 3, H, W) in [0, 1] changed by up to ``strength``."""
    draw = 1 + strength * (2 * torch.rand(3, len(images), 1, 1, 1, generator=generator) - 1)
    tint = 1 + 0.5 * strength * (2 * torch.rand(len(images), 3, 1, 1, generator=generator) - 1)
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * draw[0]
    images = 1 + (images - 1) * draw[1] * tint
    return images.clamp(0, 1)


def train_contrastive(
    settings, encode_image, encode_text, modules: torch.nn.ModuleList, logit_scale, train: Rows, tokens
):
    """Train two encoders with open_clip's ClipLoss; returns the EMA and the number of steps.

    ``encode_image`` takes images in [0, 1], ``encode_text`` token ids; both return unit features (B, D).
    ``tokens[level]`` are the ids (N, CONTEXT) of the training captions. ``settings.levels`` are the level's weights.
    """
    from diffusers.training_utils import EMAModel
    from open_clip.loss import ClipLoss

    generator = torch.Generator().manual_seed(settings.seed + 1)
    parameters = [*modules.parameters(), logit_scale]
    groups = split_decay(modules, settings.weight_decay) + [{"params": [logit_scale], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98))
    average, loss_function = EMAModel(parameters, decay=settings.ema), ClipLoss()
    progress, batches = Progress(settings.minutes, settings.steps), epochs(len(train), settings.batch, generator)
    levels = torch.tensor(settings.levels)
    modules.train()
    while not progress.done:
        index = next(batches)
        level = torch.multinomial(levels, len(index), replacement=True, generator=generator)
        ids = torch.stack([tokens[name][index] for name in LEVELS])[level, torch.arange(len(index))]
        images = random_shift(train.unit(index), settings.shift, generator)
        images = colour_jitter(images, settings.jitter, generator).contiguous(memory_format=torch.channels_last)
        loss = loss_function(encode_image(images), encode_text(ids), logit_scale.exp())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        progress.advance(optimizer, settings.lr)
        optimizer.step()
        logit_scale.data.clamp_(max=math.log(100))
        average.step(parameters)
        if progress.step % 50 == 0:
            print(f"{progress.elapsed:.0f} s, step {progress.step}, loss {loss.item():.3f}", flush=True)
    return average, progress
