"""f-distill (arXiv 2502.15681): gradients of divergences in closed form, its weights' normalisation, and DMD2 inside it."""

from __future__ import annotations

import math

import pytest
import torch
from adversarial_cases import (
    GOLD,
    MU,
    SCENARIOS,
    B,
    Laboratory,
    OracleHeads,
    S,
    frozen_weights,
    same,
    tiny_trainer,
    weights_of,
)
from method_helpers import SD, AffineGenerator, OracleFake, TableGenerator, batch_of, context, denoiser_of, f64, run
from torch import nn

from fastdiff.diffusion import Gaussian
from fastdiff.diffusion.divergences import divergence_named
from fastdiff.methods import DMD2, DMD2Config
from fastdiff.methods._ratio import RatioWeight
from fastdiff.methods.f_distill import FDistill, FDistillConfig
from fastdiff.models.analytic import ExactNetwork

WIDE = {"ratio_min": 1e-300, "ratio_max": 1e300}


def method(**config) -> FDistill:
    """Without the parts of the time range, which only their own tests have."""
    return FDistill(FDistillConfig(**{"guidance_scale": 1.0, "time_bins": 0} | config))


def exact_weight(monkeypatch, scenario):
    """The weight of the score gap with which the gradient is that of the divergence itself."""
    alpha, sigma, _ = SCENARIOS[scenario]
    monkeypatch.setattr("fastdiff.methods._score_gap.dmd_normaliser", lambda x, real: sigma**2 / alpha**2)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_golden_gradients_of_divergences(monkeypatch, scenario):
    exact_weight(monkeypatch, scenario)
    laboratory = Laboratory(scenario, "student")
    laboratory.ctx.global_mean = torch.ones_like  # leaves h as it is
    for name, gold in GOLD[scenario].items():
        bounds = {} if name == "rkl" else WIDE
        terms = method(divergence=name, **bounds).student_loss(laboratory.batch, laboratory.ctx)
        assert laboratory.derivatives(terms["distribution_matching"]) == pytest.approx(gold, abs=1e-10), name


def power_gradient(alpha, sigma, a, gamma):
    """(d/dA, d/db) of D_f, h(r) = r^gamma, in closed form for one-dimensional Gaussians."""
    real, fake, m_r, m_f = alpha**2 * S + sigma**2, alpha**2 * a**2 + sigma**2, alpha * MU, alpha * B
    precision = gamma / real + (1 - gamma) / fake
    v, eta = 1 / precision, gamma * m_r / real + (1 - gamma) * m_f / fake
    m = v * eta
    log_z = 0.5 * (math.log(v) - gamma * math.log(real) - (1 - gamma) * math.log(fake))
    log_z += 0.5 * (eta * m - gamma * m_r**2 / real - (1 - gamma) * m_f**2 / fake)
    z, u = math.exp(log_z), (m - m_r) / real - (m - m_f) / fake
    return alpha**2 * z * ((1 / real - 1 / fake) * v + u * (m - m_f)) / fake * a, alpha * z * u


@pytest.mark.parametrize("gamma", [-0.5, 0.0, 0.3, 1.0, 1.5])
def test_power_family(monkeypatch, gamma):
    exact_weight(monkeypatch, "I")
    laboratory = Laboratory("I", "student")
    laboratory.ctx.global_mean = torch.ones_like
    terms = method(divergence="power", power=gamma, **WIDE).student_loss(laboratory.batch, laboratory.ctx)
    expected = power_gradient(*SCENARIOS["I"], gamma)
    assert laboratory.derivatives(terms["distribution_matching"]) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (lambda one, logits: one.adversary.generator_loss(logits), "soft_rkl"),  # softplus(-l), non-saturating
        (lambda one, logits: -nn.functional.softplus(logits).mean(), "js"),  # log(1 - D), saturating
        (lambda one, logits: -logits.mean(), "rkl"),
        (lambda one, logits: -logits.exp().mean(), "fkl"),
    ],
)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_gan_with_the_optimal_logit_descends_a_divergence(loss, name, scenario):
    laboratory, one = Laboratory(scenario, "student"), method()
    ctx, batch = laboratory.ctx, laboratory.batch
    x = one.sample(batch, ctx, with_grad=True)
    noisy = one.adversary.noised(x, ctx, "student", ctx.random.values["student/t"])
    logits = one.adversary.logits(noisy, batch.cond, ctx)
    assert laboratory.derivatives(loss(one, logits)) == pytest.approx(GOLD[scenario][name], abs=1e-10)


# The weights


def laboratory_of_points(rows=6, dim=3):
    """Samples of DMD2's normalised path, with heads that give any logit."""
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    eye = torch.eye(dim).double()
    teacher = ExactNetwork(Gaussian(f64([0.3] * dim), 0.5 * eye), SD, "epsilon")
    student = TableGenerator(table)
    fake = ExactNetwork(Gaussian(f64([-0.2] * dim), 0.9 * eye), SD, "epsilon")
    denoiser = denoiser_of(teacher, student=student, fake_score=fake)
    latents = torch.randn(rows, dim, 1, 1, generator=generator, dtype=torch.float64)
    return student, denoiser, batch_of(rows, dim, latents)


