"""Latency of a full-size pipeline with random weights, split into its parts: values do not change time.

    OMP_NUM_THREADS=1 python eval/latency.py --like sd15 --resolution 256 --output eval/bench/inference.json

Three rows: the teacher at two guided steps, a one-step student, and the same student with a tiny decoder.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderTiny, LCMScheduler

from fastdiff.cli.bench_results import keep
from fastdiff.models.sampler import SamplerSpec
from fastdiff.planning.blueprint import blueprint_of
from fastdiff.planning.measure_inference import measure


def main() -> None:
    """Measures and prints a line a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", default="sd15", help="a shipped blueprint of a Stable Diffusion 1.x or 2.x")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--output", type=Path)
    flags = parser.parse_args()
    pipeline = random_pipeline(flags.like)
    size = {"height": flags.resolution, "width": flags.resolution}
    student = size | {"num_inference_steps": 1, "guidance_scale": 0.0}
    for name, call in (("teacher", size | {"num_inference_steps": 2}), ("student", student), ("tiny decoder", student)):
        if name == "student":
            pipeline.scheduler = SamplerSpec("lcm", (999,)).build_scheduler(pipeline.scheduler.config, "epsilon")
            assert isinstance(pipeline.scheduler, LCMScheduler)
        if name == "tiny decoder":
            pipeline.vae = AutoencoderTiny()
        row = measure(pipeline, call, pairs=flags.pairs)
        split = ", ".join(f"{part} {seconds:.3f}" for part, seconds in row["split_seconds"].items())
        print(f"{name:14}{row['seconds']:8.3f} s, {row['ratio']:.3f} of the bare parts: {split}", flush=True)
        keep(flags.output, f"{flags.like} at {flags.resolution} px, {name}", row | {"weights_are": "random"})


def random_pipeline(like: str) -> Any:
    """The stock pipeline of a blueprint; nothing is downloaded but the names of a tokenizer's letters are ours."""
    torch.manual_seed(0)
    plan = blueprint_of(like)
    (text,) = plan.text_encoders
    text_class = getattr(transformers, text["architectures"][0])
    tokens = [f"t{number}</w>" for number in range(text["vocab_size"] - 2)] + ["<|startoftext|>", "<|endoftext|>"]
    letters = transformers.CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)}, merges=[], model_max_length=77
    )
    return diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL.from_config(dict(plan.autoencoder)).eval(),
        text_encoder=text_class(text_class.config_class(**text)).eval(),
        tokenizer=letters,
        unet=diffusers.UNet2DConditionModel.from_config(dict(plan.network)).eval(),
        scheduler=getattr(diffusers, plan.scheduler["_class_name"]).from_config(dict(plan.scheduler)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


if __name__ == "__main__":
    main()
