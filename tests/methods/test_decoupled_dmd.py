"""Decoupled DMD (arXiv 2511.22677): the split adds up to guided DMD, each term has its own times, and the optimum."""

from __future__ import annotations

import pytest
import torch
from method_helpers import (
    SD,
    AffineGenerator,
    LabelledGaussians,
    OracleFake,
    TableGenerator,
    batch_of,
    context,
    denoiser_of,
    f64,
    run,
    sigma_points,
    spatial,
)

from fastdiff.data.source import PromptData
from fastdiff.diffusion import FlowSchedule, Gaussian
from fastdiff.engine import Settings, Trainer
from fastdiff.methods import DMD2, DecoupledDMD, DecoupledDMDConfig, DMD2Config
from fastdiff.methods.decoupled_dmd import moments_divergence
from fastdiff.models.analytic import AnalyticTeacher

W, ROWS, DIM = 4.0, 6, 3
MU, NULL_MU, COV = f64([0.7, -0.4]), f64([0.1, 0.3]), f64([[0.64, 0.2], [0.2, 0.5]])
A, B = f64([[1.1, 0.3], [-0.2, 0.8]]), f64([-0.2, 0.5])


def method(**config) -> DecoupledDMD:
    return DecoupledDMD(DecoupledDMDConfig(**{"guidance_scale": W, "timesteps": (999,)} | config))


class Unnormalised(DecoupledDMD):
    """Both terms weighted as the exact divergence at each time."""

    def weight(self, x, real):
        alpha, sigma = real.levels
        return (alpha / sigma) ** 2