class GivenLogits(nn.Module):
    def __init__(self, *columns) -> None:
        super().__init__()
        self.logits = torch.stack(columns, 1)

    def forward(self, *features):
        return self.logits + 0 * features[0].flatten(1)[:, :1]


def gradient(one, student, denoiser, batch, heads, **changes):
    ctx = context(denoiser, len(batch), modules={"discriminator": heads})
    for name, value in changes.items():
        setattr(ctx, name, value)
    loss = one.student_loss(batch, ctx)["distribution_matching"]
    return torch.autograd.grad(loss, student.table)[0]


@pytest.mark.parametrize("name", ["soft_rkl", "js", "fkl", "pearson", "neyman"])
def test_constant_logits_give_dmd2(name):
    student, denoiser, batch = laboratory_of_points()
    heads = GivenLogits(torch.full((6,), 0.8).double())
    expected = gradient(DMD2(DMD2Config(guidance_scale=1.0)), student, denoiser, batch, heads)
    got = gradient(method(divergence=name), student, denoiser, batch, heads)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)


def test_reverse_kl_is_dmd2_whatever_the_logits():
    student, denoiser, batch = laboratory_of_points()
    heads = GivenLogits(torch.linspace(-2, 2, 6).double())
    expected = gradient(DMD2(DMD2Config(guidance_scale=1.0)), student, denoiser, batch, heads)
    torch.testing.assert_close(gradient(method(divergence="rkl"), student, denoiser, batch, heads), expected)
    assert not torch.allclose(gradient(method(divergence="js"), student, denoiser, batch, heads), expected, rtol=0.1)


def test_weights_are_h_of_the_clamped_mean_of_heads_over_its_global_mean():
    student, denoiser, batch = laboratory_of_points()
    first, second = torch.linspace(-9, 9, 6).double(), torch.linspace(1, -1, 6).double()
    plain = gradient(method(divergence="rkl"), student, denoiser, batch, GivenLogits(first))
    heads = GivenLogits(first, second)
    got = gradient(method(divergence="fkl"), student, denoiser, batch, heads, global_mean=lambda value: 3 * value)
    r = ((first + second) / 2).exp().clamp(0.1, 20)
    torch.testing.assert_close(got, plain * (r / (3 * r.mean()))[:, None], rtol=1e-12, atol=0)


def test_time_bins_bring_each_part_to_mean_one():
    weight = RatioWeight(divergence_named("fkl"), 0.1, 20, bins=4, decay=0.5)
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).double()
    place = torch.tensor([0.0, 0.2, 0.99, 1.0]).double()
    r = logits.exp()
    first = torch.stack([(r[0] + r[1]) / 2, (r[2] + r[3]) / 2])
    got = weight(logits, place, lambda value: value)
    expected = r / first.repeat_interleave(2)
    torch.testing.assert_close(got, expected / expected.mean())
    torch.testing.assert_close(weight.means, torch.stack([first[0], 0 * r[0], 0 * r[0], first[1]]))

    weight(torch.tensor([1.0]).double(), torch.tensor([0.1]).double(), lambda value: value)  # only the first part
    torch.testing.assert_close(weight.means[0], 0.5 * first[0] + 0.5 * r[1])
    torch.testing.assert_close(weight.means[3], first[1])


def test_bin_means_weigh_processes_by_their_counts():
    """One process with two samples of a part and one with none: the mean is that of the two."""
    weight = RatioWeight(divergence_named("fkl"), 0.1, 20, bins=2)
    weight(torch.tensor([0.0, 1.0]), torch.tensor([0.1, 0.2]), lambda value: value / 2)
    torch.testing.assert_close(weight.means[0], torch.tensor((1 + math.e) / 2))


@pytest.mark.parametrize("decay", [0.0, 0.99])
def test_samples_alone_in_their_part_keep_their_ratio_by_running_means_only(decay):
    weight = RatioWeight(divergence_named("fkl"), 0.1, 20, bins=10, decay=decay)
    weight.means += 1
    logits = torch.tensor([0.0, 1.0]).double()
    r = logits.exp() / (decay + (1 - decay) * logits.exp())
    found = weight(logits, torch.tensor([0.15, 0.85]).double(), lambda value: value)
    torch.testing.assert_close(found, r / r.mean())
    assert found.std() > 0.5 if decay else torch.equal(found, torch.ones_like(found))


@pytest.mark.parametrize(
    ("config", "least"),
    [
        ({"time_bins": 0}, 2),
        ({"time_bins": 10, "time_bins_decay": 0.0}, 20),
        ({"time_bins": 10, "time_bins_decay": 0.8}, 4),
        ({"time_bins": 10}, 2),
        ({"divergence": "rkl"}, 1),
    ],
)
def test_micro_batches_are_large_enough_for_weights(config, least):
    assert method(**config).least_batch == least


