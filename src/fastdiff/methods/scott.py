"""SCott: stochastic consistency distillation (Liu et al. 2024, arXiv 2403.01505)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.steps import ddim_eta, er_sde, er_sde_5
from fastdiff.diffusion.tensors import DeviceTable
from fastdiff.methods._adversarial import Noisy
from fastdiff.methods._adversarial_trajectory import AdversarialTrajectory, AdversarialTrajectoryConfig
from fastdiff.methods._trajectory import Pair, Place, grid_points, sub_steps
from fastdiff.methods._unread import refuse_unread
from fastdiff.methods.base import Batch, Context, MethodInfo, any_time, check_positive
from fastdiff.methods.lcm import LCM, LCMConfig
from fastdiff.models.roles import TEACHER

_BLURRY_FROM = 0.3


@dataclass(frozen=True)
class SCottConfig(AdversarialTrajectoryConfig, LCMConfig):
    """The adversarial weight, solver steps, decay of the target and learning rate of the discriminator are the paper's
    as others cite it, which trains with batch 40 at a learning rate of 8e-6 for 40,000 steps; grid, solver and noise
    strength are ours.

    Args:
        num_ddim_timesteps: points of the grid; 40 makes 25 indices a pair, the paper's is 24.
        loss_type: the squared error, whose optimum is a mean; `huber` is the other reading of the paper.
        solver_steps: SDE steps of the teacher in a pair.
        noise_strength: eta of the SDE, 0 is the ODE and 1 ancestral sampling. Not read by `er_sde_5`. The default is
            ours; the paper compares 0, 0.1, 0.2, 0.3 and 0.6.
        sde_solver: `ddim`, the default of ours, is DDIM with eta; `er_sde` integrates the noise of a constant eta
            exactly; `er_sde_5` is the paper's best, with noise that falls with the level.
        adversarial_weight: weight of the generator's term; it keeps the variance that stochastic steps lose.
        discriminator_learning_rate: learning rate of the heads.
    """

    num_ddim_timesteps: int = 40
    loss_type: Literal["huber", "l2"] = "l2"
    solver_steps: int = 3
    noise_strength: float = 0.2
    sde_solver: Literal["ddim", "er_sde", "er_sde_5"] = "ddim"
    adversarial_weight: float = 0.4
    discriminator_learning_rate: float | None = 2e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(solver_steps=self.solver_steps)
        if not 0 <= self.noise_strength <= 1:
            raise ValueError(f"noise_strength must be in [0, 1], got {self.noise_strength}")
        own_noise = self.sde_solver == "er_sde_5"
        if own_noise:
            refuse_unread(self, ("noise_strength",), "with sde_solver er_sde_5, whose noise falls with the level")
        if not self.adversarial_weight and (own_noise or self.noise_strength > _BLURRY_FROM):
            named = "sde_solver er_sde_5" if own_noise else f"noise_strength {self.noise_strength}"
            warnings.warn(
                f"{named} without an adversarial term: the optimum is then close to the mean of the data, and samples "
                "are blurred. Give adversarial_weight, or another solver with a noise_strength of at most 0.3.",
                stacklevel=2,
            )


class SCott(AdversarialTrajectory, LCM):
    r"""Consistency with a stochastic teacher: the solver's step is one of the reverse SDE of strength eta.

        L = mse(f(x_{t_n}, t_n), sg f^-(x_{t_{n-1}}, t_{n-1})) + adversarial_weight * L_adv,

    f as in LCM and x_{t_{n-1}} by `solver_steps` SDE steps of the guided teacher. The squared error makes f the mean
    over the noise, whose variance falls with eta; L_adv (hinge, f and real data noised at any time) restores it. The
    paper's discriminator also tunes the features by a LoRA; here they are the frozen teacher's.
    """

    info = MethodInfo(
        name="scott",
        title="Stochastic consistency distillation (SCott)",
        family="trajectory",
        paper="SCott: Accelerating Diffusion Models with Stochastic Consistency Distillation",
        arxiv="2403.01505",
        needs="images",
        student_kinds=("lora", "full"),
        steps="1-4",
    )
    Config = SCottConfig
    config: SCottConfig

    def __init__(self, config: SCottConfig) -> None:
        super().__init__(config)
        points = grid_points(config.num_ddim_timesteps).tolist()
        self._steps = DeviceTable(sub_steps(points[1:], points[:-1], config.solver_steps))

    def solve(self, x_t: Tensor, place: Place, batch: Batch, ctx: Context, w: float | Tensor) -> Tensor:
        schedule = ctx.denoiser.schedule
        lowest = self.points(schedule, x_t.device)[0]
        indices = self._steps.on(x_t.device)[place.number].maximum(lowest).unbind(1)
        for number, (start, end) in enumerate(pairwise(indices)):
            prediction = ctx.denoiser(x_t, schedule.time_of_index(start), batch.cond, TEACHER, batch.null, w)
            noise = ctx.random.normal(f"solver/{number}", batch.latent_shape)
            x_t = self._step(prediction, schedule.time_of_index(end), noise)
        return x_t

    def _step(self, prediction: Prediction, s: Tensor, noise: Tensor) -> Tensor:
        match self.config.sde_solver:
            case "ddim":
                return ddim_eta(prediction, s, self.config.noise_strength, noise)
            case "er_sde":
                return er_sde(prediction, s, self.config.noise_strength, noise)
            case "er_sde_5":
                return er_sde_5(prediction, s, noise)

    def real(self, pair: Pair, batch: Batch) -> Tensor:
        return batch.images()

    def noise_time(self, pair: Pair, ctx: Context, site: str) -> Tensor:
        return any_time(ctx, f"{site}/t")

    def compared(self, x: Tensor, pair: Pair, t: Tensor, ctx: Context, site: str) -> Noisy:
        return self.adversary.noised(x, ctx, site, t)
