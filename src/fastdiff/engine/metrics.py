"""Metrics stay on the device until they are read, all at once, every few steps."""

from __future__ import annotations

import torch
from torch import Tensor


class NonFiniteError(RuntimeError):
    """A loss term or gradient norm became NaN or infinite."""


class DeferredMetrics:
    """Collects scalars without host synchronisation; `read` averages them and names what is not finite."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._first_bad: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor, step: int) -> None:
        """Adds a scalar tensor of step `step`."""
        value = value.detach().float()
        bad = torch.where(value.isfinite(), torch.inf, float(step))
        if name not in self._sums:
            self._sums[name], self._counts[name], self._first_bad[name] = value, 1, bad
            return
        self._sums[name] = self._sums[name] + value
        self._counts[name] += 1
        self._first_bad[name] = torch.minimum(self._first_bad[name], bad)

    def read(self) -> dict[str, float]:
        """Means since the last read: one transfer to the host.

        Raises:
            NonFiniteError: naming the earliest term that was not finite and its step.
        """
        if not self._sums:
            return {}
        names = list(self._sums)
        table = torch.stack([torch.stack([self._sums[n], self._first_bad[n]]) for n in names]).tolist()
        means = {name: total / self._counts[name] for name, (total, _) in zip(names, table)}
        bad = sorted((first, name) for name, (_, first) in zip(names, table) if first != float("inf"))
        self.__init__()
        if bad:
            step, name = bad[0]
            raise NonFiniteError(
                f"{name} is not finite at step {int(step)}. The weights were not updated with it. Lower the learning "
                "rate, use bf16 instead of fp16, or look at the previews before that step; then resume from the "
                "latest checkpoint."
            )
        return means