def test_a_micro_batch_whose_weights_would_be_1_is_refused(tiny_sd, tmp_path):
    with pytest.raises(ValueError, match="micro-batches of 20 samples"):
        tiny_trainer(method(time_bins=10, time_bins_decay=0.0), tiny_sd, tmp_path)


def test_running_means_are_kept():
    first, second = method(time_bins=10), method(time_bins=10)
    first.ratio(torch.tensor([1.0]), torch.tensor([0.5]), lambda value: value)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.ratio.means, first.ratio.means) and second.ratio.means.max() > 0
    assert method().state_dict() == {}
    with pytest.raises(ValueError, match="time_bins"):
        method(time_bins=5).load_state_dict(first.state_dict())


# Who is trained


def test_the_ratio_carries_no_gradient_and_the_gan_term_does():
    student, denoiser, batch = laboratory_of_points()
    one = method()
    torch.manual_seed(0)
    modules = one.modules(denoiser)
    ctx = context(denoiser, 6, modules={"discriminator": modules["discriminator"].double()})
    heads = list(modules["discriminator"].parameters())
    terms = one.student_loss(batch, ctx)
    matching = torch.autograd.grad(terms["distribution_matching"], heads, retain_graph=True, allow_unused=True)
    assert all(gradient is None for gradient in matching)
    assert torch.autograd.grad(terms["gan"], student.table)[0].abs().max() > 0

    (critic,) = one.updates(1)
    assert critic.trains == ("fake_score", "discriminator") and [u.name for u in one.updates(0)] == ["student"]
    terms = critic.loss(batch, ctx)
    assert set(terms) == {"denoising", "discriminator", "r1"}
    assert all(gradient.abs().max() > 0 for gradient in torch.autograd.grad(terms["discriminator"], heads[:1]))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"gan_weight": 0.0}, "dmd2"),
        ({"gan_weight": 0.0, "divergence": "rkl"}, "dmd2"),
        ({"gan_loss": "hinge"}, "softplus"),
        ({"power": 0.3}, "power has no effect with divergence js"),
        ({"divergence": "rkl", "ratio_max": 10.0}, "ratio_max has no effect with divergence rkl"),
        ({"divergence": "rkl", "time_bins": 5}, "time_bins has no effect with divergence rkl"),
        ({"time_bins": 0, "time_bins_decay": 0.5}, "time_bins_decay has no effect with time_bins 0"),
        ({"ratio_min": 30.0}, "ratio_max"),
        ({"time_bins": -1}, "time_bins"),
        ({"time_bins_decay": 1.0}, "time_bins_decay"),
    ],
)
def test_senseless_settings_are_refused(config, named):
    with pytest.raises(ValueError, match=named):
        FDistillConfig(**config)


def test_reverse_kl_asks_no_log_ratio_of_its_gan():
    config = FDistillConfig(divergence="rkl", gan_loss="hinge", time_bins=0)
    assert config.time_bins_decay == FDistillConfig.time_bins_decay


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fkl", "js"])
def test_converges_to_the_teachers_law_with_exact_critics(name):
    torch.manual_seed(0)
    mu, cov = f64([0.7, -0.4]), f64([[0.64, 0.2], [0.2, 0.5]])
    student = AffineGenerator(f64([[0.9, 0.2], [-0.1, 0.8]]), f64([0.3, 0.1]))
    teacher = ExactNetwork(Gaussian(mu, cov), SD, "epsilon")
    denoiser = denoiser_of(teacher, student=student, fake_score=OracleFake(student))
    heads = {"discriminator": OracleHeads(teacher, student)}
    steps = 250
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    one = method(divergence=name, student_update_every=1, update_rule="every", gan_weight=1e-3)
    run(one, denoiser, {"student": optimizer}, batch_of(64, 2), steps, lambda step: schedule.step(), heads)
    assert (student.b - mu).abs().max() < 2e-3
    assert (student.A @ student.A.T - cov).abs().max() < 2e-3


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_trains_and_resumes_exactly_and_leaves_the_teacher_alone(tiny_sd, tmp_path, kind):
    import copy

    settings = {"student": kind, "fake_score": kind}
    before, again = frozen_weights(tiny_sd), copy.deepcopy(tiny_sd)

    def trainer(pipeline, folder, **more):
        one = method(time_bins=4, time_bins_decay=0.75, student_update_every=2, timesteps=(999, 499))
        return tiny_trainer(one, pipeline, tmp_path / folder, **settings, **more)

    straight = trainer(tiny_sd, "straight")
    straight.train()
    after = frozen_weights(tiny_sd)
    assert same(before, after)
    first = trainer(copy.deepcopy(again), "split")
    for batches in first.batches.steps(0):
        first.train_step(batches)
        if first.step == 1:
            break
    first.save()
    second = trainer(copy.deepcopy(again), "split", resume_from_checkpoint="latest")
    second.train()
    assert same(weights_of(second), weights_of(straight))
    assert straight.method.ratio.means.max() > 0
