"""Whole solutions of the probability-flow ODE: from noise to a sample along a grid of times, and back.

``times`` are where the sample is, one after the other: schedule times (scalars, or one a sample) that fall to the
last, which may be :data:`Terminal.CLEAN`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor

from .grids import trailing_grid
from .prediction import Prediction
from .schedules import NoiseSchedule, Terminal
from .steps import heun_flow, jump
from .tensors import compute_dtype

__all__ = ["Solver", "invert", "solve", "teacher_times"]

Predict = Callable[[Tensor, Tensor], Prediction]
Times = Sequence[Tensor | Terminal]
Solver = Literal["ddim", "heun", "dpm++"]


def teacher_times(schedule: NoiseSchedule, steps: int) -> list[Tensor | Terminal]:
    """``steps + 1`` times of diffusers' "trailing" grid, from ``t_max`` to the clean end; scalars.

    Raises:
        ValueError: unless the schedule has that many numbered times.
    """
    starts = [start for start, _ in trailing_grid(steps, schedule.indices)]
    return [*(schedule.time_of_index(start) for start in starts), Terminal.CLEAN]


def solve(predict: Predict, x: Tensor, times: Times, solver: Solver = "ddim") -> Tensor:
    """The sample at ``times[-1]`` on the trajectory through ``x`` at ``times[0]``; float32 or better.

    Args:
        predict: (x, t) -> Prediction, with t of shape (B,); asked once a step, twice by "heun" except at the end.
        x: (B, ...) at ``times[0]``.
        times: the grid.
        solver: "ddim" is the first-order jump (arXiv 2010.02502), "heun" the second-order step in flow coordinates,
            "dpm++" DPM-Solver++(2M) (arXiv 2211.01095), whose first and last steps are jumps.
    """
    steps = list(pairwise(times))
    previous: Prediction | None = None
    for number, (t, s) in enumerate(steps):
        t, s, last = _per_sample(t, x), _per_sample(s, x), number == len(steps) - 1
        if solver == "heun" and not last:
            x = heun_flow(predict, x, t, s)
            continue
        prediction = predict(x, t)
        if solver == "dpm++" and previous is not None and not last:
            clean = prediction.x0 + _step_ratio(previous, prediction, s) / 2 * (prediction.x0 - previous.x0)
            x = jump(Prediction.from_x0(clean, x, t, prediction.schedule), s)
        else:
            x = jump(prediction, s)
        previous = prediction
    return x


def invert(predict: Predict, x: Tensor, times: Times, schedule: NoiseSchedule, rounds: int = 4) -> Tensor:
    """The noise at ``times[0]`` from which first-order :func:`solve` comes to ``x`` at ``times[-1]``.

    Every step is undone by ``rounds`` fixed-point iterations in flow coordinates ``y = x/(alpha + sigma)``, where the
    jump is ``y_s = y_t + (tau_s - tau_t)(eps - x0)`` with ``tau = sigma/(alpha + sigma)``, finite at both ends.
    """
    for t, s in reversed(list(pairwise(times))):
        t, s = _per_sample(t, x), _per_sample(s, x)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.levels(t, x), schedule.levels(s, x)
        total, y = alpha_t + sigma_t, x / (alpha_s + sigma_s)
        span = sigma_t / total - sigma_s / (alpha_s + sigma_s)
        x = total * y
        for _ in range(rounds):
            x = total * (y + span * predict(x, t).flow)
    return x


def _step_ratio(previous: Prediction, now: Prediction, s: Tensor | Terminal) -> Tensor:
    """This step's length in ln(alpha/sigma) over the last one's, shaped to multiply x0; 0 after a start in pure noise."""
    before, here, after = (now.schedule.levels(t, now.x0) for t in (previous.t, now.t, s))
    kappa = [sigma / alpha for alpha, sigma in (before, here, after)]
    return (kappa[1] / kappa[2]).log() / (kappa[0] / kappa[1]).log()


def _per_sample(t: Tensor | Terminal, x: Tensor) -> Tensor | Terminal:
    return t if isinstance(t, Terminal) else t.to(x.device, compute_dtype(x)).expand(len(x))
