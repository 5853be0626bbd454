"""Wall time of work, with what it left on a GPU done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch


def seconds(work: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """How long `work` takes on a device that was idle before, until it is idle again."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def interleaved(
    ours: Callable[[], object], theirs: Callable[[], object], pairs: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[float, float]]:
    """Seconds of (ours, theirs), `pairs` times in turn; who comes first alternates, and one pair warms up."""
    for pair in range(pairs + 1):
        first, second = (ours, theirs) if pair % 2 else (theirs, ours)
        found = (seconds(first, device), seconds(second, device))
        if pair:
            yield found if pair % 2 else found[::-1]
