"""Stage 7: what the benchmark compares with: reference features, and the latents of the kernel teacher.

    python make_references.py --data emoji.parquet --teacher teacher --towers towers --output assets

Writes ``references/emoji-test.npz`` and ``references/emoji-validation.npz``: measuring-tower features of the
autoencoder's reconstructions of the two held-out halves, so that the autoencoder itself costs no student anything;
``references/teacher-50-w1.npz``: of the teacher's own samples for the test prompts; and ``kernel_latents.safetensors``
with ``kernel_latents.json``: scaled training latents of a few caption groups.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import torch
from assemble import load_pipeline
from common import Rows, sha256
from safetensors.torch import save_file
from train_autoencoder import reconstruct

from fastdiff.evaluation.extractors import ClipTower
from fastdiff.evaluation.features import ImageFeatures
from fastdiff.evaluation.generation import generate, sample_seeds

KERNEL_GROUPS = ("an animal", "a fruit", "a vehicle", "a smiling face", "a clock", "a heart", "a building", "a flower")
KERNEL_PER_GROUP = 48


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """[0, 1] float -> uint8."""
    return images.clamp(0, 1).mul(255).round().to(torch.uint8)


def write_kernel_latents(vae, rows: Rows, output: Path, seed: int) -> None:
    """Scaled latents (N, 8, 8, 8) in half precision with their group number, and the groups' captions."""
    generator = torch.Generator().manual_seed(seed)
    chosen, groups = [], []
    for number, caption in enumerate(KERNEL_GROUPS):
        members = torch.tensor([i for i, c in enumerate(rows.captions["group"]) if c == caption])
        members = members[torch.randperm(len(members), generator=generator)[:KERNEL_PER_GROUP]]
        chosen.append(members)
        groups += [number] * len(members)
    latents = reconstruct(vae, rows.unit(torch.cat(chosen)))[1] * vae.config.scaling_factor
    tensors = {"latents": latents.half().contiguous(), "groups": torch.tensor(groups, dtype=torch.int64)}
    save_file(tensors, output / "kernel_latents.safetensors")
    facts = {
        "groups": list(KERNEL_GROUPS),
        "counts": [Counter(groups)[n] for n in range(len(KERNEL_GROUPS))],
        "scaling_factor": vae.config.scaling_factor,
        "pooled_std": round(latents.std().item(), 4),
        "seed": seed,
    }
    (output / "kernel_latents.json").write_text(json.dumps(facts, indent=2) + "\n")


def write_real(vae, tower: ClipTower, data: Path, references: Path, facts: dict) -> None:
    """Features of the reconstructions of both held-out halves."""
    for split in ("test", "validation"):
        images = to_bytes(reconstruct(vae, Rows(data, split).unit())[0])
        features = ImageFeatures.of(images, tower, source=f"reconstructions of {split}", **facts)
        features.save(references / f"emoji-{split}.npz")


def write_teacher(pipeline, tower: ClipTower, prompts: list[str], references: Path, seed: int, facts: dict) -> None:
    """Features of the teacher's samples; ``seed`` is of a stream that no protocol uses."""
    seeds = sample_seeds(seed, "reference", len(prompts))
    images = generate(pipeline, prompts, seeds, 50, 1.0, batch_size=125, extra={"height": 32, "width": 32}).images
    source = "teacher, 50 DDIM steps, w = 1, test prompts"
    ImageFeatures.of(images, tower, source=source, seed=seed, **facts).save(references / "teacher-50-w1.npz")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "teacher", "towers", "prompts", "output"):
        flags.add_argument(f"--{name}", type=Path, required=True)
    flags.add_argument(
        "--parts", nargs="+", choices=("real", "kernel", "teacher"), default=("real", "kernel", "teacher")
    )
    flags.add_argument(
        "--seed", type=int, default=77, help="of the teacher's samples; differs from the protocols' own"
    )
    settings = flags.parse_args()
    torch.set_num_threads(1)

    tower = ClipTower.from_folder(settings.towers / "measuring")
    pipeline, references = load_pipeline(settings.teacher), settings.output / "references"
    facts = {"resolution": 32}
    for part in ("vae", "unet"):
        facts[f"{part}_sha256"] = sha256(settings.teacher / part / "diffusion_pytorch_model.safetensors")
    if "real" in settings.parts:
        write_real(
            pipeline.vae, tower, settings.data, references, {k: v for k, v in facts.items() if k != "unet_sha256"}
        )
    if "kernel" in settings.parts:
        write_kernel_latents(pipeline.vae, Rows(settings.data, "train"), settings.output, seed=0)
    if "teacher" in settings.parts:
        lines = (settings.prompts / "emoji_test.jsonl").read_text().splitlines()
        prompts = [json.loads(line)["prompt"] for line in lines]
        write_teacher(pipeline, tower, prompts, references, settings.seed, facts)


if __name__ == "__main__":
    main()
