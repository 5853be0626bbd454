"""The benchmark's room in numbers: floor, reconstructions, the teacher at several step counts and guidances, and junk.

    python measure.py --data emoji.parquet --teacher teacher --towers towers --prompts eval/prompts --output room

Everything at n = 2,000 with measuring-tower features. ``fid`` is the Frechet distance to the reconstructions of the
validation half, for images made from the test prompts; ``to_teacher`` that to the teacher's 50-step samples at w = 1
with other noise. ``excess`` is (fid - floor) / (fid of the teacher at 50 steps and w = 1 - floor).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from assemble import load_pipeline
from common import LEVELS, Rows, image_grid
from make_references import to_bytes
from train_autoencoder import reconstruct

from fastdiff.evaluation.extractors import ClipTower, in_batches
from fastdiff.evaluation.features import ImageFeatures
from fastdiff.evaluation.generation import generate, sample_seeds
from fastdiff.evaluation.metrics import frechet_distance, gradient_energy, retrieval_hits

DEFAULT_ROWS = ("50/1", "50/1.5", "50/2", "50/3", "8/1", "4/1", "2/1", "1/1", "8/2", "4/2", "2/2", "1/2")


def variance_within(features: torch.Tensor, captions: list[str]) -> float:
    """Share of the features' total variance (trace) that lies within images of one caption (singletons count 0)."""
    number = {c: i for i, c in enumerate(dict.fromkeys(captions))}
    labels = torch.tensor([number[c] for c in captions])
    count = torch.bincount(labels).double()
    sums = torch.zeros(len(count), features.shape[1], dtype=torch.float64).index_add_(0, labels, features.double())
    residual = features.double() - (sums / count[:, None])[labels]
    unbiased = residual.square().sum(1) * (count / (count - 1).clamp(min=1))[labels]
    several = (count > 1)[labels]
    if not several.any():
        return 0.0
    return (unbiased[several].mean() / features.double().var(0).sum()).item()


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "teacher", "towers", "prompts", "references", "output"):
        flags.add_argument(f"--{name}", type=Path, required=True)
    flags.add_argument("--rows", nargs="*", default=DEFAULT_ROWS, help="steps/guidance of the teacher")
    flags.add_argument("--solver", default="DDIM")
    flags.add_argument("--seed", type=int, default=5)
    settings = flags.parse_args()
    torch.set_num_threads(1)
    settings.output.mkdir(parents=True, exist_ok=True)

    tower, pipeline = ClipTower.from_folder(settings.towers / "measuring"), load_pipeline(settings.teacher)
    lines = [json.loads(x) for x in (settings.prompts / "emoji_test.jsonl").read_text().splitlines()]
    prompts = [line["prompt"] for line in lines]
    blocks = [json.loads(x) for x in (settings.prompts / "emoji_retrieval.jsonl").read_text().splitlines()]
    place = {(x["prompt"], x["concept"], x["style"]): i for i, x in enumerate(lines)}
    chosen = torch.tensor([place[x["prompt"], x["concept"], x["style"]] for x in blocks])
    texts = tower.text_features([prompts[i] for i in chosen])
    reference = ImageFeatures.load(settings.references / "emoji-validation.npz", tower).features
    teacher = ImageFeatures.load(settings.references / "teacher-50-w1.npz", tower).features
    rows: dict[str, dict] = {}

    def report(name: str, images: torch.Tensor) -> None:
        features = in_batches(tower.image_features, images).half().float()
        hits = retrieval_hits(features[chosen], texts, [x["block"] for x in blocks])
        rows[name] = {
            "fid": round(frechet_distance(features, reference), 5),
            "to_teacher": round(frechet_distance(features, teacher), 5),
            "r1": round(hits.mean().item(), 4),
            "sharpness": round(gradient_energy(images).mean().item(), 5),
        }
        print(name, rows[name], flush=True)

    test = Rows(settings.data, "test")
    report("floor (reconstructions of the test half)", to_bytes(reconstruct(pipeline.vae, test.unit())[0]))
    report("real test half", test.images)
    for row in settings.rows:
        steps, w = row.split("/")
        seeds = sample_seeds(settings.seed, row, len(prompts))
        extra = {"height": 32, "width": 32}
        images = generate(pipeline, prompts, seeds, int(steps), float(w), batch_size=125, extra=extra).images
        report(f"teacher {settings.solver} {steps} steps, w = {w}", images)
        image_grid(images[:160].float() / 255, 20).save(settings.output / f"teacher_{steps}_{w}.png")
    train = Rows(settings.data, "train")
    report("mean training image", to_bytes(train.unit().mean(0)).expand(len(prompts), -1, -1, -1))
    noise = torch.randint(0, 256, (len(prompts), 3, 32, 32), generator=torch.Generator().manual_seed(0))
    report("uniform noise", noise.to(torch.uint8))

    features = in_batches(tower.image_features, train.images)
    within = {level: round(variance_within(features, train.captions[level]), 3) for level in LEVELS}
    facts = {"n": len(prompts), "seed": settings.seed, "variance_within_caption": within, "rows": rows}
    (settings.output / "room.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
