"""Noise schedules: how much signal and noise there is at a time."""

from .base import NoiseSchedule, Terminal, rewrap
from .config import is_flow, schedule_from_config
from .continuous import EDMSchedule, FlowSchedule, TrigSchedule
from .vp import CLEAN_INDEX, LAST_INDEX, VPSchedule

__all__ = [
    "CLEAN_INDEX",
    "LAST_INDEX",
    "EDMSchedule",
    "FlowSchedule",
    "NoiseSchedule",
    "Terminal",
    "TrigSchedule",
    "VPSchedule",
    "is_flow",
    "rewrap",
    "schedule_from_config",
]
