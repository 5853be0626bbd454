"""`fastdiff sample`: images from a pipeline or student folder."""

from __future__ import annotations

import re
from pathlib import Path

from fastdiff.cli.parsing import Parser, show_progress_only
from fastdiff.recipes.errors import RecipeError

HELP = "make images with a pipeline or student folder"


def main(arguments: list[str]) -> int:
    """Writes one PNG a prompt."""
    parser = Parser("sample", "Makes images. A student knows its own steps and guidance; flags override them.")
    parser.add_argument("folder", type=Path, help="pipeline folder, student folder or folder of LoRA files")
    parser.add_argument("--prompt", nargs="+", required=True, help="one or more prompts")
    parser.add_argument("--seed", type=int, default=0, help="of the first image; the next has the next seed [0]")
    parser.add_argument("--num_inference_steps", type=int, help="the student's own if not given")
    parser.add_argument("--guidance_scale", type=float, help="the student's own if not given")
    parser.add_argument("--output", type=Path, default=Path("."), help="a folder, or a .png for one prompt [.]")
    flags = parser.parse_all(arguments)
    if flags.output.suffix == ".png" and len(flags.prompt) > 1:
        raise RecipeError(f"{len(flags.prompt)} prompts make several images: give --output a folder")
    from fastdiff.recipes.student import call_settings, load_pipeline

    settings = call_settings(flags.folder, flags.num_inference_steps, flags.guidance_scale)
    show_progress_only()
    from fastdiff.evaluation import generate
    from fastdiff.evaluation.grid import save_picture
    from fastdiff.evaluation.resizing import to_pil

    seeds = [flags.seed + index for index in range(len(flags.prompt))]
    steps, guidance = settings.pop("num_inference_steps"), settings.pop("guidance_scale")
    pipeline = load_pipeline(flags.folder, num_inference_steps=steps)
    images = generate(pipeline, flags.prompt, seeds, steps, guidance, extra=settings).images
    for prompt, seed, image in zip(flags.prompt, seeds, images):
        name = f"{re.sub(r'[^a-z0-9]+', '-', prompt.lower()).strip('-')[:60] or 'image'}-{seed}.png"
        path = flags.output if flags.output.suffix == ".png" else flags.output / name
        print(save_picture(to_pil(image), path))
    return 0
