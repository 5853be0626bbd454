"""Which item is seen when: index arithmetic that does not depend on how a run is split over processes.

A sample's position in a run is step * global_batch + p. Everything else (item, epoch, random draws) follows from the
position, so that N processes with accumulation see what one process sees, and resuming is starting at a later step.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch


class Visit(NamedTuple):
    """The visit of an item in an epoch; what a training source is indexed with."""

    item: int
    epoch: int


class EpochPermutation:
    """Position -> item: position p is item `permutation(epoch)[p % length]` of epoch `p // length`.

    Every epoch has its own permutation, drawn on demand from (seed, epoch); nothing is remembered between positions.
    Raises ValueError for a length below 1 and IndexError for a negative position.
    """

    def __init__(self, length: int, seed: int):
        if length < 1:
            raise ValueError(f"cannot permute {length} items: the data must hold at least one")
        self.length = length
        self.seed = seed
        self._drawn: dict[int, torch.Tensor] = {}

    def __getitem__(self, position: int) -> int:
        return self.visit(position).item

    def visit(self, position: int) -> Visit:
        """The item at `position` and the epoch this is in."""
        if position < 0:
            raise IndexError(f"positions start at 0, got {position}")
        epoch, place = divmod(position, self.length)
        return Visit(int(self.permutation(epoch)[place]), epoch)

    def permutation(self, epoch: int) -> torch.Tensor:
        """The order of the items in `epoch`, int64 of shape (length,)."""
        if epoch not in self._drawn:
            # A batch may straddle two epochs: the two last drawn stay.
            for old in list(self._drawn)[:-1]:
                del self._drawn[old]
            # Hashed, since seed + epoch would give seed 1 the epochs of seed 0, one late.
            digest = hashlib.blake2b(f"{self.seed}:{epoch}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            self._drawn[epoch] = torch.randperm(self.length, generator=generator)
        return self._drawn[epoch]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_drawn": {}}


def global_positions(step: int, micro_step: int, batch_size: int, accumulation: int, rank: int, world: int) -> range:
    """Positions of the micro-batch `micro_step` of `step` on process `rank` of `world`.

    `batch_size` counts samples a process and micro-step, so the global batch is batch_size * accumulation * world.
    The micro-batches of all processes partition [step * global, (step + 1) * global). ValueError when out of range.
    """
    if min(batch_size, accumulation, world) < 1:
        raise ValueError(
            f"batch size {batch_size}, accumulation {accumulation}, world {world}: all must be at least 1"
        )
    if step < 0 or not 0 <= micro_step < accumulation or not 0 <= rank < world:
        raise ValueError(
            f"step {step}, micro-step {micro_step} of {accumulation}, rank {rank} of {world}: expected step >= 0, "
            "0 <= micro-step < accumulation and 0 <= rank < world"
        )
    start = ((step * accumulation + micro_step) * world + rank) * batch_size
    return range(start, start + batch_size)


class StepBatches:
    """Batch sampler for a torch DataLoader: one list of visits a micro-batch, for steps first_step ... last_step - 1.

    Resuming after step k is `first_step=k`; the remaining batches are the same as in a straight run.
    """

    def __init__(
        self,
        permutation: EpochPermutation,
        *,
        batch_size: int,
        first_step: int,
        last_step: int,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
    ):
        global_positions(0, 0, batch_size, accumulation, rank, world)  # validates
        self.permutation = permutation
        self.batch_size = batch_size
        self.steps = range(first_step, last_step)
        self.accumulation = accumulation
        self.rank = rank
        self.world = world

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation

    def __iter__(self) -> Iterator[list[Visit]]:
        for step in self.steps:
            for micro_step in range(self.accumulation):
                positions = global_positions(
                    step, micro_step, self.batch_size, self.accumulation, self.rank, self.world
                )
                yield [self.permutation.visit(position) for position in positions]
