"""Latency of a pipeline from prompt to pixels, against its text encoders, network and decoder called bare.

One call of the pipeline is recorded; its parts are then run again with the same arguments and nothing around them.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import nn

from fastdiff.planning.timing import interleaved, spent

PARTS = ("text encoder", "network", "decoder")
PROMPT = "a red apple"
Calls = dict[str, list[Callable[[], object]]]


def measure(pipeline: Any, call: Mapping[str, Any], *, batch: int = 1, pairs: int = 20) -> dict[str, Any]:
    """Medians over interleaved pairs of (whole call, all bare parts), in seconds, their ratio, and each part alone.

    Args:
        pipeline: a diffusers text-to-image pipeline.
        call: arguments of its call besides the prompt.
        batch: images a call.
        pairs: how many.

    Raises:
        ValueError: if the pipeline has no network of a known name.
    """
    pipeline.set_progress_bar_config(disable=True)
    device = pipeline.device
    whole = functools.partial(pipeline, [PROMPT] * batch, output_type="pt", **call)
    with torch.no_grad():
        calls = record(pipeline, whole)
        times = list(interleaved(whole, lambda: [one() for part in PARTS for one in calls[part]], pairs, device))
        split = {name: _median(calls[name], pairs, device) for name in PARTS}
    return {
        "pipeline": type(pipeline).__name__,
        "call": dict(call),
        "batch": batch,
        "pairs": pairs,
        "calls": {name: len(calls[name]) for name in PARTS},
        "weights": sum(parameter.numel() for parameter in network_of(pipeline).parameters()),
        "decoder": type(pipeline.vae).__name__,
        "seconds": statistics.median(ours.wall for ours, _ in times),
        "bare_seconds": statistics.median(theirs.wall for _, theirs in times),
        "ratio": statistics.median(ours.wall / theirs.wall for ours, theirs in times),
        "split_seconds": split,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def record(pipeline: Any, whole: Callable[[], object]) -> Calls:
    """The calls of each part in one call of the pipeline, ready to be made again."""
    calls: Calls = {name: [] for name in PARTS}
    encoders = [one for name, one in pipeline.components.items() if name.startswith("text_encoder") and one]
    with contextlib.ExitStack() as stack:
        for encoder in encoders:
            stack.enter_context(_noted(encoder, "forward", encoder, calls["text encoder"]))
        network = network_of(pipeline)
        stack.enter_context(_noted(network, "forward", network, calls["network"]))
        stack.enter_context(_noted(pipeline.vae, "decode", pipeline.vae.decode, calls["decoder"]))
        whole()
    return calls


def network_of(pipeline: Any) -> nn.Module:
    """The network of a pipeline of a known family."""
    from fastdiff.models.families import family_of

    return getattr(pipeline, family_of(type(pipeline).__name__).network_name)


@contextlib.contextmanager
def _noted(
    owner: nn.Module, name: str, call: Callable[..., object], into: list[Callable[[], object]]
) -> Iterator[None]:
    """Inside, calls of `owner.name` are written down as calls of `call`."""
    own = getattr(owner, name)

    @functools.wraps(own)  # pipelines look at signatures
    def told(*args: Any, **kwargs: Any) -> Any:
        into.append(functools.partial(call, *args, **kwargs))
        return own(*args, **kwargs)

    with mock.patch.object(owner, name, told):
        yield


def _median(calls: list[Callable[[], object]], count: int, device: torch.device) -> float:
    return statistics.median(spent(lambda: [one() for one in calls], device).wall for _ in range(count))
