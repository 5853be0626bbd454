"""Diffusion mathematics on plain tensors: no networks, no files, no devices."""

from .prediction import Prediction, PredictionKind, guide, prediction_target
from .schedules import (
    CLEAN_INDEX,
    EDMSchedule,
    FlowSchedule,
    NoiseSchedule,
    TrigSchedule,
    VPSchedule,
    rewrap,
    schedule_from_config,
)
from .tensors import as_times, broadcast_to, compute_dtype

__all__ = [
    "CLEAN_INDEX",
    "EDMSchedule",
    "FlowSchedule",
    "NoiseSchedule",
    "Prediction",
    "PredictionKind",
    "TrigSchedule",
    "VPSchedule",
    "as_times",
    "broadcast_to",
    "compute_dtype",
    "guide",
    "prediction_target",
    "rewrap",
    "schedule_from_config",
]
