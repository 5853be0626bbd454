"""Counts the bytes of every tensor that is alive, by what it is for; works on real and on fake tensors.

Every operation passes through a dispatch mode. A storage counts from the operation that makes it until Python and
autograd have let go of it, so that saved activations, recomputation, casts and temporaries of the real code all count.
What a kernel allocates inside itself (workspaces) does not.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ACTIVATIONS = "activations"


class MemoryTracker(TorchDispatchMode):
    """A mode that knows how much is alive. Enter it inside `FakeTensorMode`.

    `peaks[phase]` holds the bytes by kind at the fullest moment of a phase.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        self.phase: str | None = None
        self._kinds: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._add(value, ACTIVATIONS)
        return result

    def start(self, phase: str) -> None:
        """From now on the fullest moment is that of `phase`; a phase can be entered again."""
        self.phase = phase
        self._look()

    def mark(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Says what tensors are for; those not seen yet are added."""
        for tensor in tensors:
            key = id(tensor.untyped_storage())
            if key in self._kinds:
                self._move(key, kind)
            else:
                self._add(tensor, kind)

    def mark_gradients(self, kind: str, parameters: Iterable[nn.Parameter]) -> None:
        """Marks each gradient as soon as backward has written it, where no step inside backward has dropped it."""

        def written(owner: nn.Parameter) -> None:
            if owner.grad is not None:
                self.mark(kind, [owner.grad])

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(written)

    @property
    def peak(self) -> tuple[str, Counter[str]]:
        """The fullest phase and what it held."""
        phase = max(self.peaks, key=lambda name: self.peaks[name].total())
        return phase, self.peaks[phase]

    def _add(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._kinds:
            return
        size = storage.nbytes()
        self._kinds[key] = (kind, size)
        self.alive[kind] += size
        weakref.finalize(storage, self._remove, key).atexit = False
        self._look()

    def _move(self, key: int, kind: str) -> None:
        old, size = self._kinds[key]
        self.alive[old] -= size
        self.alive[kind] += size
        self._kinds[key] = (kind, size)

    def _remove(self, key: int) -> None:
        kind, size = self._kinds.pop(key)
        self.alive[kind] -= size

    def _look(self) -> None:
        if self.phase is None:
            return
        best = self.peaks.get(self.phase)
        if best is None or self.alive.total() > best.total():
            self.peaks[self.phase] = +self.alive
