"""A peer's own loop, let run one batch at a time: its data loader is ours and waits between batches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any


class Turns:
    """Stands where a data loader would; `step()` hands one batch over and returns when the loop asks for the next.

    Args:
        batch: what the loop gets, again and again.
    """

    num_batches = num_samples = 10**9

    def __init__(self, batch: Any) -> None:
        self.batch = batch
        self._given, self._asked = threading.Semaphore(0), threading.Semaphore(0)
        self._failure: BaseException | None = None

    def __iter__(self) -> Iterator[Any]:
        while True:
            self._asked.release()
            self._given.acquire()
            yield self.batch

    def start(self, loop: Callable[[], object]) -> None:
        """Runs the loop in a thread of its own up to its first batch; whatever it raises is raised here."""

        def guarded() -> None:
            try:
                loop()
            except BaseException as error:
                self._failure = error
            self._asked.release()

        threading.Thread(target=guarded, daemon=True).start()
        self._wait()

    def step(self) -> None:
        """One pass of the loop's body."""
        self._given.release()
        self._wait()

    def _wait(self) -> None:
        self._asked.acquire()
        if self._failure is not None:
            raise RuntimeError("the peer's loop ended") from self._failure
