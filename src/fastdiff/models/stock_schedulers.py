"""Stock diffusers schedulers whose saved config gives a student's times from the number of steps alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.diffusion.schedules import FlowSchedule, NoiseSchedule, is_flow, schedule_from_config
from fastdiff.models.sampler import FLOW_UNITS, LCM_GRID, SamplerSpec

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

_BETA_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")


def stock_scheduler(
    spec: SamplerSpec,
    teacher_scheduler_config: Mapping[str, Any],
    prediction_type: str,
    schedule: NoiseSchedule | None = None,
    gives_levels: bool = False,
) -> SchedulerMixin:
    """See `SamplerSpec.build_scheduler`."""
    if spec.tells_end:
        raise ValueError(
            "this network is told where each step ends, an input that changes from step to step; stock pipelines compute "
            "extra inputs once. Make it part of the network at the sampler's times "
            "(fastdiff.models.embeddings.with_input_at_times), as the export of a run does, and leave tells_end out."
        )
    if (prediction_type == "flow") != _on_flow(spec, teacher_scheduler_config):
        raise ValueError(
            f"a {spec.kind!r} sampler cannot use prediction type {prediction_type!r} here: 'flow' predictions "
            "need a 'flow' sampler, or 'lcm' or 'ddim' and a flow-matching teacher; 'epsilon', 'sample' and "
            "'v_prediction' need 'lcm', 'ddim' or 'tcd'."
        )
    if prediction_type == "flow":
        schedule = schedule or _flow_of(teacher_scheduler_config)
        if (scheduler := _flow_scheduler(spec, schedule, gives_levels)) is not None:
            return scheduler
        times = [round(FLOW_UNITS * t, 3) for t in spec.schedule_times(schedule)]
        raise ValueError(
            f"no FlowMatchEulerDiscreteScheduler config gives the timesteps {times} (1000 t) from "
            f"num_inference_steps={len(spec)} alone: pass them to the pipeline as sigmas (`SamplerSpec.storable` fills "
            "them in); with shift 1 an evenly spaced grid can be saved, e.g. "
            f"{list(SamplerSpec.trailing('flow', len(spec)).timesteps)}."
        )
    betas = _teacher_betas(teacher_scheduler_config)
    if spec.timesteps[0] >= len(betas):
        raise ValueError(f"timestep {spec.timesteps[0]} is not on the teacher's table of {len(betas)} steps.")
    alpha_squared = torch.cumprod(1 - betas, 0)[spec.timesteps[0]]
    if prediction_type == "epsilon" and alpha_squared <= 1e-10:
        raise ValueError(
            f"at timestep {spec.timesteps[0]} this schedule has no signal (zero terminal SNR), where x0 cannot be "
            "had from 'epsilon'; use prediction type 'v_prediction' or 'sample', or start below it."
        )
    search = {"lcm": _lcm_scheduler, "ddim": _ddim_scheduler, "tcd": _tcd_scheduler}[spec.kind]
    for steps in (len(betas), spec.timesteps[0] + 1):
        common = _vp_config(teacher_scheduler_config, betas, steps) | {"prediction_type": prediction_type}
        if (scheduler := search(spec, common)) is not None:
            return scheduler
    forced = spec.original_inference_steps
    fixed = f" with original_inference_steps={forced}" if forced else ""
    near = list(SamplerSpec.trailing(spec.kind, len(spec), spec.timesteps[0]).timesteps)
    raise ValueError(
        f"no stock {spec.kind.upper()} scheduler config{fixed} gives the timesteps {list(spec.timesteps)} from "
        f"num_inference_steps={len(spec)} alone. The nearest evenly spaced grid that can be saved is {near}; "
        "train on that one, so that the exported student needs no flag."
    )


def with_sigmas(
    spec: SamplerSpec, teacher_scheduler_config: Mapping[str, Any], schedule: NoiseSchedule, gives_levels: bool
) -> SamplerSpec:
    """See `SamplerSpec.storable`."""
    if not _on_flow(spec, teacher_scheduler_config) or _flow_scheduler(spec, schedule, gives_levels) is not None:
        return spec
    return replace(spec, sigmas=tuple(spec.schedule_times(schedule)))


def _on_flow(spec: SamplerSpec, config: Mapping[str, Any]) -> bool:
    return spec.kind == "flow" or (is_flow(config) and spec.kind in ("lcm", "ddim"))


def _flow_of(config: Mapping[str, Any]) -> NoiseSchedule:
    return schedule_from_config(config) if is_flow(config) else FlowSchedule()


def _teacher_betas(config: Mapping[str, Any]) -> Tensor:
    """Float32 betas exactly as diffusers computes them, whatever class the config was saved by."""
    from diffusers import DDPMScheduler

    if config.get("trained_betas") is None and (missing := [key for key in _BETA_KEYS if key not in config]):
        raise ValueError(
            f"the teacher's scheduler config ({config.get('_class_name', 'no class')}) lacks {missing}; pass the "
            "content of its scheduler_config.json, as saved by save_pretrained."
        )
    keys = (*_BETA_KEYS, "trained_betas", "rescale_betas_zero_snr")
    return DDPMScheduler(**{key: config[key] for key in keys if config.get(key) is not None}).betas


def _vp_config(config: Mapping[str, Any], betas: Tensor, steps: int) -> dict[str, Any]:
    """Scheduler settings for the first `steps` betas; a shorter table lets the grid begin below the last index.

    The loaded scheduler recomputes the same float32 products, since JSON keeps float32 values exactly.
    """
    plain = config.get("trained_betas") is None and not config.get("rescale_betas_zero_snr")
    if steps == len(betas) and plain and config["beta_schedule"] in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        table = {key: config[key] for key in _BETA_KEYS}
    else:
        table = {"num_train_timesteps": steps, "trained_betas": betas[:steps].tolist()}
        table |= {key: config[key] for key in _BETA_KEYS[1:3] if key in config}
    # steps_offset=1 is what Stable Diffusion pipelines demand at load; neither grid below reads it.
    return table | {"clip_sample": False, "set_alpha_to_one": True, "steps_offset": 1, "timestep_spacing": "trailing"}


def _lcm_scheduler(spec: SamplerSpec, common: dict[str, Any]) -> SchedulerMixin | None:
    from diffusers import LCMScheduler

    search = LCMScheduler(**common)
    for grid in _lcm_grids(spec, common["num_train_timesteps"]):
        search.set_timesteps(len(spec), original_inference_steps=grid)
        if search.timesteps.tolist() == list(spec.timesteps):
            return LCMScheduler(**common, original_inference_steps=grid, timestep_scaling=spec.timestep_scaling)
    return None


def _lcm_grids(spec: SamplerSpec, train_steps: int) -> Iterator[int]:
    """Settings of original_inference_steps, best first: the full table serves every step count, then LCM's own 50."""
    if spec.original_inference_steps is not None:
        if len(spec) <= spec.original_inference_steps <= train_steps:
            yield spec.original_inference_steps
        return
    if train_steps >= len(spec):
        yield train_steps
    if len(spec) <= LCM_GRID <= train_steps:
        yield LCM_GRID
    yield from range(train_steps - 1, len(spec) - 1, -1)


