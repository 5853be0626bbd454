"""Shared by the engine's tests: a data source with latents, and comparison of whole runs."""

from __future__ import annotations

import torch

from fastdiff.data import PromptData

PROMPTS = ("a red apple", "a dog", "blue cat", "one house", "two trees")


class Latents(PromptData):
    """Prompts with random latents, as a cache would give them."""

    shape = (4, 16, 16)

    def __getitem__(self, index):
        item = index if isinstance(index, int) else index.item
        latents = torch.randn(self.shape, generator=torch.Generator().manual_seed(item))
        return super().__getitem__(index) | {"latents": latents}


class Pairs(Latents):
    """The same with noise beside the latents, as stored pairs have it."""

    def __getitem__(self, index):
        item = index if isinstance(index, int) else index.item
        return super().__getitem__(index) | {
            "noise": torch.randn(self.shape, generator=torch.Generator().manual_seed(100 + item))
        }


def weights(trainer) -> dict[str, torch.Tensor]:
    """Every trained tensor, optimizer state and average of a run, by name."""
    return {
        f"{group}/{name}": tensor.detach().clone()
        for group, tensors in trainer.tensor_groups().items()
        for name, tensor in tensors.items()
    }


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, e.g. {different[0]}"
