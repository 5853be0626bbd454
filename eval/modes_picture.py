"""Counts the modes that f-distill's divergences keep, and draws them: docs/images/modes.png.

    python eval/modes_picture.py

A student of six numbers, which draws a normal law, is trained by f-distill's own loss with exact scores and exact density
ratio on four narrow modes; it starts between two of them. So nothing decides but the divergence, and how much noise
scores are compared at: modes overlap under enough of it, and then the reverse KL finds them all too.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
DIVERGENCES = ("rkl", "js", "fkl")
NOISE = {"low noise": 200, "all noise": 980}  # the last index at which scores are compared; the first is 20
MEANS = ((1.2, 0.0), (-1.2, 0.0), (0.0, 1.2), (0.0, -1.2))
WIDTH = 0.15
START = (0.5, 0.2)
START_WIDTH = 0.3
STEPS, ROWS, LEARNING_RATE = 150, 256, 3e-2
SAMPLES = 4000
KEPT = 0.1  # a mode is kept if so large a part of its weight lands within three of its widths
SIDE, MARGIN, HEAD, REACH = 220, 8, 34, 2.6


def trained(divergence: str, last: int, seed: int) -> Tensor:
    """Samples `(SAMPLES, 2)` of the student."""
    from closed_forms.oracles import AffineStudent, distilled, schedule

    from fastdiff.diffusion.mixture import GaussianMixture
    from fastdiff.methods import FDistill, FDistillConfig

    means = torch.tensor(MEANS, dtype=torch.float64)
    law = GaussianMixture([1.0] * len(means), means, (WIDTH**2 * torch.eye(2).double()).expand(len(means), 2, 2))
    a, b = START_WIDTH * torch.eye(2).double(), torch.tensor(START, dtype=torch.float64)
    student = AffineStudent(a, b, schedule())
    weights = {} if divergence == "rkl" else {"ratio_min": 1e-3, "ratio_max": 1e3, "time_bins_decay": 0.0}
    config = FDistillConfig(
        divergence=divergence,
        guidance_scale=1.0,
        max_timestep=last,
        update_rule="every",
        student_update_every=1,
        **weights,
    )
    distilled(FDistill(config), law, student, STEPS, ROWS, LEARNING_RATE, seed)
    z = torch.randn(SAMPLES, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (z @ student.a.T + student.b).detach()


def counted(samples: Tensor) -> dict[str, Any]:
    """Shares of samples near each mode, how many modes are kept, and what a mode has at the least."""
    distance = torch.cdist(samples, torch.tensor(MEANS, dtype=torch.float64))
    near = (distance < 3 * WIDTH).double().mean(0)
    nearest = torch.bincount(distance.argmin(1), minlength=len(MEANS)).double() / len(samples)
    even = 1 / len(MEANS)
    return {
        "modes_kept": int((near > KEPT * even).sum()),
        "total_variation": 0.5 * (nearest - even).abs().sum().item(),
        "shares": nearest.tolist(),
        "near": near.tolist(),
    }


def draw(panels: dict[tuple[str, str], Tensor], rows: list[dict[str, Any]], path: Path) -> None:
    """One row a range of noise, one column a divergence: modes as circles, samples as dots."""
    from PIL import Image, ImageDraw

    size = (len(DIVERGENCES) * (SIDE + MARGIN) + MARGIN, len(NOISE) * (SIDE + HEAD + MARGIN) + MARGIN)
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    for (noise, divergence), samples in panels.items():
        left = MARGIN + DIVERGENCES.index(divergence) * (SIDE + MARGIN)
        top = MARGIN + list(NOISE).index(noise) * (SIDE + HEAD + MARGIN)
        kept = [row["modes_kept"] for row in rows if (row["noise"], row["divergence"]) == (noise, divergence)]
        pen.text((left, top), f"{divergence}, {noise}", fill="black", font_size=14)
        pen.text(
            (left, top + 16), f"modes kept: {', '.join(map(str, kept))} of {len(MEANS)}", fill="black", font_size=12
        )
        pen.rectangle((left, top + HEAD, left + SIDE, top + HEAD + SIDE), outline="#999999")

        def place(point, left=left, top=top):
            x, y = ((value / REACH + 1) / 2 * SIDE for value in point)
            return left + x, top + HEAD + SIDE - y

        for x, y in map(place, samples[:600].tolist()):
            if left < x < left + SIDE and top + HEAD < y < top + HEAD + SIDE:
                pen.point((x, y), fill="#1f5fbf")
        for x, y in map(place, MEANS):
            radius = 3 * WIDTH / REACH / 2 * SIDE
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline="#c03020", width=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "eval" / "results" / "f_distill_modes.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / "modes.png")
    arguments = parser.parse_args()
    rows, panels = [], {}
    for noise, last in NOISE.items():
        for divergence in DIVERGENCES:
            for seed in arguments.seeds:
                samples = trained(divergence, last, seed)
                panels.setdefault((noise, divergence), samples)
                row = {"divergence": divergence, "noise": noise, "last_index": last, "seed": seed} | counted(samples)
                rows.append(row)
                print(divergence, noise, seed, row["modes_kept"], f"{row['total_variation']:.3f}", flush=True)
    arguments.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    draw(panels, rows, arguments.picture)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
