"""Images from any diffusers text-to-image pipeline, one seed a prompt."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """Generated images and what they cost.

    images: uint8 (N, 3, H, W); network_calls: denoiser rows spent on one image (a guided step counts two);
    seconds_per_image: wall clock of the pipeline calls (denoiser and decoder, not the text encoder) over N.
    """

    images: Tensor
    network_calls: float
    seconds_per_image: float


def sample_seeds(seed: int, stream: str, count: int) -> list[int]:
    """``count`` 63-bit seeds, one a prompt; different (seed, stream) pairs never share noise.

    A seed depends on the prompt's index only, so batch size and order of work do not change an image.
    """
    digests = (hashlib.blake2b(f"{seed}/{stream}/{i}".encode(), digest_size=8).digest() for i in range(count))
    return [int.from_bytes(digest, "little") >> 1 for digest in digests]


def generate(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float = 0.0,
    batch_size: int = 64,
    extra: dict[str, Any] | None = None,
    progress: bool = True,
    description: str = "images",
) -> Samples:
    """Runs ``pipeline`` on every prompt with that prompt's own generator.

    Args:
        pipeline: a diffusers text-to-image pipeline.
        prompts: N captions; repeated ones are encoded once.
        seeds: N integers (see ``sample_seeds``). Each seeds a CPU generator of its own, from which the initial noise
            and whatever a stochastic scheduler draws later come.
        num_inference_steps: scheduler steps, at least 1.
        guidance_scale: diffusers' convention (at most 1: unguided).
        batch_size: prompts in one pipeline call.
        extra: further arguments of the pipeline's ``__call__`` (``eta``, ``timesteps``, ``height`` ...).
        progress: show a bar on stderr.
        description: the bar's label.

    Raises:
        ValueError: nothing to do, lengths differ, or a count below 1.
        FloatingPointError: the pipeline returned non-finite pixels.
    """
    from tqdm import tqdm

    _check(prompts, seeds, num_inference_steps, batch_size)
    encoder = _PromptCache(pipeline, prompts, guided=guidance_scale > 1)
    images, seconds = [], 0.0
    with (
        _quiet(pipeline),
        _row_counter(pipeline) as rows,
        tqdm(total=len(prompts), desc=description, unit="img", disable=not progress) as bar,
    ):
        for start in range(0, len(prompts), batch_size):
            chunk = list(prompts[start : start + batch_size])
            generators = [torch.Generator().manual_seed(int(s)) for s in seeds[start : start + batch_size]]
            arguments = encoder.take(chunk)
            begin = time.perf_counter()
            output = pipeline(
                **arguments,
                generator=generators,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                output_type="pt",
                **(extra or {}),
            )
            pixels = output.images.detach().float().cpu()
            seconds += time.perf_counter() - begin
            if not torch.isfinite(pixels).all():
                raise FloatingPointError(
                    f"{type(pipeline).__name__} returned non-finite pixels for prompts {start} to "
                    f"{start + len(chunk) - 1}; run the decoder in float32 or use a VAE that is safe in half precision"
                )
            images.append((pixels.clamp(0, 1) * 255).round().to(torch.uint8))
            bar.update(len(chunk))
    return Samples(torch.cat(images), sum(rows) / len(prompts), seconds / len(prompts))


def generate_routed(
    served_by: Sequence[Any], prompts: Sequence[str], seeds: Sequence[int], *arguments: Any, **named: Any
) -> Samples:
    """``generate`` where each prompt has its own one of a few pipelines; an image is what that pipeline makes of it.

    Args:
        served_by: N pipelines, most of them the same objects.
        prompts, seeds, arguments, named: as ``generate`` takes them.

    Raises:
        ValueError: lengths differ, and what ``generate`` raises.
    """
    if len(served_by) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(served_by)} pipelines; give one pipeline a prompt")
    places: dict[int, list[int]] = {}
    for place, pipeline in enumerate(served_by):
        places.setdefault(id(pipeline), []).append(place)
    drawn = []
    for own in places.values():
        part = [prompts[place] for place in own], [seeds[place] for place in own]
        drawn.append(generate(served_by[own[0]], *part, *arguments, **named))
    order = torch.tensor([place for own in places.values() for place in own]).argsort()
    shares = [len(own) / len(prompts) for own in places.values()]
    return Samples(
        images=torch.cat([part.images for part in drawn])[order],
        network_calls=sum(share * part.network_calls for share, part in zip(shares, drawn, strict=True)),
        seconds_per_image=sum(share * part.seconds_per_image for share, part in zip(shares, drawn, strict=True)),
    )


def _check(prompts: Sequence[str], seeds: Sequence[int], steps: int, batch_size: int) -> None:
    if not prompts:
        raise ValueError("no prompts were given; pass at least one")
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds; give one seed a prompt")
    for name, value in (("num_inference_steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")


class _PromptCache:
    """Pipeline arguments for a batch of prompts; each distinct prompt goes through the text encoders once.

    An embedding is dropped after its last use, so 30,000 distinct prompts do not pile up.
    """

    def __init__(self, pipeline: Any, prompts: Sequence[str], guided: bool) -> None:
        self._pipeline, self._guided = pipeline, guided
        self._names = _embedding_names(pipeline)
        self._left = Counter(prompts)
        self._known: dict[str, tuple[Tensor, ...]] = {}
        self._negative: tuple[Tensor, ...] | None = None

    def take(self, batch: list[str]) -> dict[str, Any]:
        """The arguments for ``batch``; pipelines of other families simply get the strings."""
        if not self._names:
            return {"prompt": batch}
        new = [p for p in dict.fromkeys(batch) if p not in self._known]
        if new:
            self._encode(new)
        stacked = [torch.stack(parts) for parts in zip(*(self._known[p] for p in batch))]
        arguments = dict(zip(self._names, stacked))
        if self._guided and self._negative is not None:
            negatives = [part.expand(len(batch), *part.shape[1:]) for part in self._negative]
            arguments |= {f"negative_{name}": part for name, part in zip(self._names, negatives)}
        self._left.subtract(batch)
        for prompt in set(batch):
            if self._left[prompt] <= 0:
                del self._known[prompt]
        return arguments

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> None:
        with _errors_only():
            outputs = self._pipeline.encode_prompt(
                prompt=prompts,
                device=self._pipeline._execution_device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=self._guided,
            )
        # SD: (positive, negative); SDXL: (positive, negative, pooled positive, pooled negative)
        positive, negative = outputs[0::2], outputs[1::2]
        self._known.update(zip(prompts, zip(*positive)))
        if self._guided and self._negative is None:
            self._negative = tuple(part[:1] for part in negative)


def _embedding_names(pipeline: Any) -> tuple[str, ...]:
    """The call arguments that hold text embeddings, for the families whose ``encode_prompt`` is known here."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    if isinstance(pipeline, StableDiffusionXLPipeline):
        return ("prompt_embeds", "pooled_prompt_embeds")
    if isinstance(pipeline, StableDiffusionPipeline):
        return ("prompt_embeds",)
    return ()


def denoiser_of(pipeline: Any) -> torch.nn.Module:
    """The network a pipeline calls at each step.

    Raises:
        ValueError: the pipeline has neither a ``unet`` nor a ``transformer``.
    """
    network = pipeline.components.get("unet") or pipeline.components.get("transformer")
    if network is None:
        raise ValueError(
            f"{type(pipeline).__name__} has the components {sorted(pipeline.components)}; "
            "expected a 'unet' or a 'transformer' to sample from"
        )
    return network


@contextmanager
def _row_counter(pipeline: Any) -> Iterator[list[int]]:
    """Collects the batch rows of every denoiser call."""
    rows: list[int] = []

    def count(_module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        first = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        rows.append(len(first))

    handle = denoiser_of(pipeline).register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


@contextmanager
def _errors_only() -> Iterator[None]:
    """Without diffusers' warning that quotes every caption longer than the text encoder's context."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def _quiet(pipeline: Any) -> Iterator[None]:
    """Hides the pipeline's own step bar, which would print once a batch."""
    before = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)
