"""Errors of the ways in; importable without torch."""

from __future__ import annotations

from pathlib import Path


class RecipeError(ValueError):
    """A key or flag that is unknown, refused or has a value of the wrong type."""


class RunInterrupted(RuntimeError):
    """A signal stopped the run after a checkpoint; `signal` is its name."""

    def __init__(self, signal: str, folder: Path, step: int) -> None:
        super().__init__(
            f"stopped by {signal} at step {step}; the checkpoint is written. Run the same command with "
            f"--resume_from_checkpoint latest to go on (run folder {folder})"
        )
        self.signal = signal
