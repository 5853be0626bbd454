"""Time of work on two clocks, with what it left on a GPU done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch


class Spent(NamedTuple):
    """Seconds on the wall, and those that all threads of this process had a processor.

    The second leaves out what other programs of a busy machine took, and says nothing of a GPU.
    """

    wall: float
    cpu: float


def spent(work: Callable[[], object], device: torch.device | str = "cpu") -> Spent:
    """What `work` takes on a device that was idle before, until it is idle again."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wait()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


def interleaved(
    ours: Callable[[], object], theirs: Callable[[], object], pairs: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[Spent, Spent]]:
    """What (ours, theirs) took, `pairs` times in turn; who comes first alternates, and one pair warms up."""
    for pair in range(pairs + 1):
        first, second = (ours, theirs) if pair % 2 else (theirs, ours)
        found = (spent(first, device), spent(second, device))
        if pair:
            yield found if pair % 2 else found[::-1]
