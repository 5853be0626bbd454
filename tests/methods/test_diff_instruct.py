"""Diff-Instruct (arXiv 2305.18455): the plain gap of denoisers, in closed form, and the EDM setting."""

from __future__ import annotations

import pytest
import torch
from gaussian_cases import COV, MU, A, B, denoiser_with_fake, divergence_gradient, draws, exactness, golden_setup
from method_helpers import (
    SD,
    AffineGenerator,
    TableGenerator,
    batch_of,
    context,
    denoiser_of,
    f64,
    run,
    sigma_points,
    signs,
    spatial,
)

from fastdiff.diffusion import EDMSchedule, FlowSchedule, Gaussian
from fastdiff.methods.diff_instruct import DiffInstruct, DiffInstructConfig
from fastdiff.methods.dmd2 import DMD2, DMD2Config
from fastdiff.models.analytic import ExactNetwork


def method(**config) -> DiffInstruct:
    return DiffInstruct(DiffInstructConfig(**config))


@pytest.mark.parametrize(("schedule", "kind"), [(SD, "epsilon"), (FlowSchedule(), "flow")], ids=["vp", "flow"])
@pytest.mark.parametrize("index", [50, 400, 900])
def test_expected_gradient_is_that_of_the_divergence_times_the_squared_noise_ratio(schedule, kind, index):
    points = sigma_points(4)
    student, denoiser = denoiser_with_fake(schedule, kind)
    ctx = context(denoiser, len(points), draws(points, 2, index))
    (2 * method().student_loss(batch_of(len(points), 2), ctx)["distribution_matching"]).backward()
    t = schedule.time_of_index(torch.tensor(float(index))).double()
    by_b, by_A = divergence_gradient(schedule, t)
    weight = schedule.kappa(t) ** 2
    torch.testing.assert_close(student.b.grad, weight * by_b, **exactness(kind))
    torch.testing.assert_close(student.A.grad, weight * by_A, **exactness(kind))


@pytest.mark.parametrize("case", ["I", "II"])
def test_reverse_kl_golden_numbers(case):
    student, denoiser, points, (alpha, sigma), (gold_a, gold_b) = golden_setup(case)
    ctx = context(denoiser, len(points), draws(points, 1, 400))
    method().student_loss(batch_of(len(points), 1), ctx)["distribution_matching"].backward()
    weight = (alpha / sigma) ** 2
    assert weight * student.A.grad.item() == pytest.approx(gold_a, abs=2e-10)
    assert weight * student.b.grad.item() == pytest.approx(gold_b, abs=2e-10)


def test_it_is_dmd2_without_normaliser():
    """Per sample: DMD2's gradient times its normaliser, at any guidance."""
    rows = 5
    table = torch.randn(rows, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = []
    for one in (method(), DMD2(DMD2Config(guidance_scale=1.0))):
        student, fake = TableGenerator(table), ExactNetwork(Gaussian(f64([0.1, 0.2]), COV), SD, "epsilon")
        base = ExactNetwork(Gaussian(MU, COV), SD, "epsilon")
        denoiser = denoiser_of(base, student=student, fake_score=fake)
        ctx, batch = context(denoiser, rows), batch_of(rows, 2)
        one.student_loss(batch, ctx)["distribution_matching"].backward()
        gradients.append(student.table.grad)
    t, x_t = method().noised(spatial(table), ctx, "student")
    real = denoiser(x_t, t, batch.cond, "teacher").x0.flatten(1)
    normaliser = (table - real).abs().mean(1, keepdim=True)
    torch.testing.assert_close(gradients[0], gradients[1] * normaliser, rtol=1e-9, atol=1e-12)


def test_lognormal_law_is_that_of_both_networks_and_weighs_denoising_as_edm():
    schedule = EDMSchedule()
    student = AffineGenerator(A, B, schedule, "sample")
    fake = AffineGenerator(0.3 * A, B, schedule, "sample")
    base = ExactNetwork(Gaussian(MU, COV), schedule, "sample")
    denoiser = denoiser_of(base, schedule, "sample", student=student, fake_score=fake)
    published, rows = method(noise_law="log_normal"), 4000
    for site in ("student", "critic"):
        ctx = context(denoiser, rows)
        x = torch.zeros(rows, 2, 1, 1, dtype=torch.float64)
        sigma, x_t = published.noised(x, ctx, site)
        eps = ctx.random.normal(f"{site}/eps", (2, 1, 1))
        assert sigma.log().mean().item() == pytest.approx(-1.2, abs=0.06)
        assert sigma.log().std().item() == pytest.approx(1.2, abs=0.06)
        torch.testing.assert_close(x_t.float(), sigma[:, None, None, None] * eps)
    points = signs(4)
    given = {"student/0": spatial(points[:, :2]), "critic/eps": spatial(points[:, 2:])}
    noise = torch.linspace(-1, 1, len(points))
    ctx = context(denoiser, len(points), given | {"critic/t": noise})
    loss = published.critic_loss(batch_of(len(points), 2), ctx)["denoising"]
    sigma = (-1.2 + 1.2 * noise).exp().double()[:, None]
    x = points[:, :2].double() @ A.T + B
    error = (x + sigma * points[:, 2:]) @ (0.3 * A).T + B - x
    expected = ((sigma**-2 + 0.5**-2) * error**2).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-8)  # the draws are float32


def test_the_two_turns_train_one_network_each():
    assert [(u.name, u.trains) for u in method().updates(7)] == [
        ("student", ("student",)),
        ("fake_score", ("fake_score",)),
    ]
    assert method().sampler().timesteps == (999,)
    with pytest.raises(ValueError, match="noise_std"):
        DiffInstructConfig(noise_std=0.0)


def test_converges_to_the_teachers_law_with_an_exact_fake_score():
    torch.manual_seed(0)
    student, denoiser = denoiser_with_fake(SD)
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    rule = method()
    run(rule, denoiser, {"student": optimizer}, batch_of(32, 2), 200, lambda step: decay.step())
    assert (student.b - MU).abs().max() < 2e-3
    assert (student.A @ student.A.T - COV).abs().max() < 2e-3
