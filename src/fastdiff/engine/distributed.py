"""The few collective operations a run needs; all are the identity on one process.

Only trained gradients are reduced, after the micro-batches of an update, in one flat buffer a dtype: several roles
share one module with different adapters at work, which DistributedDataParallel's hooks cannot see.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from fastdiff.engine.announced import announced_processes

logger = logging.getLogger(__name__)


def is_distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Averages the gradients of all processes in place; a missing gradient counts as zero."""
    if not is_distributed():
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters]
    for dtype in sorted({gradient.dtype for gradient in gradients}, key=str):
        same = [gradient for gradient in gradients if gradient.dtype == dtype]
        flat = _flatten_dense_tensors(same)
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        torch._foreach_copy_(same, list(_unflatten_dense_tensors(flat, same)))


class Replicated:
    """Weights of a group that every process holds whole; see `engine.sharding.Sharded` for the other kind.

    Attributes:
        parameters: what the optimizer moves.
        leaves: what autograd sees; the same here.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.leaves: list[Tensor] = self.parameters

    def collect_gradients(self) -> None:
        """After the last backward of an update, `parameters` get the gradients averaged over all processes."""
        average_gradients(self.parameters)

    def norm(self, own: Tensor) -> Tensor:
        """The norm of whole gradients from that of this process's part."""
        return own

    def whole(self, tensors: Mapping[str, Tensor], numbers: Iterable[int]) -> Mapping[str, Tensor]:
        """Tensors that lie like the parameters of these numbers (weights, averages, moments), each of them whole."""
        return tensors

    def parts(self, tensors: Mapping[str, Tensor], numbers: Iterable[int]) -> Mapping[str, Tensor]:
        """The reverse of `whole`: what this process holds."""
        return tensors


def global_mean(value: Tensor) -> Tensor:
    """The mean over processes of a detached tensor."""
    if not is_distributed():
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def global_minimum(value: Tensor) -> Tensor:
    """The minimum over processes of a detached tensor, element by element."""
    if not is_distributed():
        return value
    value = value.detach().clone()
    dist.all_reduce(value, dist.ReduceOp.MIN)
    return value


class Vote:
    """Asks at every step whether any process wants to stop, and tells it a step later, so that no device waits
    for its host: that of a step is read when the next one is queued.

    Alone, a process is told at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._wishes: Tensor | None = None
        self._arrived: torch.Event | None = None

    def __call__(self, wish: bool) -> bool:
        """Takes part; all processes must. Returns whether any wished so when last asked."""
        if not is_distributed():
            return wish
        answer = self._last()
        wishes = torch.full((), float(wish), device=self.device)
        dist.all_reduce(wishes)
        self._wishes = wishes
        if self.device.type != "cpu":
            self._wishes = torch.empty_like(wishes, device="cpu", pin_memory=wishes.is_cuda)
            self._wishes.copy_(wishes, non_blocking=True)
            self._arrived = torch.Event(self.device)
            self._arrived.record()
        return answer

    def _last(self) -> bool:
        if self._wishes is None:
            return False
        if self._arrived is not None:
            self._arrived.synchronize()  # the end of the step before; the device has this one still to do
        return self._wishes.item() > 0


def leave_together() -> None:
    """Ends a job of several processes: all wait for each other, then close their connections before they exit.

    One that merely exits takes its connections from under another that may still be using them.
    """
    if not is_distributed():
        return
    from accelerate import PartialState

    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()


def warn_if_alone(world: int) -> None:
    """Warns when a launcher announced several processes but this one runs alone.

    `accelerate launch --cpu --num_processes 2` starts a single process without a word (huggingface/accelerate#2741).
    """
    announced = announced_processes()
    if announced > world:
        logger.warning(
            "%d processes were announced but one is running. On CPUs launch with: "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes %d ...",
            announced,
            announced,
        )
