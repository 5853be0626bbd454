"""What weights, gradients and optimizer states will cost, before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.engine.networks import Networks
from fastdiff.engine.optimizers import GroupOptimizer
from fastdiff.engine.sharding import local


@dataclass(frozen=True)
class StateMemory:
    """Bytes a process holds between steps; activations come on top."""

    frozen: int
    trained: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.frozen + self.trained + self.gradients + self.optimizer

    def __str__(self) -> str:
        parts = (
            f"{name} {_gibibytes(getattr(self, name))}" for name in ("frozen", "trained", "gradients", "optimizer")
        )
        return f"memory before activations: {_gibibytes(self.total)} ({', '.join(parts)})"


def state_memory(networks: Networks, optimizers: Mapping[str, GroupOptimizer]) -> StateMemory:
    """Counts the tensors of a run."""
    trained = [parameter for optimizer in optimizers.values() for parameter in optimizer.parameters]
    known = {id(parameter) for parameter in trained}
    base = networks.roles.base
    frozen = [local(tensor) for tensor in (*base.parameters(), *base.buffers()) if id(tensor) not in known]
    gradients = sum(_bytes(optimizer.parameters) for optimizer in optimizers.values() if not optimizer.in_backward)
    states = sum(optimizer.state_bytes for optimizer in optimizers.values())
    return StateMemory(_bytes(frozen), _bytes(trained), gradients, states)


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: allocated on a GPU, resident on a CPU (imports included)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.3f} GiB"
