"""The sampler a student is trained for, once in process (`sample`) and once as a stock diffusers scheduler.

A `SamplerSpec` is the only description of how a student makes a picture: trainers sample with `sample`, exports save
`SamplerSpec.build_scheduler(...)`, and both give the same picture from the same noise. The saved scheduler needs no
flag but `num_inference_steps=len(timesteps)`, and `eta` where TCD adds noise.

The student's first input is the noise z itself, not sigma * z: that is what LCMScheduler and DDIMScheduler feed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from fastdiff.diffusion.schedules import CLEAN_INDEX, FlowSchedule, NoiseSchedule, Terminal, VPSchedule
from fastdiff.diffusion.steps import jump
from fastdiff.diffusion.tensors import as_times, broadcast_to

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from fastdiff.diffusion.prediction import Prediction

SamplerKind = Literal["lcm", "ddim", "flow", "tcd"]
Predict = Callable[[Tensor, Tensor, Tensor], "Prediction"]

# LCM's boundary condition: c_skip = s^2 / ((k t)^2 + s^2), with k = `timestep_scaling` (Luo et al., arXiv 2310.04378).
SIGMA_DATA = 0.5
LCM_GRID = 50
FLOW_UNITS = 1000


@dataclass(frozen=True)
class SamplerSpec:
    """How a few-step student samples.

    Args:
        kind: "lcm" predicts x0 and adds fresh noise at every step (LCM, arXiv 2310.04378; DMD2, arXiv 2405.14867);
            "ddim" is the deterministic jump (DDIM, arXiv 2010.02502); "flow" is Euler on x_t = (1 - t) x0 + t eps;
            "tcd" jumps below the next time and adds noise up to it (strategic stochastic sampling, TCD, arXiv
            2402.19159), and ends at index 0.
        timesteps: strictly decreasing times: indices 1..T-1 of any schedule, or 1000 t for "flow".
        guidance_scale: what the user passes to the diffusers pipeline; 0 means one conditional call a step.
        timestep_scaling: LCM's boundary scaling k; at k = 10 the skip weight is below 1e-5 for every t >= 16.
        original_inference_steps: fixes LCMScheduler's grid (50 for a student trained on LCM's 50-step grid, so that
            other step counts stay on it); None takes the trailing grid wherever that gives `timesteps`.
        eta: of "tcd": 0 is the deterministic jump, 1 jumps to index 0 and noises from there. Stock schedulers do not
            save it: the user passes `eta` to the pipeline.
        tells_end: the network is told where each step ends, which stock pipelines cannot do; an export makes it part of
            the network at these very times.
        own_steps_only: the network is right at these times alone, as that export leaves it.
        sigmas: noise levels of a flow that the user passes to the pipeline, where no config of its scheduler gives them
            from the number of steps alone; `storable` fills them in.

    Raises:
        ValueError: for an unknown kind, times that do not strictly decrease or are not positive, or a bad number.
    """

    kind: SamplerKind
    timesteps: tuple[float, ...]
    guidance_scale: float = 0.0
    timestep_scaling: float = 10.0
    original_inference_steps: int | None = None
    eta: float = 0.0
    tells_end: bool = False
    own_steps_only: bool = False
    sigmas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(SamplerKind):
            raise ValueError(f"sampler kind {self.kind!r} is unknown; choose from {get_args(SamplerKind)}.")
        times = tuple(self.timesteps)
        if not times or not all(math.isfinite(t) and t > 0 for t in times) or list(times) != sorted(set(times))[::-1]:
            raise ValueError(f"timesteps {list(times)} must be positive and strictly decreasing, e.g. (999, 499).")
        if self.kind != "flow":
            if any(t != int(t) for t in times):
                raise ValueError(f"timesteps {list(times)} of a {self.kind!r} sampler must be whole indices.")
            times = tuple(int(t) for t in times)
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise ValueError(f"guidance_scale must be a number >= 0 (0 means none), not {self.guidance_scale}.")
        if not self.timestep_scaling > 0:
            raise ValueError(f"timestep_scaling must be positive (LCM's is 10), not {self.timestep_scaling}.")
        if not 0 <= self.eta <= 1 or (self.eta and self.kind != "tcd"):
            raise ValueError(f"eta must be in [0, 1], and 0 unless the kind is 'tcd', not {self.eta} ({self.kind!r}).")
        if self.original_inference_steps is not None and self.kind != "lcm":
            raise ValueError(
                f"original_inference_steps belongs to 'lcm' samplers, not to {self.kind!r}; leave it out."
            )
        object.__setattr__(self, "timesteps", times)

    @classmethod
    def trailing(cls, kind: SamplerKind, steps: int, start: int = 999, guidance_scale: float = 0.0) -> SamplerSpec:
        """`steps` evenly spaced times ending one interval above clean data: (999, 749, 499, 249) for 4 from 999.

        Stock DDIM jumps by a whole number of indices, so its grid begins at the largest start at or below `start` for
        which `steps` divides start + 1 (998 for three steps from 999).
        """
        if not 1 <= steps <= start:
            raise ValueError(f"{steps} steps do not fit between index {start} and 0; choose 1..{start} steps.")
        if kind == "flow":
            times: tuple[float, ...] = tuple(FLOW_UNITS * (steps - i) / steps for i in range(steps))
            return cls(kind, times, guidance_scale)
        count = start + 1
        if kind == "ddim":
            count -= count % steps
        return cls(kind, tuple(count - 1 - i * count // steps for i in range(steps)), guidance_scale)

    @classmethod
    def lcm_grid(
        cls, steps: int, grid: int = LCM_GRID, train_steps: int = 1000, timestep_scaling: float = 10.0
    ) -> SamplerSpec:
        """`steps` times of LCM's own grid of `grid` times: (999, 759, 499, 259) for 4 of 50 (arXiv 2310.04378)."""
        if not 1 <= steps <= grid <= train_steps:
            raise ValueError(f"need 1 <= steps <= grid <= {train_steps}, got {steps} steps on a grid of {grid} times.")
        skip = train_steps // grid
        times = tuple((grid - i * grid // steps) * skip - 1 for i in range(steps))
        return cls("lcm", times, timestep_scaling=timestep_scaling, original_inference_steps=grid)

    def __len__(self) -> int:
        """Number of steps, which is the number of network calls of an unguided student."""
        return len(self.timesteps)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` gives the same spec back."""
        return asdict(self) | {"timesteps": list(self.timesteps), "sigmas": list(self.sigmas)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplerSpec:
        """The spec written by `to_dict`.

        Raises:
            ValueError: for keys that are not settings of a sampler.
        """
        known = {field.name for field in fields(cls)}
        if unknown := set(values) - known:
            raise ValueError(f"sampler settings {sorted(unknown)} are unknown; the settings are {sorted(known)}.")
        if missing := {"kind", "timesteps"} - set(values):
            raise ValueError(f"sampler settings {sorted(missing)} are missing from {dict(values)}.")
        lists = {name: tuple(values[name]) for name in ("timesteps", "sigmas") if name in values}
        return cls(**{**values, **lists})

    def schedule_times(self, schedule: NoiseSchedule) -> list[float]:
        """The times in the units of the schedule: indices for VP schedules, 0..1 for flow matching."""
        if self.kind == "flow":
            return [t / FLOW_UNITS for t in self.timesteps]
        return [float(schedule.time_of_index(t)) for t in self.timesteps]

    def end(self, step: int, schedule: NoiseSchedule) -> float | Terminal:
        """Where the network's own step number `step` ends, before any noise is added: a schedule time."""
        last = step == len(self) - 1
        if self.kind == "tcd":
            return float(schedule.time_of_index(0 if last else math.floor((1 - self.eta) * self.timesteps[step + 1])))
        return Terminal.CLEAN if last or self.kind == "lcm" else self.schedule_times(schedule)[step + 1]

    def end_time(self, step: int, schedule: NoiseSchedule) -> float:
        """The same as a number, for networks that are told it."""
        end = self.end(step, schedule)
        return float(schedule.time_of_index(CLEAN_INDEX)) if end is Terminal.CLEAN else end

    def call_arguments(self) -> dict[str, Any]:
        """What a user passes to the stock pipeline besides the prompt, guidance left out."""
        extra = {"eta": self.eta, "sigmas": list(self.sigmas)}
        return {"num_inference_steps": len(self)} | {name: value for name, value in extra.items() if value}

    def levels_of(self, steps: int) -> list[float]:
        """Levels on a flow for another number of steps: this sampler's grid, shifted as `sigmas` are if there are any.

        Stock grids that pipelines leave to their scheduler end near clean data, where the last call is lost.
        """
        if self.kind == "lcm" and self.original_inference_steps:
            other = self.lcm_grid(steps, self.original_inference_steps)
        else:
            other = self.trailing(self.kind, steps, int(self.timesteps[0]))
        shift = 1.0
        if self.sigmas and self.kind != "flow" and len(self) > 1:
            u, level = (self.timesteps[-1] + 1) / FLOW_UNITS, self.sigmas[-1]
            shift = level * (1 - u) / (u * (1 - level))
        return other.schedule_times(FlowSchedule(shift))

    def storable(
        self, teacher_scheduler_config: Mapping[str, Any], schedule: NoiseSchedule, gives_levels: bool = False
    ) -> SamplerSpec:
        """This sampler, with `sigmas` if it runs on a flow whose stock scheduler cannot have its times in its config.

        That is so where a pipeline leaves the grid to the scheduler (SD3, Sana), the flow is shifted, and there are
        three steps or more: the stock grid ends near clean data. Arguments are those of `build_scheduler`.
        """
        from fastdiff.models.stock_schedulers import with_sigmas

        return with_sigmas(self, teacher_scheduler_config, schedule, gives_levels)

    def build_scheduler(
        self,
        teacher_scheduler_config: Mapping[str, Any],
        prediction_type: str,
        schedule: NoiseSchedule | None = None,
        gives_levels: bool = False,
    ) -> SchedulerMixin:
        """A stock scheduler whose saved config gives `timesteps` from `call_arguments()`.

        Args:
            teacher_scheduler_config: config of the teacher's scheduler, of any class (the betas, or the flow shift).
            prediction_type: what the student's network predicts: "epsilon", "sample", "v_prediction" or "flow".
            schedule: what the student was trained with, where that depends on the resolution; by default what the
                config says.
            gives_levels: whether the pipeline asks the scheduler for evenly spaced levels (`Family.gives_levels`).

        Raises:
            ValueError: when no setting of the stock scheduler gives these times, when the config lacks the betas, or
                when the prediction type cannot be used with this sampler. The message says what can be had instead.
        """
        from fastdiff.models.stock_schedulers import stock_scheduler

        return stock_scheduler(self, teacher_scheduler_config, prediction_type, schedule, gives_levels)


def advance(
    spec: SamplerSpec, step: int, prediction: Prediction, noise: Tensor | None, schedule: NoiseSchedule
) -> Tensor:
    """State after step number `step`, in the dtype of x_t; after the last step the clean sample.

    `noise` (the shape of x) is read by "lcm" and by "tcd" with eta > 0, and not at the last step. Differentiable.
    """
    dtype, last = prediction.x_t.dtype, step == len(spec) - 1
    noisy = not last and (spec.kind == "lcm" or spec.eta > 0)
    if noisy and noise is None:
        shape = tuple(prediction.x_t.shape)
        raise ValueError(f"step {step} of a {spec.kind!r} sampler needs noise of shape {shape}; none was given.")
    if spec.kind == "lcm":
        x_s = consistency(prediction, spec.timestep_scaling).to(dtype)
    else:
        x_s = jump(prediction, spec.end(step, schedule)).to(dtype)
    if not noisy:
        return x_s
    following = _batch_time(spec.schedule_times(schedule)[step + 1], x_s)
    if spec.kind == "lcm":
        return schedule.add_noise(x_s, noise, following)
    return schedule.transition(x_s, _batch_time(spec.end(step, schedule), x_s), following, noise)


def sample(
    spec: SamplerSpec,
    predict: Predict,
    noise: Tensor,
    step_noise: Callable[[int], Tensor],
    schedule: NoiseSchedule,
) -> Tensor:
    """The student's sample from `noise`, equal to the stock scheduler's of `spec.build_scheduler`.

    Args:
        spec: the sampler.
        predict: (x_t, t, s) -> Prediction, with t and s of shape (batch,) in the units of `schedule`: where the sample
            is and where the network's step ends, for students that are told.
        noise: standard normal z of shape (batch, ...), fed to the network as it is.
        step_noise: k -> fresh normal noise for the move from time k to time k + 1 (k = 0 .. steps - 2), asked for by
            "lcm", and by "tcd" with eta > 0.
        schedule: the noise schedule the student was trained with.

    Returns:
        The clean sample, shape and dtype of `noise`.
    """
    x = noise
    noisy = spec.kind == "lcm" or spec.eta > 0
    for step, time in enumerate(spec.schedule_times(schedule)):
        prediction = predict(x, _batch_time(time, x), _batch_time(spec.end_time(step, schedule), x))
        fresh = step_noise(step) if noisy and step < len(spec) - 1 else None
        x = advance(spec, step, prediction, fresh, schedule)
    return x


def has_boundary_weights(schedule: NoiseSchedule) -> bool:
    """Whether LCM mixes x_t into x0: stock schedulers do so on tables of betas, and not on flows."""
    return isinstance(schedule, VPSchedule)


def consistency(prediction: Prediction, timestep_scaling: float) -> Tensor:
    """LCM's consistency function c_skip x_t + c_out x0, shaped like x_t: x_t itself at time 0, x0 at any other.

    On other schedules than tables of betas it is x0, which at t = 0 of a flow is x_t by itself.

    With tau = `timestep_scaling` * t and s = SIGMA_DATA, c_skip = s^2 / (tau^2 + s^2), c_out = tau / sqrt(tau^2 + s^2)
    (Luo et al. 2023, arXiv 2310.04378); LCMScheduler applies the same.
    """
    if not has_boundary_weights(prediction.schedule):
        return prediction.x0
    tau = timestep_scaling * as_times(prediction.t, prediction.x0)
    square = tau**2 + SIGMA_DATA**2
    skip, out = (broadcast_to(c, prediction.x0) for c in (SIGMA_DATA**2 / square, tau / square**0.5))
    return skip * prediction.x_t + out * prediction.x0


def _batch_time(time: float, x: Tensor) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.full((x.shape[0],), time, dtype=dtype, device=x.device)