def _ddim_scheduler(spec: SamplerSpec, common: dict[str, Any]) -> SchedulerMixin | None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**common)
    if len(spec) > common["num_train_timesteps"]:
        return None
    scheduler.set_timesteps(len(spec))
    times = scheduler.timesteps.tolist()
    # Stock DDIM lands on t - T // n, not on the next time of its list: both must agree, or it is another sampler.
    jump = common["num_train_timesteps"] // len(spec)
    landed = [t - jump for t in times]
    return scheduler if times == list(spec.timesteps) and landed[:-1] == times[1:] and landed[-1] < 0 else None


def _tcd_scheduler(spec: SamplerSpec, common: dict[str, Any]) -> SchedulerMixin | None:
    from diffusers import TCDScheduler

    search = TCDScheduler(**common)
    for grid in _lcm_grids(spec, common["num_train_timesteps"]):
        # Said in the config, not in the call, which would mean another grid.
        search.register_to_config(original_inference_steps=grid)
        search.set_timesteps(len(spec))
        if search.timesteps.tolist() == list(spec.timesteps):
            return TCDScheduler(**common, original_inference_steps=grid)
    return None


def _flow_scheduler(spec: SamplerSpec, schedule: NoiseSchedule, gives_levels: bool) -> SchedulerMixin | None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    levels = spec.schedule_times(schedule)
    asked = {"num_inference_steps": len(spec)}
    if spec.sigmas or gives_levels:
        asked = {"sigmas": list(spec.sigmas) or np.linspace(1.0, 1 / len(spec), len(spec))}
    for choice in _flow_settings(spec, levels, schedule.shift):
        settings = {"num_train_timesteps": FLOW_UNITS, "stochastic_sampling": spec.kind == "lcm"} | choice
        scheduler = FlowMatchEulerDiscreteScheduler(**settings)
        scheduler.set_timesteps(**asked)
        wanted = FLOW_UNITS * torch.tensor(levels, dtype=torch.float32)
        if torch.allclose(scheduler.timesteps, wanted, rtol=0, atol=1e-3):
            return scheduler
    return None


def _flow_settings(spec: SamplerSpec, levels: list[float], shift: float) -> Iterator[dict[str, float]]:
    """Shifts to try; the schedule's own first, since it serves other numbers of steps as well."""
    if spec.sigmas:
        yield {"shift": 1.0}
        return
    yield {"shift": shift}
    if len(levels) > 1:
        yield {"shift": 1.0}
        # A grid that the scheduler makes ends near 0; `shift_terminal` stretches it to end at the last trained time.
        yield {"shift": shift, "shift_terminal": levels[-1]}
        yield {"shift": 1.0, "shift_terminal": levels[-1]}
