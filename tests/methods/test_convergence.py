"""Score-gap methods on a Gaussian teacher: with a fake score learned beside the student they find the teacher's law."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from method_helpers import (
    SD,
    AffineGenerator,
    LabelledGaussians,
    OracleFake,
    batch_of,
    context,
    denoiser_of,
    f64,
    run,
)
from torch import nn

from fastdiff.diffusion import Gaussian
from fastdiff.methods import (
    DMD,
    DMD2,
    MSD,
    PGSB,
    SIM,
    DecoupledDMD,
    DecoupledDMDConfig,
    DiffInstruct,
    DiffInstructConfig,
    DMD2Config,
    DMDConfig,
    FDistill,
    FDistillConfig,
    FlashDMD,
    FlashDMDConfig,
    MSDConfig,
    PGSBConfig,
    PhasedDMD,
    PhasedDMDConfig,
    ScoreDistillation,
    ScoreDistillationConfig,
    SIMConfig,
    SwiftBrush,
    SwiftBrushConfig,
    UniInstruct,
    UniInstructConfig,
)
from fastdiff.models.analytic import ExactNetwork
from fastdiff.models.analytic_networks import AffinePerBin, time_features

pytestmark = pytest.mark.slow

MU, COV = f64([0.7, -0.4]), f64([[0.64, 0.2], [0.2, 0.5]])
LAW = Gaussian(MU, COV)
ROWS, STEPS, HEAD_RATE = 64, 500, 3e-3
NEAR = 0.06  # a fake score that lags behind the student leaves an error of a few percent


class TappedBins(AffinePerBin):
    """A fake score whose middle activation holds what the log-ratio of two Gaussians is made of."""

    feature_channels = 5 + 32

    def __init__(self, size, times):
        super().__init__(size, times)
        self.mid_block = nn.Identity()

    def forward(self, x_t, time, labels):
        x = x_t.flatten(1)
        parts = [x, x.square(), x.prod(dim=1, keepdim=True), time_features(time).to(x.dtype)]
        self.mid_block(torch.cat(parts, dim=1)[:, :, None, None])
        return super().forward(x_t, time, labels)


def untrained():
    return AffineGenerator(f64([[1.1, 0.3], [-0.2, 0.8]]), f64([-0.2, 0.5]))


def images():
    """A batch with samples of the teacher and the noise it could have made them of."""
    z = torch.randn(ROWS, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    latents = (z.double().flatten(1) @ torch.linalg.cholesky(COV).T + MU)[:, :, None, None]
    return replace(batch_of(ROWS, 2, latents), extra={"noise": z})


def prepare(fake, loss, steps=150):
    """Brings a fake score near the untrained student's own, as that of a real run is near the teacher's."""
    optimizer = torch.optim.Adam(fake.parameters(), lr=2e-2)
    for step in range(steps):
        loss(step)["denoising"].backward(inputs=list(fake.parameters()))
        optimizer.step()
        optimizer.zero_grad()


def distilled(rule, teacher=None, first=0, rate=1e-2, fake_rate=4e-2, steps=STEPS):
    """The student, trained with a fake score of ten time bins from index `first` on, and the method's own heads.

    The fake score learns four times as fast as the student it follows.
    """
    torch.manual_seed(0)
    width = (1000 - first) / 10
    student, fake = untrained(), TappedBins(2, [first + width * (k + 0.5) for k in range(10)])
    denoiser = denoiser_of(teacher or ExactNetwork(LAW, SD, "epsilon"), student=student, fake_score=fake)
    denoiser.family.feature_tap = "mid_block"
    batch, modules = images(), rule.modules(denoiser)
    prepare(fake, lambda step: rule.critic_loss(batch, context(denoiser, ROWS, step=step, modules=modules, seed=1)))
    rates = {"student": (student, rate), "fake_score": (fake, fake_rate)}
    rates |= {name: (module, HEAD_RATE) for name, module in modules.items()}
    optimizers = {name: torch.optim.Adam(module.parameters(), lr=rate) for name, (module, rate) in rates.items()}
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(one, steps) for one in optimizers.values()]
    run(rule, denoiser, optimizers, batch, steps, lambda _: [schedule.step() for schedule in schedules], modules)
    return student


def distilled_exactly(rule, teacher):
    """The student, trained with the fake score that its law has at every step."""
    student = untrained()
    denoiser = denoiser_of(teacher, student=student, fake_score=OracleFake(student))
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    run(rule, denoiser, {"student": optimizer}, batch_of(ROWS, 2), STEPS, lambda _: schedule.step())
    return student


UNGUIDED = {"guidance_scale": 1.0}
TOGETHER = UNGUIDED | {"student_update_every": 1}
FLASH = FlashDMD(FlashDMDConfig(timesteps=(999,), high_noise_steps=1, gan_weight=0.0, **UNGUIDED))
RULES = [
    DiffInstruct(DiffInstructConfig(**UNGUIDED)),
    SwiftBrush(SwiftBrushConfig(**UNGUIDED)),
    FDistill(FDistillConfig(divergence="js", update_rule="every", **TOGETHER)),
    DecoupledDMD(DecoupledDMDConfig(timesteps=(999,), **TOGETHER)),
    UniInstruct(UniInstructConfig(divergence="js", mode="exact", gan_weight=0.0)),
    ScoreDistillation(ScoreDistillationConfig(score_loss="vsd", **UNGUIDED)),
    MSD(MSDConfig(**TOGETHER)),
    FLASH,
    DMD(DMDConfig(regression_loss="latent_l2", **UNGUIDED)),
    SIM(SIMConfig(huber_c=0.1)),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.info.name)
def test_a_learned_fake_score_leads_to_the_teachers_law(rule):
    student = distilled(rule)
    assert (student.b - MU).abs().max() < NEAR
    assert (student.A @ student.A.T - COV).abs().max() < NEAR


@pytest.mark.parametrize("learned", [True, False], ids=["learned", "exact"])
def test_proper_guidance_leads_to_the_law_at_the_mean_guidance(learned):
    """With one covariance the gradient is linear in w: what w ~ U(0.5, 4) leads to is what w = 2.25 would."""
    null = f64([0.5, -0.3])
    rule, teacher = PGSB(PGSBConfig()), LabelledGaussians([LAW, Gaussian(null, COV)])
    student = distilled(rule, teacher) if learned else distilled_exactly(rule, teacher)
    near = NEAR if learned else 0.02  # w of each sample keeps some noise where scores agree on average
    assert (student.b - null - 2.25 * (MU - null)).abs().max() < near
    assert (student.A @ student.A.T - COV).abs().max() < near


def test_flash_dmd_finds_the_teachers_law_with_an_exact_fake_score():
    student = distilled_exactly(FLASH, ExactNetwork(LAW, SD, "epsilon"))
    assert (student.b - MU).abs().max() < 1e-3
    assert (student.A @ student.A.T - COV).abs().max() < 1e-3


def test_a_phase_with_a_learned_fake_score_finds_the_teachers_noisy_law():
    """One step from index 999 to 249, at which x_s = moves (A z + b) + sigma / sigma_in z."""
    rule = PhasedDMD(PhasedDMDConfig(timesteps=(999, 249), phase_steps=(1, 1), **TOGETHER))
    student = distilled(rule, first=250, steps=800)
    (alpha, alpha_in), (sigma, sigma_in) = SD.alpha(f64([249, 999])), SD.sigma(f64([249, 999]))
    moves, eye = alpha - sigma * alpha_in / sigma_in, torch.eye(2).double()
    factor = moves * student.A + sigma / sigma_in * eye
    assert (moves * student.b - alpha * MU).abs().max() < NEAR
    assert (factor @ factor.T - alpha**2 * COV - sigma**2 * eye).abs().max() < NEAR


def test_a_fast_student_needs_several_updates_of_its_fake_score():
    """A student ten times as fast as its fake score outruns it; with five updates for each of its own it does not.

    The student steps equally often in both runs (two time-scale update rule, DMD2, arXiv 2405.14867, sec. 4.2).
    """
    errors = {}
    for every in (1, 5):
        rule = DMD2(DMD2Config(guidance_scale=1.0, student_update_every=every))
        student = distilled(rule, rate=2e-2, fake_rate=2e-3, steps=every * STEPS)
        errors[every] = (student.A @ student.A.T - COV).abs().max().item()
    assert errors[5] < 0.5 * errors[1]
