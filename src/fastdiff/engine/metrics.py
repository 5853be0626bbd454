"""Metrics stay on the device until they are read, all at once, every few steps."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.engine.distributed import global_mean, global_minimum


class NonFiniteError(RuntimeError):
    """A loss term or gradient norm became NaN or infinite."""


class DeferredMetrics:
    """Collects scalars without host synchronisation; `read` averages them and names what is not finite."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._first_bad: dict[str, Tensor] = {}
        self._shared: list[str] = []

    def add(self, name: str, value: Tensor, step: int, *, shared: bool = False) -> None:
        """Adds a scalar tensor of step `step`; `shared` if all processes add this name, to have the mean over them."""
        value = value.detach().float()
        bad = torch.where(value.isfinite(), torch.inf, float(step))
        if name not in self._sums:
            self._sums[name], self._counts[name], self._first_bad[name] = value, 1, bad
            self._shared += [name] if shared else []
            return
        self._sums[name] = self._sums[name] + value
        self._counts[name] += 1
        self._first_bad[name] = torch.minimum(self._first_bad[name], bad)

    def read(self) -> dict[str, float]:
        """Means since the last read: one transfer to the host, and two small reductions for all that is shared.

        Raises:
            NonFiniteError: naming the earliest term that was not finite and its step.
        """
        if not self._sums:
            return {}
        count = len(self._shared)
        names = [*self._shared, *(name for name in self._sums if name not in self._shared)]
        sums = torch.stack([self._sums[name] for name in names])
        first_bad = torch.stack([self._first_bad[name] for name in names])
        if count:
            sums[:count], first_bad[:count] = global_mean(sums[:count]), global_minimum(first_bad[:count])
        sums, first_bad = torch.stack([sums, first_bad]).tolist()
        means = {name: total / self._counts[name] for name, total in zip(names, sums)}
        bad = sorted((first, name) for name, first in zip(names, first_bad) if first != float("inf"))
        self.__init__()
        if bad:
            step, name = bad[0]
            raise NonFiniteError(
                f"{name} is not finite at step {int(step)}. The weights were not updated with it. Lower the learning "
                "rate, use bf16 instead of fp16, or look at the previews before that step; then resume from the "
                "latest checkpoint."
            )
        return means
