"""Scores a pipeline under a protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.evaluation import metrics
from fastdiff.evaluation.benchmark import Benchmark, open_protocol
from fastdiff.evaluation.extractors import in_batches
from fastdiff.evaluation.features import ImageFeatures
from fastdiff.evaluation.generation import Samples, generate, generate_routed, sample_seeds
from fastdiff.evaluation.protocol import Protocol
from fastdiff.evaluation.row import Row
from fastdiff.models.absent import absent_parts

Numbers = tuple[dict[str, float], dict[str, tuple[float, float]]]


def evaluate(
    pipeline: Any,
    protocol: Benchmark | Protocol | str,
    steps: int,
    guidance_scale: float = 0.0,
    *,
    name: str = "student",
    solver: str | None = None,
    batch_size: int = 64,
    seed: int | None = None,
    extra: dict[str, Any] | None = None,
    progress: bool = True,
    route: Callable[[Sequence[str]], Sequence[Any]] | None = None,
) -> Row:
    """Generates under the protocol, measures, and returns one row.

    Args:
        pipeline: a diffusers text-to-image pipeline, or the folder of one.
        protocol: an opened benchmark (open once, score many), a protocol, or its name.
        steps: ``num_inference_steps``.
        guidance_scale: diffusers' convention (at most 1: unguided).
        name: of the row.
        solver: of the row; the scheduler's class by default.
        batch_size: prompts in one pipeline call; does not change the images.
        seed: replaces the protocol's (recorded), for intervals over seeds.
        extra: further arguments of the pipeline's ``__call__``.
        progress: show bars.
        route: the pipeline that serves each of some prompts, where several share them (`StudentMixture.pipelines`);
            ``pipeline`` then stands for their scheduler and dtype.

    Raises:
        FileNotFoundError, ValueError: see ``open_protocol``, ``load_pipeline`` and ``generate``.
    """
    bench = protocol if isinstance(protocol, Benchmark) else open_protocol(protocol)
    pipeline = load_pipeline(pipeline)
    seed = bench.protocol.seed if seed is None else seed
    side, extra = bench.protocol.resolution, extra or {}
    call = {"height": side, "width": side, **extra}
    common = {"guidance_scale": guidance_scale, "batch_size": batch_size, "extra": call, "progress": progress}
    route = route or (lambda prompts: [pipeline] * len(prompts))
    seeds = sample_seeds(seed, "samples", len(bench.prompts))
    samples = generate_routed(route(bench.prompts), bench.prompts, seeds, steps, description=name, **common)
    _check_resolution(samples, bench)
    several = None
    if bench.diversity:
        repeated = [caption for caption in bench.diversity for _ in range(bench.protocol.diversity_samples)]
        seeds = sample_seeds(seed, "diversity", len(repeated))
        several = generate_routed(route(repeated), repeated, seeds, steps, description=f"{name}, diversity", **common)
    values, intervals = score_images(bench, samples.images, several.images if several else None)
    return Row(
        name=name,
        steps=steps,
        network_calls=samples.network_calls,
        guidance_scale=guidance_scale,
        solver=solver or type(pipeline.scheduler).__name__,
        seconds_per_image=samples.seconds_per_image,
        interval=intervals,
        settings={
            **bench.settings(),
            "seed": seed,
            "extra": {k: repr(v) for k, v in extra.items()},
            "scheduler": _plain(dict(pipeline.scheduler.config)),
            "dtype": str(pipeline.dtype).removeprefix("torch."),
            "device": str(pipeline.device),
            "versions": _versions(),
        },
        **values,
    )


def score_images(bench: Benchmark, images: Tensor, several: Tensor | None = None) -> Numbers:
    """All numbers of uint8 images (N, 3, H, W) made for ``bench.prompts``; ``several`` are those of the diversity
    set."""
    p = bench.protocol
    features = ImageFeatures.of(images, bench.extractor, p.resize)
    embedded = features.features
    if bench.clip is not None and bench.clip is not bench.extractor:
        embedded = in_batches(bench.clip.image_features, images)
    spread = None
    if several is not None:
        drawn = ImageFeatures.of(several, bench.extractor, p.resize).features
        groups = torch.arange(len(bench.diversity)).repeat_interleave(p.diversity_samples).tolist()
        spread = metrics.group_diversity(drawn, groups)
    return score_features(bench, features, embedded, spread)


def score_features(bench: Benchmark, found: ImageFeatures, embedded: Tensor, spread: Tensor | None) -> Numbers:
    """The same from features. ``embedded``: image embeddings of the CLIP tower; ``spread``: diversity of each
    group."""
    values: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    draws, features = bench.protocol.draws, found.features
    for key, against in (("fid", bench.reference), ("fid_to_teacher", bench.teacher)):
        if against is not None:
            values[key], intervals[key] = _distance(features, against.features, draws)
    values["kid"], error = metrics.kernel_distance(features, bench.reference.features)
    intervals["kid"] = metrics.around(values["kid"], error)
    values["precision"], values["recall"] = metrics.precision_recall(features, bench.reference.features)
    for key, count in (("precision", len(features)), ("recall", len(bench.reference))):
        intervals[key] = metrics.around(values[key], metrics.share_error(values[key], count))
    means = {"sharpness": found.sharpness}
    if bench.clip is not None:
        clip, prefix = bench.clip, bench.protocol.clip_prefix
        texts = in_batches(clip.text_features, [prefix + caption for caption in bench.prompts])
        means["clip"] = metrics.cosines(embedded, texts)
        if bench.retrieval is not None:
            indices, blocks = bench.retrieval
            means["retrieval"] = metrics.retrieval_hits(embedded[indices], texts[indices], blocks.tolist())
    if spread is not None and len(spread):
        means["diversity"] = spread
    for key, each in means.items():
        values[key], intervals[key] = each.double().mean().item(), metrics.bootstrap_interval(each)
    return values, intervals


def floor_row(bench: Benchmark) -> Row:
    """Real images behind the prompts, scored as a model would be: the best any sampler of the true law can expect.

    ``fid_to_teacher`` has another floor: the teacher itself with another seed (``teacher`` row at the reference's
    settings).

    Raises:
        FileNotFoundError: the protocol ships no such features.
    """
    if bench.floor is None:
        raise FileNotFoundError(
            f"{bench.protocol.name} has no features of real images; expected {bench.protocol.floor}"
        )
    names = {group: index for index, group in enumerate(dict.fromkeys(bench.groups))}
    labels = [names[group] for group in bench.groups]
    wanted = {names[group] for group in bench.diversity if group in names}
    keep = [index for index, label in enumerate(labels) if label in wanted]
    spread = None
    if keep:
        spread = metrics.group_diversity(bench.floor.features[keep], [labels[index] for index in keep])
    values, intervals = score_features(replace(bench, teacher=None), bench.floor, bench.floor.features, spread)
    return Row(name="floor", interval=intervals, settings=bench.settings(), **values)


def teacher_features(
    pipeline: Any, bench: Benchmark, steps: int = 50, guidance_scale: float = 1.0, batch_size: int = 64
) -> ImageFeatures:
    """Features of the teacher's own samples, for ``fid_to_teacher``; from a noise stream no scored sample shares."""
    pipeline = load_pipeline(pipeline)
    seeds = sample_seeds(bench.protocol.seed, "teacher reference", len(bench.prompts))
    size = {"height": bench.protocol.resolution, "width": bench.protocol.resolution}
    samples = generate(
        pipeline, bench.prompts, seeds, steps, guidance_scale, batch_size, size, description="teacher reference"
    )
    facts = {"steps": steps, "guidance_scale": guidance_scale, "solver": type(pipeline.scheduler).__name__}
    return ImageFeatures.of(
        samples.images, bench.extractor, bench.protocol.resize, prompts=bench.protocol.prompts, **facts
    )


