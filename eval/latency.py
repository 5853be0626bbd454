"""Latency of a pipeline of ordinary size with random weights, split into its parts: values do not change time.

    OMP_NUM_THREADS=1 python eval/latency.py --like sd15 --output eval/bench/inference.json
    OMP_NUM_THREADS=1 python eval/latency.py --like sd15 --half --resolution 128 --pairs 3     # a quarter of the work

Three rows: a one-step student, the same with a tiny decoder, and the teacher at two guided steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderTiny

from fastdiff.cli.bench_results import keep
from fastdiff.models.sampler import SamplerSpec
from fastdiff.planning.blueprint import blueprint_of
from fastdiff.planning.measure_inference import measure
from fastdiff.planning.measure_memory import HALF

DTYPE = torch.bfloat16


def main() -> None:
    """Measures and prints a line a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", default="sd15", help="a shipped blueprint of a Stable Diffusion 1.x or 2.x")
    parser.add_argument("--half", action="store_true", help="a UNet of half the width")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--output", type=Path)
    flags = parser.parse_args()
    pipeline = random_pipeline(flags.like, HALF if flags.half else {})
    scheduler, decoder = pipeline.scheduler, pipeline.vae
    trained = SamplerSpec("lcm", (999,)).build_scheduler(scheduler.config, "epsilon")
    one = {"num_inference_steps": 1, "guidance_scale": 0.0}
    cases = {
        "student": (trained, decoder, one),
        "student, tiny decoder": (trained, AutoencoderTiny().to(DTYPE), one),
        "teacher, 2 steps": (scheduler, decoder, {"num_inference_steps": 2}),
    }
    for name, (pipeline.scheduler, pipeline.vae, call) in cases.items():
        size = {"height": flags.resolution, "width": flags.resolution}
        row = measure(pipeline, size | call, pairs=flags.pairs)
        split = ", ".join(f"{part} {seconds:.3f}" for part, seconds in row["split_seconds"].items())
        print(f"{name:23}{row['seconds']:8.3f} s, {row['ratio']:.3f} of the bare parts: {split}", flush=True)
        keep(
            flags.output,
            f"{'half ' * flags.half}{flags.like}, {flags.resolution} px, {name}",
            row | {"dtype": str(DTYPE)},
        )


def random_pipeline(like: str, network: Mapping[str, Any]) -> Any:
    """The stock pipeline of a blueprint with some of its network's config changed; nothing is downloaded."""
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
        unet=diffusers.UNet2DConditionModel.from_config({**plan.network, **network}).eval(),
        scheduler=getattr(diffusers, plan.scheduler["_class_name"]).from_config(dict(plan.scheduler)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(DTYPE)


if __name__ == "__main__":
    main()
