"""Stock diffusers schedulers whose saved config gives a student's times from the number of steps alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdiff.diffusion.schedules import FlowSchedule
from fastdiff.models.sampler import FLOW_UNITS, LCM_GRID, SamplerSpec

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

_BETA_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")


def stock_scheduler(
    spec: SamplerSpec, teacher_scheduler_config: Mapping[str, Any], prediction_type: str
) -> SchedulerMixin:
    """See `SamplerSpec.build_scheduler`."""
    if spec.tells_end:
        raise ValueError(
            "this student is told where each step ends, an input that changes from step to step; stock pipelines "
            "compute extra inputs once, so no stock scheduler can serve it. Sample it in process "
            "(fastdiff.models.sampler.sample), let every step end at the clean end (one step, or for ctm eta 1), or "
            "train a student without that input: --method tcd, pcm or tscd."
        )
    on_flow = str(teacher_scheduler_config.get("_class_name", "")).startswith("FlowMatch")
    if (prediction_type == "flow") != (spec.kind == "flow" or (on_flow and spec.kind in ("lcm", "ddim"))):
        raise ValueError(
            f"a {spec.kind!r} sampler cannot use prediction type {prediction_type!r} here: 'flow' predictions "
            "need a 'flow' sampler, or 'lcm' or 'ddim' and a flow-matching teacher; 'epsilon', 'sample' and "
            "'v_prediction' need 'lcm', 'ddim' or 'tcd'."
        )
    if prediction_type == "flow":
        return _flow_scheduler(spec, teacher_scheduler_config)
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


def _flow_scheduler(spec: SamplerSpec, config: Mapping[str, Any]) -> SchedulerMixin:
    from diffusers import FlowMatchEulerDiscreteScheduler

    shift = config.get("shift") or 1.0
    times = [FLOW_UNITS * t for t in spec.schedule_times(FlowSchedule(shift))]
    settings = {"num_train_timesteps": FLOW_UNITS, "shift": shift, "stochastic_sampling": spec.kind == "lcm"}
    choices = [settings]
    if len(spec) > 1:
        # The stock grid ends near 0; `shift_terminal` stretches it so that it ends at the last trained time.
        end = {"shift_terminal": times[-1] / FLOW_UNITS}
        choices += [settings | end, settings | {"shift": 1.0} | end]
    for choice in choices:
        scheduler = FlowMatchEulerDiscreteScheduler(**choice)
        scheduler.set_timesteps(len(spec))
        if torch.allclose(scheduler.timesteps, torch.tensor(times, dtype=torch.float32), rtol=0, atol=1e-3):
            return scheduler
    raise ValueError(
        f"no FlowMatchEulerDiscreteScheduler config gives the timesteps {times} (1000 t) from "
        f"num_inference_steps={len(spec)} alone; with shift 1 an evenly spaced grid can be saved, e.g. "
        f"{list(SamplerSpec.trailing('flow', len(spec)).timesteps)}."
    )
