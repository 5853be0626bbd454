"""Which noise schedule a diffusers scheduler config stands for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .base import NoiseSchedule
from .continuous import EDMSchedule, FlowSchedule, TrigSchedule
from .vp import VPSchedule

__all__ = ["is_flow", "schedule_from_config"]


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler config is one of flow matching, whatever its class."""
    name = str(config.get("_class_name", ""))
    solver = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    return name.startswith(("FlowMatch", "FlowMap")) or bool(solver)


def schedule_from_config(config: Mapping[str, Any], tokens: int | None = None) -> NoiseSchedule:
    """The process behind any diffusers scheduler config.

    Flow matching is known by its class name (``FlowMatch*``, ``FlowMap*``), or in a multistep solver by
    ``use_flow_sigmas`` or the prediction type ``flow_prediction``; EDM and SCM (TrigFlow) by their class names;
    anything else must describe a table of betas.

    Args:
        config: of the scheduler.
        tokens: image tokens that the network sees, from which a shift is made that depends on the resolution
            (``use_dynamic_shifting``); without it ``shift`` is the config's static one.

    Raises:
        ValueError: if the config is neither of these (see :meth:`VPSchedule.from_scheduler_config`).
    """
    name = str(config.get("_class_name", ""))
    if name.startswith(("FlowMatch", "FlowMap")):
        if config.get("use_dynamic_shifting") and tokens is not None:
            return FlowSchedule(_dynamic_shift(config, tokens))
        return FlowSchedule(shift=_number(config, "shift", 1.0))
    if is_flow(config):
        return FlowSchedule(shift=_number(config, "flow_shift", 1.0))
    if name.startswith("EDM"):
        return EDMSchedule(_number(config, "sigma_min", 0.002), _number(config, "sigma_max", 80.0))
    if name == "SCMScheduler":
        return TrigSchedule()
    return VPSchedule.from_scheduler_config(config)


def _dynamic_shift(config: Mapping[str, Any], tokens: int) -> float:
    """mu on the line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift); the shift is exp(mu)
    or, of the linear type, mu."""
    first, last = _number(config, "base_image_seq_len", 256), _number(config, "max_image_seq_len", 4096)
    low, high = _number(config, "base_shift", 0.5), _number(config, "max_shift", 1.15)
    mu = low + (high - low) * (tokens - first) / (last - first)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key)
    return default if value is None else float(value)
