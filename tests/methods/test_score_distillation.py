"""Score distillation: published gradients of SDS, CSD, VSD and BSD, how they are related, and that SDS collapses."""

from __future__ import annotations

import pytest
import torch
from gaussian_cases import COV, MU, A, B, denoiser_with_fake, divergence_gradient, draws, exactness, golden_setup
from method_helpers import (
    SD,
    AffineGenerator,
    LabelledGaussians,
    TableGenerator,
    batch_of,
    context,
    denoiser_of,
    f64,
    run,
    sigma_points,
)
from torch import nn

from fastdiff.data.source import PromptData
from fastdiff.diffusion import FlowSchedule, Gaussian
from fastdiff.engine import Settings, Trainer
from fastdiff.methods.score_distillation import (
    BSD,
    CSD,
    SDS,
    VSD,
    ScoreDistillation,
    ScoreDistillationConfig,
)
from fastdiff.methods.swiftbrush import SwiftBrush, SwiftBrushConfig
from fastdiff.models.analytic import AnalyticTeacher, ExactNetwork
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.roles import Roles

ROWS = 5
T = torch.tensor([20, 300, 500, 700, 980]).double()


def method(variant: str, **config) -> ScoreDistillation:
    return ScoreDistillation(ScoreDistillationConfig(score_loss=variant, **config))


def laws(*means: float, variance: float = 0.5) -> LabelledGaussians:
    return LabelledGaussians([Gaussian(f64([m, -m]), variance * torch.eye(2).double()) for m in means])


class TrueNoise(nn.Module):
    """A fake score that knows the noise of every sample: the score of a point mass."""

    def __init__(self, eps):
        super().__init__()
        self.eps = eps
        self.register_buffer("anchor", torch.zeros((), dtype=torch.float64))

    def forward(self, x_t, time, labels):
        return self.eps


