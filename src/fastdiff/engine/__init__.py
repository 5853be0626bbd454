"""The training loop around any method."""

from __future__ import annotations

from fastdiff.engine.batches import chosen_data
from fastdiff.engine.settings import Settings
from fastdiff.engine.trainer import Trainer

__all__ = ["Settings", "Trainer", "chosen_data"]
