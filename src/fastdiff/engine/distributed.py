"""The few collective operations a run needs; all are the identity on one process.

Only trained gradients are reduced, after the micro-batches of an update, in one flat buffer a dtype: several roles
share one module with different adapters at work, which DistributedDataParallel's hooks cannot see.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

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


def global_mean(value: Tensor) -> Tensor:
    """The mean over processes of a detached tensor."""
    if not is_distributed():
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def warn_if_alone(world: int) -> None:
    """Warns when a launcher announced several processes but this one runs alone.

    `accelerate launch --cpu --num_processes 2` starts a single process without a word (accelerate issue 2741).
    """
    announced = int(os.environ.get("ACCELERATE_NUM_PROCESSES", os.environ.get("WORLD_SIZE", "1")) or 1)
    if announced > world:
        logger.warning(
            "%d processes were announced but one is running. On CPUs launch with: "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes %d ...",
            announced,
            announced,
        )