@pytest.fixture
def scene():
    """Latents, noise, conditioning, and a teacher that differs with and without prompt."""
    generator = torch.Generator().manual_seed(2)
    x, eps = (torch.randn(ROWS, 2, 1, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    batch = batch_of(ROWS, 2)
    return x, eps, batch.cond, batch.null


def teacher_only(fake=None):
    roles = {} if fake is None else {"fake_score": fake}
    return denoiser_of(laws(1.0, -0.5), **roles)


def predictions(denoiser, x, eps, cond, null):
    x_t = SD.add_noise(x, eps, T)
    sigma, alpha = (f(T)[:, None, None, None] for f in (SD.sigma, SD.alpha))
    return denoiser(x_t, T, cond, "teacher").eps, denoiser(x_t, T, null.expand(ROWS), "teacher").eps, sigma, alpha


# Gradients


@pytest.mark.parametrize("w", [1.0, 100.0])
def test_sds_is_the_teachers_residual(scene, w):
    x, eps, cond, null = scene
    denoiser = teacher_only()
    c, n, sigma, _ = predictions(denoiser, x, eps, cond, null)
    x = x.clone().requires_grad_()
    SDS(denoiser, w)(x, T, eps, cond, null).backward()
    expected = sigma**2 * (n + w * (c - n) - eps) / ROWS
    torch.testing.assert_close(x.grad, expected, rtol=1e-10, atol=1e-12)


def test_csd_is_the_guidance_alone(scene):
    x, eps, cond, null = scene
    denoiser = teacher_only()
    c, n, sigma, _ = predictions(denoiser, x, eps, cond, null)
    torch.testing.assert_close(CSD(denoiser).gradient(x, T, eps, cond, null), sigma**2 * (c - n))


@pytest.mark.parametrize("ratio", [0.05, 1.0, 18.0])
def test_bsd_is_the_combination_of_least_norm(scene, ratio):
    x, eps, cond, null = scene
    denoiser = teacher_only()
    c, n, _, alpha = predictions(denoiser, x, eps, cond, null)
    found = BSD(denoiser, ratio).gradient(x, T, eps, cond, null) / alpha
    u, v = ratio * (c - n), n
    shares = torch.linspace(0, 1, 2001).double()
    for row in range(ROWS):
        line = torch.stack([a * u[row] + (1 - a) * v[row] for a in shares])
        best = line[line.flatten(1).norm(dim=1).argmin()]
        torch.testing.assert_close(found[row], best, rtol=0, atol=2e-3 * (u - v).abs().max().item())
        for goal in (u[row], v[row]):  # a small step along it harms neither goal
            assert (found[row] * goal).sum() >= -1e-12


def test_bsd_between_opposed_goals_is_nothing_and_beside_a_longer_one_is_the_shorter():
    class TwoOutputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("anchor", torch.zeros((), dtype=torch.float64))

        def forward(self, x_t, time, labels):
            null = torch.tensor([1.0, 0.0], dtype=torch.float64).view(1, 2, 1, 1)
            cond = null + torch.tensor([[[[-0.5]], [[0.0]]], [[[2.0]], [[0.0]]]], dtype=torch.float64)
            return torch.where((labels < 0)[:, None, None, None], null, cond.repeat(len(x_t) // 2, 1, 1, 1))

    batch = batch_of(2, 2)
    x, t = torch.zeros(2, 2, 1, 1).double(), torch.tensor([400.0, 400.0]).double()
    g = BSD(denoiser_of(TwoOutputs()), 1.0).gradient(x, t, x, batch.cond, batch.null) / SD.alpha(t)[0]
    torch.testing.assert_close(g.flatten(1), f64([[0.0, 0.0], [1.0, 0.0]]), rtol=0, atol=1e-12)


# How they are related


@pytest.mark.parametrize("w", [1.0, 7.5])
def test_vsd_with_the_true_noise_for_the_fake_score_is_sds_bit_for_bit(scene, w):
    x, eps, cond, null = scene
    denoiser = teacher_only(TrueNoise(eps))
    vsd, sds = (loss(denoiser, w).gradient(x, T, eps, cond, null) for loss in (VSD, SDS))
    assert torch.equal(vsd, sds) and vsd.abs().max() > 0


@pytest.mark.parametrize("w", [1.0, 7.5])
def test_vsd_with_an_untrained_fake_score_is_guidance_alone_and_not_sds(scene, w):
    """The often-read claim that VSD with an untrained adapter is SDS confuses the fake score with the noise."""
    x, eps, cond, null = scene
    denoiser = teacher_only(laws(1.0, -0.5))
    vsd = VSD(denoiser, w).gradient(x, T, eps, cond, null)
    torch.testing.assert_close(vsd, (w - 1) * CSD(denoiser).gradient(x, T, eps, cond, null), rtol=1e-10, atol=1e-13)
    assert (vsd - SDS(denoiser, w).gradient(x, T, eps, cond, null)).abs().max() > 0.1
    if w == 1.0:
        assert vsd.abs().max() == 0


def test_the_fake_score_may_have_a_condition_of_its_own(scene):
    """As of a camera: the teacher is asked with the prompt, the fake score with what `fit` was given."""
    x, eps, cond, null = scene
    denoiser = teacher_only(laws(1.0, -0.5))  # the fake score is the teacher, without prompt
    vsd = VSD(denoiser, 1.0, fake_cond=null.expand(ROWS)).gradient(x, T, eps, cond, null)
    torch.testing.assert_close(vsd, CSD(denoiser).gradient(x, T, eps, cond, null), rtol=1e-10, atol=1e-13)
    assert vsd.abs().max() > 0.1


def test_sds_is_csd_plus_the_unguided_residual(scene):
    x, eps, cond, null = scene
    denoiser, w = teacher_only(), 30.0
    whole, plain, guidance = (
        loss.gradient(x, T, eps, cond, null) for loss in (SDS(denoiser, w), SDS(denoiser, 1.0), CSD(denoiser))
    )
    torch.testing.assert_close(whole, plain + (w - 1) * guidance, rtol=1e-10, atol=1e-12)


def test_unguided_vsd_is_swiftbrush_without_guidance():
    rows, given = 5, {"student/t": T.long()}
    table = torch.randn(rows, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    student = TableGenerator(table)
    denoiser = denoiser_of(laws(1.0, -0.5), student=student, fake_score=laws(0.3, 2.0, variance=0.8))
    gradients = []
    for one in (method("vsd", guidance_scale=1.0), SwiftBrush(SwiftBrushConfig(guidance_scale=1.0))):
        student.table.grad = None
        one.student_loss(batch_of(rows, 2), context(denoiser, rows, given))["distribution_matching"].backward()
        gradients.append(student.table.grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


# Closed forms


@pytest.mark.parametrize(("schedule", "kind"), [(SD, "epsilon"), (FlowSchedule(), "flow")], ids=["vp", "flow"])
@pytest.mark.parametrize("variant", ["sds", "vsd"])
@pytest.mark.parametrize("index", [50, 900])
def test_expected_gradients_on_gaussians(schedule, kind, variant, index):
    """Weight sigma^2 on noise predictions is sigma^3 / alpha on the divergence; SDS lacks its repulsion."""
    points = sigma_points(4)
    student, denoiser = denoiser_with_fake(schedule, kind)
    ctx = context(denoiser, len(points), draws(points, 2, index))
    one = method(variant, guidance_scale=1.0)
    (2 * one.student_loss(batch_of(len(points), 2), ctx)["distribution_matching"]).backward()
    t = schedule.time_of_index(torch.tensor(float(index))).double()
    weight = schedule.sigma(t) ** 3 / schedule.alpha(t)
    by_b, by_A = divergence_gradient(schedule, t, repulsion=variant == "vsd")
    torch.testing.assert_close(student.b.grad, weight * by_b, **exactness(kind))
    torch.testing.assert_close(student.A.grad, weight * by_A, **exactness(kind))


@pytest.mark.parametrize(
    ("case", "variant", "gold"),
    [
        ("I", "sds", (1.0143442623, -0.8299180328)),
        ("I", "vsd", (0.3494685068, -0.8299180328)),
        ("II", "vsd", (0.1628039773, -0.3722426471)),
    ],
)
def test_golden_numbers(case, variant, gold):
    student, denoiser, points, (alpha, sigma), _ = golden_setup(case)
    ctx = context(denoiser, len(points), draws(points, 1, 400))
    one = method(variant, guidance_scale=1.0)
    one.student_loss(batch_of(len(points), 1), ctx)["distribution_matching"].backward()
    weight = alpha / sigma**3
    assert weight * student.A.grad.item() == pytest.approx(gold[0], abs=2e-10)
    assert weight * student.b.grad.item() == pytest.approx(gold[1], abs=2e-10)


@pytest.mark.parametrize(("variant", "spread"), [("sds", 0.0), ("vsd", 1.0)])
def test_sds_collapses_to_the_mean_where_vsd_finds_the_law(variant, spread):
    torch.manual_seed(0)
    student, denoiser = denoiser_with_fake(SD, a=0.5 * A)
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    rule = method(variant, guidance_scale=1.0)
    optimizers = {"student": optimizer}
    run(rule, denoiser, optimizers, batch_of(32, 2), 200, lambda step: decay.step())
    # SDS keeps the noise of its residual, so its mean is known only as well as one noise level lets it be.
    assert (student.b - MU).abs().max() < (2e-3 if variant == "vsd" else 0.05)
    assert (student.A @ student.A.T - spread * COV).abs().max() < (2e-3 if variant == "vsd" else 0.01)


# Optimising images


def test_a_plain_tensor_is_pulled_to_the_mean_of_its_prompt():
    """Text-to-image by optimisation: no student, no fake score."""
    law = LabelledGaussians([Gaussian(MU, 0.2 * COV), Gaussian(-MU, COV)])
    denoiser = Denoiser(
        Roles(law.double(), {}), AnalyticTeacher.gaussian(MU, COV).family, SD, "epsilon", torch.float64
    )
    batch = batch_of(256, 2)
    x = torch.zeros(1, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    loss, optimizer = SDS(denoiser, 1.0), torch.optim.Adam([x], lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for step in range(150):
        t = torch.randint(20, 981, (256,), generator=generator).double()
        eps = torch.randn(256, 2, 1, 1, generator=generator, dtype=torch.float64)
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 150)
        optimizer.zero_grad()
        loss(x.expand(256, -1, -1, -1), t, eps, batch.cond, batch.null).backward()
        optimizer.step()
    assert (x.flatten() - MU).abs().max() < 0.02


def test_fitting_vsds_fake_score_leaves_the_scene_alone(scene):
    x, eps, cond, _ = scene
    x = x.clone().requires_grad_()
    fake = AffineGenerator(A, B)
    denoiser = denoiser_of(laws(1.0, -0.5), fake_score=fake)
    loss = VSD(denoiser).fit(x, T, eps, cond)
    loss.backward()
    assert x.grad is None and fake.A.grad.abs().max() > 0
    x_t = SD.add_noise(x.detach(), eps, T)
    torch.testing.assert_close(loss, (denoiser(x_t, T, cond, "fake_score").eps - eps).square().mean())


# As a method


def test_only_vsd_trains_a_fake_score():
    assert [update.name for update in method("vsd").updates(0)] == ["student", "fake_score"]
    for variant in ("sds", "csd", "bsd"):
        assert [update.name for update in method(variant).updates(0)] == ["student"]
        with pytest.raises(ValueError, match="no fake score"):
            ScoreDistillationConfig(score_loss=variant, student_update_every=5)


@pytest.mark.parametrize("variant", ["sds", "csd", "vsd", "bsd"])
def test_trains_through_the_engine_and_the_teacher_gets_nothing(variant, tmp_path):
    teacher = AnalyticTeacher.gaussian(MU, COV)
    full = {"student": "full", "fake_score": "full", "report_to": "none"}
    settings = Settings(output_dir=str(tmp_path), max_train_steps=3, train_batch_size=4, **full)
    trainer = Trainer(method(variant), teacher, PromptData(["a sample"] * 8), settings)
    assert trainer.train() == "done"
    assert set(trainer.optimizers) == ({"student", "fake_score"} if variant == "vsd" else {"student"})
    assert ("fake_score" in trainer.networks.roles) == (variant == "vsd")
    assert isinstance(teacher.network, ExactNetwork) and not list(teacher.network.parameters())