def load_pipeline(pipeline: Any) -> Any:
    """A folder as a pipeline in float32, on the GPU where there is one; pipeline objects pass as they are.

    Raises:
        FileNotFoundError: the folder is no saved pipeline.
    """
    if not isinstance(pipeline, str | Path):
        return pipeline
    if not (Path(pipeline) / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{pipeline} holds no model_index.json; pass a folder that save_pretrained wrote, or a run's student/"
        )
    from diffusers import DiffusionPipeline

    # The dtype is given, since transformers keeps that of a half-precision file while diffusers does not.
    loaded = DiffusionPipeline.from_pretrained(
        pipeline, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True, **absent_parts(pipeline)
    )
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu")


def _distance(generated: Tensor, reference: Tensor, draws: int) -> tuple[float, tuple[float, float]]:
    value = metrics.frechet_distance(generated, reference)
    error = metrics.half_sample_error(
        lambda half: metrics.frechet_distance(generated[half], reference), len(generated), draws
    )
    return value, metrics.around(value, error)


def _check_resolution(samples: Samples, bench: Benchmark) -> None:
    size, wanted = tuple(samples.images.shape[-2:]), bench.protocol.resolution
    if size != (wanted, wanted):
        raise ValueError(
            f"the pipeline makes {size[1]}x{size[0]} images, {bench.protocol.name} is for {wanted}x{wanted}; choose "
            "another protocol, or leave height and width out of extra"
        )


def _plain(config: dict) -> dict:
    """The part of a scheduler config that JSON can hold and that is short."""
    return {k: v for k, v in config.items() if isinstance(v, str | int | float | bool) or v is None}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "diffusers", "open_clip_torch", "torch-fidelity")}
