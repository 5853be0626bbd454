"""Prompt dropout: some samples of a batch get the null conditioning."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastdiff.diffusion.tensors import broadcast_to
from fastdiff.methods.base import Batch
from fastdiff.models.conditioning import Conditioning


def without_prompts(batch: Batch, dropped: Tensor) -> Batch:
    """The batch with the null conditioning in the rows where `dropped`, `(B,)` of booleans, says so."""
    null = batch.null.expand(len(batch)).tensors
    tensors = {
        name: torch.where(broadcast_to(dropped, tensor), null[name].to(tensor.dtype), tensor)
        for name, tensor in batch.cond.tensors.items()
    }
    return replace(batch, cond=Conditioning(tensors))
