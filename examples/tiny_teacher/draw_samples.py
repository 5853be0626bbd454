"""A labelled grid of the teacher's samples: one row a caption, w = 1 on the left and another guidance on the right.

python draw_samples.py --teacher teacher --output samples.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from assemble import load_pipeline
from PIL import Image, ImageDraw

from fastdiff.evaluation.generation import generate, sample_seeds

CAPTIONS = (
    "a smiling face",
    "a fruit",
    "an animal",
    "a person at work",
    "a country flag",
    "a building",
    "red apple",
    "banana",
    "red heart",
    "blue circle",
    "automobile",
    "dog face",
    "house, noto style",
    "waving hand, dark skin tone, noto style",
    "pizza, twemoji style",
    "umbrella, fluent 3d style",
    "alarm clock, fluent flat style",
    "cat face, emojione style",
)
LABEL = 300


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--teacher", type=Path, required=True)
    flags.add_argument("--output", type=Path, required=True)
    flags.add_argument("--steps", type=int, default=50)
    flags.add_argument("--guidance", type=float, default=2.0)
    flags.add_argument("--columns", type=int, default=6)
    flags.add_argument("--scale", type=int, default=2)
    flags.add_argument("--seed", type=int, default=3)
    settings = flags.parse_args()
    torch.set_num_threads(1)

    pipeline, side = load_pipeline(settings.teacher), 32 * settings.scale + 2
    prompts = [caption for caption in CAPTIONS for _ in range(settings.columns)]
    seeds = sample_seeds(settings.seed, "grid", len(prompts))
    sheet = Image.new("RGB", (LABEL + 2 * settings.columns * side + 10, len(CAPTIONS) * side), "white")
    draw = ImageDraw.Draw(sheet)
    for half, guidance in enumerate((1.0, settings.guidance)):
        size = {"height": 32, "width": 32}
        images = generate(pipeline, prompts, seeds, settings.steps, guidance, extra=size, progress=False).images
        for number, pixels in enumerate(images):
            row, column = divmod(number, settings.columns)
            tile = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            tile = tile.resize((32 * settings.scale,) * 2, Image.Resampling.NEAREST)
            sheet.paste(tile, (LABEL + (half * settings.columns + column) * side + half * 10, row * side))
    for row, caption in enumerate(CAPTIONS):
        draw.text((4, row * side + side // 3), caption, fill="black", font_size=14)
    sheet.save(settings.output, optimize=True)


if __name__ == "__main__":
    main()
