"""Bad data is counted and named, and too much of it is an error."""

from collections.abc import Iterable
from typing import NamedTuple

NAMED = 5


class Reject(NamedTuple):
    """One item that could not be used: its name in the source and why."""

    key: str
    reason: str


class RejectedImage(ValueError):
    """Raised by an image source for an item that cannot be decoded; `reject` says which and why."""

    def __init__(self, key: str, reason: str):
        super().__init__(key, reason)
        self.reject = Reject(key, reason)

    def __str__(self) -> str:
        return f"{self.reject.key}: {self.reject.reason}"


class TooManyRejects(ValueError):
    """The share of unusable items is above what the caller allows."""


class Rejects:
    """Counts unusable items of a source of `total` items, each key once, and stops above `max_share`.

    Raises ValueError for a share outside [0, 1]; `add` and `absorb` raise TooManyRejects.
    """

    def __init__(self, total: int, max_share: float = 0.05, source: str = "the data"):
        if not 0 <= max_share <= 1:
            raise ValueError(f"the allowed share of rejects must lie in [0, 1], got {max_share}")
        self.total = total
        self.max_share = max_share
        self.source = source
        self._reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._reasons)

    def __iter__(self):
        return (Reject(key, reason) for key, reason in self._reasons.items())

    def add(self, key: str, reason: str) -> None:
        """Counts one item; seeing it again (in a later epoch) changes nothing."""
        self.absorb([Reject(key, reason)])

    def absorb(self, rejected: Iterable[Reject]) -> None:
        """Counts many, such as what a data loader worker met (`batch["rejected"]`), and then looks at the share."""
        for key, reason in rejected:
            self._reasons.setdefault(key, reason)
        if len(self) > self.max_share * self.total:
            raise TooManyRejects(
                f"{self.source}: {self.summary()}. At most {self.max_share:.1%} may be rejected: repair or remove "
                "these items, or allow a larger share"
            )

    def summary(self) -> str:
        """Such as ``12 of 5,000 rejected: a.png (truncated), b.png (no caption), ... and 10 more``."""
        counted = f"{len(self):,} of {self.total:,} rejected"
        if not self._reasons:
            return counted
        named = [f"{key} ({reason})" for key, reason in list(self._reasons.items())[:NAMED]]
        rest = len(self) - len(named)
        return f"{counted}: {', '.join(named)}" + (f", ... and {rest:,} more" if rest else "")
