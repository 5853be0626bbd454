"""Randomness that is a function of (seed, step, sample index, site) and of nothing else.

A draw does not depend on the batch a sample sits in, on the process that holds it, or on what was drawn before:
N processes equal one, resuming is exact, and draws shared by all processes need no communication. The generator is
Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["InjectedRandomness", "Randomness", "philox4x32", "stream_seed"]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Word = TypeVar("Word", int, Tensor)


def philox4x32(counter: Sequence[Word], key: tuple[int, int]) -> tuple[Word, Word, Word, Word]:
    """Ten rounds of Philox on four 32-bit counter words (ints, or int64 tensors of one shape) under a 2-word key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2^64, so shifting and masking still gives the exact upper and lower words.
        left, right = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            ((right >> 32) & _MASK) ^ c1 ^ k0,
            right & _MASK,
            ((left >> 32) & _MASK) ^ c3 ^ k1,
            left & _MASK,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def stream_seed(seed: int, stream: int) -> int:
    """The seed of one of several streams of a run's seed; stream 0 has the seed itself."""
    return seed + stream * 0x9E3779B9


class Randomness:
    """The draws of one training step for a batch of samples.

    Args:
        seed: of the run; its lower 64 bits count.
        step: the training step (lower 32 bits count).
        indices: (B,) int64, each sample's own number (lower 32 bits count); draws land on its device, and none of
            them waits for the device.

    A ``site`` names the place a draw is for ("fake/noise"). The same site gives the same values, so every place needs
    its own; the kinds of draws at one site are independent.

    Raises:
        ValueError: if ``indices`` is not one axis of int64.
    """

    def __init__(self, seed: int, step: int, indices: Tensor) -> None:
        if indices.dim() != 1 or indices.dtype != torch.int64:
            raise ValueError(
                f"sample indices have shape {tuple(indices.shape)} and dtype {indices.dtype}: give one axis of int64"
            )
        self.seed = seed
        self.step = step
        self.indices = indices

    def normal(self, site: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, *shape) standard normal values; below float32 they are drawn in float32 and rounded."""
        words = self._words(f"normal:{site}", math.prod(shape))
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        unit = (words.to(exact) + 0.5) * 2.0**-32  # never 0, so the logarithm is finite
        radius = (-2 * unit[..., 0::2].log()).sqrt()
        angle = 2 * math.pi * unit[..., 1::2]
        values = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)  # Box and Muller
        return self._shaped(values, shape).to(dtype)

    def uniform(self, site: str, shape: Sequence[int] = ()) -> Tensor:
        """(B, *shape) float32 values strictly inside (0, 1), multiples of 2^-24."""
        words = self._words(f"uniform:{site}", math.prod(shape))
        # 23 bits and a half: the largest value is the last float32 below 1.
        return self._shaped(((words >> 9).to(torch.float32) + 0.5) * 2.0**-23, shape)

    def integers(self, site: str, low: int, high: int) -> Tensor:
        """(B,) int64 values in low, ..., high - 1 (as torch.randint).

        Raises:
            ValueError: unless ``low < high`` and the range fits in 31 bits.
        """
        return low + ((self._words(f"integers:{site}", 1)[:, 0, 0] * _span(low, high)) >> 32)

    def bernoulli(self, site: str, p: float) -> Tensor:
        """(B,) booleans, True with probability ``p``; exactly never at 0, always at 1.

        Raises:
            ValueError: unless ``0 <= p <= 1``.
        """
        if not 0 <= p <= 1:
            raise ValueError(f"probability {p!r} at {site!r}: give a number from 0 to 1")
        return self._words(f"bernoulli:{site}", 1)[:, 0, 0] < round(p * 2**32)

    def shared_integer(self, site: str, low: int, high: int) -> int:
        """One integer in low, ..., high - 1, the same for all samples and processes; computed on the host.

        Raises:
            ValueError: unless ``low < high`` and the range fits in 31 bits.
        """
        return low + ((self._shared_word(f"shared_integer:{site}") * _span(low, high)) >> 32)

    def shared_uniform(self, site: str) -> float:
        """One number inside (0, 1), the same for all samples and processes; computed on the host."""
        return (self._shared_word(f"shared_uniform:{site}") + 0.5) * 2.0**-32

    @property
    def _key(self) -> tuple[int, int]:
        return self.seed & _MASK, (self.seed >> 32) & _MASK

    def _words(self, site: str, count: int) -> Tensor:
        """(B, blocks, 4) int64 words below 2^32, enough blocks for ``count`` values."""
        device, blocks = self.indices.device, -(-count // 4)
        block = torch.arange(blocks, device=device).expand(len(self.indices), blocks)
        sample = (self.indices & _MASK)[:, None].expand_as(block)
        # Fills rather than copies: putting a host number on a device this way does not wait for it.
        step = torch.full_like(block, self.step & _MASK)
        place = torch.full_like(block, zlib.crc32(site.encode()))
        return torch.stack(philox4x32((block, sample, step, place), self._key), dim=-1)

    def _shared_word(self, site: str) -> int:
        return philox4x32((0, 0, self.step & _MASK, zlib.crc32(site.encode())), self._key)[0]

    def _shaped(self, values: Tensor, shape: Sequence[int]) -> Tensor:
        return values.flatten(1)[:, : math.prod(shape)].reshape(len(self.indices), *shape)


class InjectedRandomness:
    """Given draws at some sites, those of ``fallback`` at all others: for tests and for comparing with other code.

    Args:
        values: by site, a tensor for a per-sample draw, a number for a shared one.
        fallback: asked for every other site.

    Every method raises ValueError if an injected tensor does not have the shape that is asked for.
    """

    def __init__(self, values: Mapping[str, Tensor | float], fallback: Randomness) -> None:
        self.values = dict(values)
        self.fallback = fallback
        self.seed, self.step, self.indices = fallback.seed, fallback.step, fallback.indices

    def normal(self, site: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        if site in self.values:
            return self._given(site, shape).to(dtype)
        return self.fallback.normal(site, shape, dtype)

    def uniform(self, site: str, shape: Sequence[int] = ()) -> Tensor:
        return self._given(site, shape) if site in self.values else self.fallback.uniform(site, shape)

    def integers(self, site: str, low: int, high: int) -> Tensor:
        return self._given(site, ()) if site in self.values else self.fallback.integers(site, low, high)

    def bernoulli(self, site: str, p: float) -> Tensor:
        return self._given(site, ()) if site in self.values else self.fallback.bernoulli(site, p)

    def shared_integer(self, site: str, low: int, high: int) -> int:
        return int(self.values[site]) if site in self.values else self.fallback.shared_integer(site, low, high)

    def shared_uniform(self, site: str) -> float:
        return float(self.values[site]) if site in self.values else self.fallback.shared_uniform(site)

    def _given(self, site: str, shape: Sequence[int]) -> Tensor:
        value, wanted = torch.as_tensor(self.values[site]), (len(self.indices), *shape)
        if value.shape != wanted:
            raise ValueError(f"injected draw {site!r} has shape {tuple(value.shape)}: {wanted} was asked for")
        return value.to(self.indices.device)


def _span(low: int, high: int) -> int:
    if not 0 < high - low < 2**31:
        raise ValueError(f"integers from {low} up to, not including, {high}: give low < high, less than 2^31 apart")
    return high - low
