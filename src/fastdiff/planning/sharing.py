"""What one of several devices holds: everything and a buffer for gradients, or its share of full networks."""

from __future__ import annotations

from collections import Counter

from fastdiff.planning.tracker import ACTIVATIONS
from fastdiff.planning.walk import BETWEEN, DECODE, ENCODE, GRADIENTS, KINDS, PROMPTS, Walk

EXCHANGE, GATHERED = "gradient exchange", "gathered blocks"
_AT_ONCE = 2
"""Blocks in memory at once: the one at work and the one fetched ahead."""


def device_phases(walked: Walk, gpus: int, sharded: bool) -> dict[str, Counter[str]]:
    """The fullest moment of each phase on one device, and of the exchange of gradients.

    Args:
        walked: what one device alone would hold.
        gpus: devices.
        sharded: full networks and the base are cut over them (`fsdp`); adapters and heads stay whole.
    """
    if gpus == 1:
        return dict(walked.phases)
    phases, buffer, cut_gradients = dict(walked.phases), walked.buffer, 0
    if sharded:
        phases = {name: _share(name, split, walked, gpus) for name, split in phases.items()}
        buffer, cut_gradients = walked.whole_buffer, (walked.buffer - walked.whole_buffer) // gpus
    return phases | {EXCHANGE: _exchange(phases, buffer, cut_gradients)}


def _share(phase: str, split: Counter[str], walked: Walk, gpus: int) -> Counter[str]:
    """One device's part of a moment; a gradient may not be whole there yet, and encoders gather nothing."""
    cut = Counter({kind: min(split[kind], size) for kind, size in walked.cut.items()})
    shares = Counter({kind: -(-size // gpus) for kind, size in cut.items()})
    gathered = 0 if phase in (PROMPTS, DECODE, ENCODE) else _AT_ONCE * walked.largest_block
    return split - cut + shares + Counter({GATHERED: gathered})


def _exchange(phases: dict[str, Counter[str]], buffer: int, cut_gradients: int) -> Counter[str]:
    """After backward activations are gone, and the gradients lie in one flat buffer as well."""
    turns = [split for name, split in phases.items() if name not in BETWEEN]
    fullest = max(turns, key=lambda split: split.total() - split[ACTIVATIONS])
    kept = Counter({kind: fullest[kind] for kind in KINDS if kind not in (ACTIVATIONS, GRADIENTS)})
    return kept + Counter({GRADIENTS: buffer + cut_gradients, EXCHANGE: buffer})
