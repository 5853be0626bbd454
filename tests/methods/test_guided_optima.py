"""Guidance moves every optimum to that of N(mu_0 + w (mu_c - mu_0), S), by the losses themselves; fixed and told w."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from flow_map_helpers import LAW as PLANE
from flow_map_helpers import ConsistencyNetwork, MapNetwork, told_end
from method_helpers import SD, LabelledGaussians, batch_of, context, denoiser_of, f64
from torch import Tensor, nn
from trajectory_helpers import LAW as LINE
from trajectory_helpers import MU, JumpNet, S, levels, product_map

from fastdiff.diffusion import Gaussian, Prediction, Terminal, jump
from fastdiff.methods import (
    BOOT,
    CTM,
    KD,
    LCM,
    RCM,
    SCM,
    TCM,
    FreeFlow,
    GuidanceDistillation,
    Lightning,
    MeanFlow,
    Method,
    Progressive,
    SCott,
)
from fastdiff.methods._trajectory import grid_points
from fastdiff.models.analytic import ExactNetwork
from fastdiff.models.denoiser import Denoiser

W, ROWS, POINTS = 3.0, 40, grid_points(10).tolist()
SHIFT = 1.2  # of the unconditional law from the guided one


def guided(law: Gaussian, **roles: nn.Module) -> Denoiser:
    """A teacher of two Gaussians whose guidance by W is `law`, in whose terms the helpers' closed forms are."""
    null = law.mean - SHIFT
    laws = [Gaussian(mean, law.cov) for mean in (null + SHIFT / W, null)]
    return denoiser_of(LabelledGaussians(laws), **roles)