def table_setup(schedule=SD, kind="epsilon", seed=0):
    """A free table of samples; teacher, its null and the fake score have different laws."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64)
    eye = torch.eye(DIM, dtype=torch.float64)
    laws = [Gaussian(f64([m] * DIM), s * eye) for m, s in [(1.0, 0.3), (-0.5, 0.9)]]
    fake = LabelledGaussians([Gaussian(f64([m] * DIM), eye) for m in (0.2, 50.0)], schedule, kind)
    student = TableGenerator(table, schedule, kind)
    teacher = LabelledGaussians(laws, schedule, kind)
    return student, denoiser_of(teacher, schedule, kind, student=student, fake_score=fake)


def draws_of(t, augmentation_t=None, schedule=SD):
    """Noise and times (named by index) of both terms; the same where none is given for the augmentation."""
    eps = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(3))
    other = eps if augmentation_t is None else torch.flip(eps, [0])
    return {
        "student/t": t,
        "student/eps": spatial(eps),
        "augmentation/t": t if augmentation_t is None else augmentation_t,
        "augmentation/eps": spatial(other),
    }


def gradient(of, draws, schedule=SD, kind="epsilon"):
    student, denoiser = table_setup(schedule, kind)
    terms = of.student_loss(batch_of(ROWS, DIM), context(denoiser, ROWS, draws))
    sum(terms.values()).backward()
    return student.table.grad, terms


TIMES = torch.tensor([20, 150, 300, 500, 700, 980])


@pytest.mark.parametrize(("schedule", "kind"), [(SD, "epsilon"), (SD, "v_prediction"), (FlowSchedule(3.0), "flow")])
def test_at_equal_times_noises_and_normalisers_it_is_guided_dmd(monkeypatch, schedule, kind):
    monkeypatch.setattr("fastdiff.methods._score_gap.dmd_normaliser", lambda x, real: 1 / 1.7)
    draws = draws_of(TIMES)
    guided, _ = gradient(DMD2(DMD2Config(guidance_scale=W)), draws, schedule, kind)
    split, terms = gradient(method(), draws, schedule, kind)
    torch.testing.assert_close(split, guided, rtol=1e-12, atol=1e-13)
    assert set(terms) == {"distribution_matching", "guidance_augmentation"}
    assert all(term.abs() > 1e-3 for term in terms.values())


def posterior(x_t, t, mean, variance):
    alpha, sigma = SD.alpha(t.double())[:, None], SD.sigma(t.double())[:, None]
    return mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x_t - alpha * mean)


def test_each_term_has_its_own_noise_and_both_are_normalised_by_the_unguided_teacher():
    late = torch.tensor([980, 700, 500, 300, 150, 20])
    draws = draws_of(TIMES, late)
    student, _ = table_setup()
    table = student.table.detach()

    def noised(site):
        t = draws[f"{site}/t"]
        alpha, sigma = SD.alpha(t.double())[:, None], SD.sigma(t.double())[:, None]
        return alpha * table + sigma * draws[f"{site}/eps"].flatten(1), t

    def mean_distance(real):
        return (table - real).abs().mean(1, keepdim=True)

    x_s, s = noised("student")
    x_r, r = noised("augmentation")
    cond_s, fake_s = posterior(x_s, s, 1.0, 0.3), posterior(x_s, s, 0.2, 1.0)
    cond_r, null_r = posterior(x_r, r, 1.0, 0.3), posterior(x_r, r, -0.5, 0.9)
    matching = (fake_s - cond_s) / mean_distance(cond_s)
    augmentation = -(W - 1) * (cond_r - null_r) / mean_distance(cond_r)
    found, _ = gradient(method(), draws)
    torch.testing.assert_close(found * table.numel(), matching + augmentation, rtol=1e-9, atol=1e-12)
    halved, _ = gradient(method(matching_weight=0.5), draws)
    torch.testing.assert_close(halved * table.numel(), 0.5 * matching + augmentation, rtol=1e-9, atol=1e-12)
    alone, terms = gradient(method(matching_weight=0.0, student_update_every=1), draws)
    torch.testing.assert_close(alone * table.numel(), augmentation, rtol=1e-9, atol=1e-12)
    assert set(terms) == {"guidance_augmentation"}


def test_without_guidance_there_is_no_augmentation_and_no_call_for_it():
    student, denoiser = table_setup()
    draws = draws_of(TIMES)
    terms = method(guidance_scale=1.0).student_loss(batch_of(ROWS, DIM), context(denoiser, ROWS, draws))
    assert set(terms) == {"distribution_matching"}
    assert denoiser.calls == 3 * ROWS  # student, teacher, fake score
    plain, _ = gradient(DMD2(DMD2Config(guidance_scale=1.0)), draws)
    terms["distribution_matching"].backward()
    torch.testing.assert_close(student.table.grad, plain, rtol=1e-12, atol=1e-14)


def test_a_guided_step_costs_four_passes_without_gradient_beside_the_students():
    _, denoiser = table_setup()
    method().student_loss(batch_of(ROWS, DIM), context(denoiser, ROWS, draws_of(TIMES)))
    assert denoiser.calls == 5 * ROWS


def test_optimum_of_gaussians_with_one_covariance_weighs_guidance_by_the_two_time_laws():
    """b = m_c + (w - 1) H^-1 C (m_c - m_null), A A^T = S; H, C the means of a^2 (a^2 S + s^2)^-1 over the times."""
    base = sigma_points(4)
    matching_times, augmentation_times = torch.tensor([20, 400, 980]), torch.tensor([20, 60, 300])

    def precision(times):
        alpha, sigma = SD.alpha(times.double()), SD.sigma(times.double())
        eye = torch.eye(2, dtype=torch.float64)
        return torch.stack([a**2 * torch.linalg.inv(a**2 * COV + s**2 * eye) for a, s in zip(alpha, sigma)]).mean(0)

    shift = torch.linalg.solve(precision(matching_times), precision(augmentation_times)) @ (MU - NULL_MU)
    optimum = MU + (W - 1) * shift
    coupled = NULL_MU + W * (MU - NULL_MU)
    assert (optimum - coupled).abs().max() > 0.5  # the time laws matter
    values, basis = torch.linalg.eigh(COV)
    root = basis @ values.sqrt().diag() @ basis.T
    points = base.repeat(3, 1)
    draws = {
        "student/0": spatial(points[:, :2]),
        "student/eps": spatial(points[:, 2:]),
        "augmentation/eps": spatial(points[:, 2:]),
        "student/t": matching_times.repeat_interleave(len(base)),
        "augmentation/t": augmentation_times.repeat_interleave(len(base)),
    }

    def largest(mean, **times):
        student = AffineGenerator(root, mean)
        teacher = LabelledGaussians([Gaussian(MU, COV), Gaussian(NULL_MU, COV)])
        denoiser = denoiser_of(teacher, student=student, fake_score=OracleFake(student))
        loss = Unnormalised(DecoupledDMDConfig(guidance_scale=W, timesteps=(999,)))
        ctx = context(denoiser, len(points), draws | times)
        sum(loss.student_loss(batch_of(len(points), 2), ctx).values()).backward()
        return max(student.A.grad.abs().max().item(), student.b.grad.abs().max().item())

    assert largest(optimum) < 1e-10
    assert largest(optimum + 0.01) > 1e-3
    assert largest(coupled, **{"augmentation/t": draws["student/t"]}) < 1e-10


# Times


class Recording:
    """Says which ranges of indices were asked for."""

    def __init__(self, random):
        self.random, self.ranges = random, {}

    def __getattr__(self, name):
        return getattr(self.random, name)

    def integers(self, site, low, high):
        self.ranges[site] = (low, high - 1)
        return self.random.integers(site, low, high)


def ranges_of(of, step, timesteps):
    _, denoiser = table_setup()
    ctx = context(denoiser, ROWS, {"student/step": step} if len(timesteps) > 1 else {})
    ctx.random = Recording(ctx.random)
    of.student_loss(batch_of(ROWS, DIM), ctx)
    of.critic_loss(batch_of(ROWS, DIM), ctx)
    return ctx.random.ranges


@pytest.mark.parametrize(("step", "last"), [(0, 980), (1, 749), (2, 499), (3, 249)])
def test_augmentation_is_cleaner_than_the_students_input_and_matching_is_everywhere(step, last):
    timesteps = (999, 749, 499, 249)
    ranges = ranges_of(method(timesteps=timesteps), step, timesteps)
    assert ranges == {"augmentation/t": (20, last), "student/t": (20, 980), "critic/t": (0, 999)}
    other = method(timesteps=timesteps, augmentation_times="all", matching_times="below_input")
    ranges = ranges_of(other, step, timesteps)
    assert ranges == {"augmentation/t": (20, 980), "student/t": (20, last), "critic/t": (0, 999)}


def test_flow_teachers_compare_indices_before_the_shift():
    """An index is a time before the shift, so 'below' means the same for all shifts."""
    schedule = FlowSchedule(3.0)
    _, denoiser = table_setup(schedule, "flow")
    draws = {"student/step": 1, "augmentation/t": torch.full((ROWS,), 499)}
    seen = []
    denoiser.together = lambda x, t, asks: seen.append(t) or type(denoiser).together(denoiser, x, t, asks)
    method(timesteps=(999, 499)).student_loss(batch_of(ROWS, DIM), context(denoiser, ROWS, draws))
    torch.testing.assert_close(seen[-1].double(), torch.full((ROWS,), 0.75).double())  # 3 u / (1 + 2 u) at u = 1/2


# The regulariser, and the roles


def test_moments_are_the_divergence_of_each_samples_own_gaussian():
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = torch.distributions.Normal(x.flatten(1).mean(1), x.flatten(1).var(1, correction=0).sqrt())
    target = torch.distributions.Normal(f64(0.075), f64(0.9))
    expected = torch.distributions.kl_divergence(own, target).mean()
    torch.testing.assert_close(moments_divergence(x, 0.075, 0.81), expected, rtol=1e-12, atol=1e-12)
    exact = (x - x.mean((1, 2, 3), keepdim=True)) / x.flatten(1).std(1, correction=0)[:, None, None, None]
    assert moments_divergence(0.9 * exact + 0.075, 0.075, 0.81).abs() < 1e-12


def test_moments_reach_the_student():
    draws = draws_of(TIMES)
    bare, _ = gradient(method(), draws)
    with_moments, terms = gradient(method(moments_weight=2.0), draws)
    student, _ = table_setup()
    (2 * moments_divergence(student.table, 0.075, 0.81)).backward()
    torch.testing.assert_close(with_moments - bare, student.table.grad, rtol=1e-10, atol=1e-13)
    assert set(terms) == {"distribution_matching", "guidance_augmentation", "moments"}


@pytest.mark.parametrize(
    ("config", "groups"),
    [
        ({}, {"student", "fake_score"}),
        ({"matching_weight": 0.0, "student_update_every": 1}, {"student"}),
        ({"matching_weight": 0.0, "gan_weight": 0.1}, {"student", "fake_score", "discriminator"}),
        ({"gan_weight": 0.1}, {"student", "fake_score", "discriminator"}),
    ],
)
def test_there_is_a_fake_score_only_where_something_asks_it(config, groups):
    built = method(**config)
    assert set(built.groups()) == groups
    updates = list(built.updates(0))
    assert {name for update in updates for name in update.trains} == groups
    assert built.needs() == ("images" if "gan_weight" in config else "prompts")


@pytest.mark.parametrize("config", [{}, {"matching_weight": 0.0, "moments_weight": 1.0}])
def test_trains_through_the_engine(tmp_path, config):
    settings = Settings(
        output_dir=str(tmp_path), max_train_steps=3, train_batch_size=4, student="full", fake_score="full"
    )
    settings = Settings(**{**settings.__dict__, "report_to": "none"})
    teacher = AnalyticTeacher.mixture([0.5, 0.5], f64([[1.0, 0.0], [-1.0, 0.5]]), 0.1 * torch.eye(2).expand(2, 2, 2))
    built = method(timesteps=(999, 499), student_update_every=1, **config)
    trainer = Trainer(built, teacher, PromptData(["component 0", "component 1"] * 4), settings)
    before = [p.detach().clone() for p in trainer.networks.roles.parameters("student")]
    assert trainer.train() == "done"
    after = trainer.networks.roles.parameters("student")
    assert max((a - b).abs().max() for a, b in zip(after, before)) > 0
    assert ("fake_score" in trainer.networks.roles) == ("matching_weight" not in config)


def test_converges_to_the_teachers_law_without_guidance():
    torch.manual_seed(0)
    steps = 400
    student = AffineGenerator(A, B)
    teacher = LabelledGaussians([Gaussian(MU, COV), Gaussian(NULL_MU, COV)])
    denoiser = denoiser_of(teacher, student=student, fake_score=OracleFake(student))
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rule = method(guidance_scale=1.0, student_update_every=1)
    run(rule, denoiser, {"student": optimizer}, batch_of(64, 2), steps, lambda step: decay.step())
    assert (student.b - MU).abs().max() < 1e-3
    assert (student.A @ student.A.T - COV).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"matching_weight": 0.0}, "leaves no fake score to train"),
        ({"matching_weight": 0.0, "gan_weight": 0.1, "gan_features": "teacher"}, "a fake score that nobody asks"),
        ({"guidance_scale": 1.0, "matching_weight": 0.0}, "nothing tells the student"),
        ({"timesteps": (999, 20)}, "no noise level between"),
        ({"moments_variance": 0.0}, "moments_variance"),
        ({"matching_weight": -1.0}, "matching_weight"),
    ],
)
def test_settings_that_make_no_sense_are_refused(config, named):
    with pytest.raises(ValueError, match=named):
        DecoupledDMDConfig(**config)
