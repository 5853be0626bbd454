"""Which noise schedule a diffusers scheduler config stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import NoiseSchedule
from .continuous import EDMSchedule, FlowSchedule, TrigSchedule
from .vp import VPSchedule

__all__ = ["schedule_from_config"]


def schedule_from_config(config: Mapping[str, Any]) -> NoiseSchedule:
    """The process behind any diffusers scheduler config.

    Flow matching is known by its class name (``FlowMatch*``, ``FlowMap*``), or in a multistep solver by
    ``use_flow_sigmas`` or the prediction type ``flow_prediction``; EDM and SCM (TrigFlow) by their class names;
    anything else must describe a table of betas. A shift that a pipeline resolves from the image size at run time
    (``use_dynamic_shifting``) is not in the config: then ``shift`` is the config's static one.

    Raises:
        ValueError: if the config is neither of these (see :meth:`VPSchedule.from_scheduler_config`).
    """
    name = str(config.get("_class_name", ""))
    if name.startswith(("FlowMatch", "FlowMap")):
        return FlowSchedule(shift=_number(config, "shift", 1.0))
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        return FlowSchedule(shift=_number(config, "flow_shift", 1.0))
    if name.startswith("EDM"):
        return EDMSchedule(_number(config, "sigma_min", 0.002), _number(config, "sigma_max", 80.0))
    if name == "SCMScheduler":
        return TrigSchedule()
    return VPSchedule.from_scheduler_config(config)


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key)
    return default if value is None else float(value)