def loss(method: Method, denoiser: Denoiser, dim: int = 1, draws: dict | None = None, turn: str = "student_loss"):
    """Sum of the terms on images of no law in particular."""
    latents = torch.randn(ROWS, dim, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = batch_of(ROWS, dim, latents)
    return sum(getattr(method, turn)(batch, context(denoiser, ROWS, draws)).values())


def pairs() -> dict[str, Tensor]:
    return {"pair": torch.arange(ROWS) % 10}


def to_clean(t: Tensor) -> Tensor:
    return torch.full_like(t, -1.0)


def lcm_clean(x: Tensor, t: Tensor, mean: float | Tensor) -> Tensor:
    """The clean prediction whose consistency function is the product of DDIM's steps to index 0."""
    there = product_map([0, *POINTS[1:]], SD, mean)(x, t, torch.zeros_like(t))
    skip, out = 0.25 / (100 * t**2 + 0.25), 10 * t / (100 * t**2 + 0.25).sqrt()
    return torch.where(t > 0, (there - skip * x) / out.clamp_min(1e-9), x)


# Losses at the student of the guided law, which vanish if the teacher was guided by w = W.


def scm(w: float) -> Tensor:
    denoiser = guided(PLANE, student=ConsistencyNetwork(SD, "epsilon"))
    return loss(SCM(SCM.Config(guidance_scale=w, tangent_warmup=0)), denoiser, 2)


def rcm(w: float) -> Tensor:
    denoiser = guided(PLANE, student=ConsistencyNetwork(SD, "epsilon"))
    return loss(RCM(RCM.Config(guidance_scale=w, tangent_warmup=0)), denoiser, 2, turn="warm_up_loss")


def meanflow(w: float) -> Tensor:
    denoiser = guided(PLANE, student=MapNetwork(SD, "epsilon"))
    return loss(MeanFlow(MeanFlow.Config(guidance_scale=w, instant_share=0.25, norm_power=0.0)), denoiser, 2)


def freeflow_predicts(w: float) -> Tensor:
    denoiser = guided(PLANE, student=MapNetwork(SD, "epsilon"))
    return loss(FreeFlow(FreeFlow.Config(guidance_scale=w, correct_every=0, norm_power=0.0)), denoiser, 2)


def freeflow_corrects(w: float) -> Tensor:
    fake = ExactNetwork(PLANE, SD, "epsilon")
    denoiser = guided(PLANE, student=MapNetwork(SD, "epsilon"), fake_score=fake)
    one, ctx = FreeFlow(FreeFlow.Config(guidance_scale=w, norm_power=0.0)), context(denoiser, ROWS)
    z = ctx.random.normal("z", (2, 1, 1)).double()
    return one.correct(z, f64(1.0), torch.arange(ROWS), batch_of(ROWS, 2), ctx)


class SignalPoints(nn.Module):
    """BOOT's y(z, t) on the DDIM steps of the guided law's denoiser from its first prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("anchor", f64(0.0))

    def forward(self, z: Tensor, time: Tensor, labels: Tensor, timestep_cond: Tensor) -> Tensor:
        t, flat = told_end(timestep_cond).double().round()[:, None], z.flatten(1)
        (a_last, s_last), (alpha, sigma) = levels(time[:, None]), levels(t)
        x = a_last * LINE.denoise(flat, time, SD) + s_last * flat
        y = (product_map(POINTS)(x, time[:, None], t) - sigma * flat) / alpha
        return Prediction.from_x0(y.reshape(z.shape), z, time, SD).eps

    def enable_gradient_checkpointing(self, _function: Callable) -> None:
        pass


def boot(w: float) -> Tensor:
    return loss(
        BOOT(BOOT.Config(guidance_scale=w, num_ddim_timesteps=10)), guided(LINE, student=SignalPoints()), 1, pairs()
    )


def kd(w: float) -> Tensor:
    student = JumpNet(product_map([-1, *range(124, 1000, 125)]), to_clean)
    return loss(KD(KD.Config(guidance_scale=w, online_steps=8)), guided(LINE, student=student))


def ctm(w: float) -> Tensor:
    denoiser = guided(LINE, student=JumpNet(product_map(POINTS)))
    config = CTM.Config(guidance_scale=w, num_ddim_timesteps=10, target_decay=0.0, loss_type="l2")
    return loss(CTM(config), denoiser, 1, pairs() | {"end": torch.zeros(ROWS)})


def scott(w: float) -> Tensor:
    config = SCott.Config(
        guidance_scale=w,
        num_ddim_timesteps=10,
        noise_strength=0.0,
        solver_steps=1,
        adversarial_weight=0.0,
        target_decay=0.0,
    )
    return loss(
        SCott(config), guided(LINE, student=JumpNet(lambda x, t, s: lcm_clean(x, t, MU), to_clean)), 1, pairs()
    )


def two_steps_of_two(cls: type[Method], w: float, **config) -> Tensor:
    student = JumpNet(product_map([-1, 249, 499, 749, 999]), lambda t: (t - 500).clamp_min(-1))
    return loss(
        cls(cls.Config(guidance_scale=w, num_inference_steps=2, teacher_steps=2, **config)),
        guided(LINE, student=student),
    )


def progressive(w: float) -> Tensor:
    return two_steps_of_two(Progressive, w)


def lightning(w: float) -> Tensor:
    return two_steps_of_two(Lightning, w, objective="mse")


def tcm(w: float) -> Tensor:
    """The target, by both stages, is the exact map from where the guided teacher steps to."""
    exact = ConsistencyNetwork(SD, "epsilon")
    denoiser, one = (
        guided(PLANE, student=exact, first_stage=exact),
        TCM(TCM.Config(guidance_scale=w, step_base=2.0, step_stage=1)),
    )
    t, batch = torch.linspace(354, 999, ROWS, dtype=torch.float64), batch_of(ROWS, 2)
    x = torch.randn(ROWS, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    r = one.next_time(t, SD)
    there = jump(Prediction.from_x0(PLANE.denoise(x, t, SD), x, t, SD), r)
    expected = PLANE.flow_map(there, r, Terminal.CLEAN, SD)
    return (one.target(x, t, batch, context(denoiser, ROWS)) - expected).square().mean()


CASES = [scm, rcm, meanflow, freeflow_predicts, freeflow_corrects, boot, kd, ctm, scott, progressive, lightning, tcm]


FLOAT32_TIMES = (scm, rcm, meanflow, freeflow_predicts)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_loss_vanishes_at_the_student_of_the_guided_law(case):
    assert case(W) < (1e-12 if case in FLOAT32_TIMES else 1e-18)
    assert case(1.0) > 1e-5


# Guidance that the student is told


class Listener(nn.Module):
    """Of each sample's law N(mu_0 + w (mu_c - mu_0), S), for the w that it is told, or for one w whatever it is told."""

    def __init__(self, clean: Callable[[Tensor, Tensor, Tensor], Tensor], always: float | None = None) -> None:
        super().__init__()
        self.clean, self.always = clean, always
        self.register_buffer("anchor", f64(0.0))

    def forward(self, x_t: Tensor, time: Tensor, labels: Tensor, timestep_cond: Tensor) -> Tensor:
        w = told_end(timestep_cond).double()[:, None] / 1000 + 1
        w = w if self.always is None else torch.full_like(w, self.always)
        x0 = self.clean(x_t.flatten(1), time.double()[:, None], MU - SHIFT + w * SHIFT / W)
        return Prediction.from_x0(x0.reshape(x_t.shape), x_t, time, SD).eps

    def enable_gradient_checkpointing(self, _function: Callable) -> None:
        pass


def denoised(x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
    alpha, sigma = levels(t)
    return mean + alpha * S / (alpha**2 * S + sigma**2) * (x - alpha * mean)


TOLD = {"guidance_range": (3.0, 15.0)}


@pytest.mark.parametrize(
    ("method", "clean", "draws"),
    [
        (GuidanceDistillation(GuidanceDistillation.Config(**TOLD)), denoised, None),
        (
            GuidanceDistillation(GuidanceDistillation.Config(**TOLD, states="teacher", num_inference_steps=4)),
            denoised,
            {"t": 2},
        ),
        (LCM(LCM.Config(**TOLD, num_ddim_timesteps=10, loss_type="l2")), lcm_clean, pairs()),
    ],
    ids=["guidance distillation", "on the teacher's states", "lcm"],
)
def test_the_loss_vanishes_at_the_student_of_each_samples_own_guidance(method, clean, draws):
    found = [loss(method, guided(LINE, student=Listener(clean, always)), 1, draws) for always in (None, 9.0)]
    assert found[0] < 1e-8 and found[1] > 1e-3
