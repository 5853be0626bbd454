"""What a denoiser is conditioned on: a named bundle of tensors that share their batch dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Prompt embeddings and whatever else a network family wants per sample.

    Args:
        tensors: name -> tensor of shape `(B, ...)`; the names are the family's own
            (`prompt_embeds`, `pooled_prompt_embeds`, `time_ids`, ...).

    Raises:
        ValueError: if the tensors disagree about the batch size.
    """

    tensors: Mapping[str, Tensor]

    def __post_init__(self):
        sizes = {name: tensor.shape[0] for name, tensor in self.tensors.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"conditioning tensors must share their batch size, got {sizes}")

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Conditioning:
        return Conditioning({name: tensor[rows] for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Moves all tensors; `dtype` applies to floating point tensors only."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None, non_blocking=True)

        return Conditioning({name: move(tensor) for name, tensor in self.tensors.items()})

    def expand(self, batch_size: int) -> Conditioning:
        """Repeats a bundle of batch size 1 to `batch_size` without copying."""
        if len(self) == batch_size:
            return self
        if len(self) != 1:
            raise ValueError(f"only a single row can be expanded, this bundle has {len(self)} rows")
        return Conditioning(
            {name: tensor.expand(batch_size, *tensor.shape[1:]) for name, tensor in self.tensors.items()}
        )

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Stacks bundles of the same family along the batch."""
        if len(parts) == 1:
            return parts[0]
        return Conditioning({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})
