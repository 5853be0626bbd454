"""LADD (arXiv 2403.12015): its gradient in closed form, what its players train, and the student's inputs."""

from __future__ import annotations

import copy

import pytest
import torch
from adversarial_cases import GOLD, SCENARIOS, Laboratory, OracleHeads, frozen_weights, same, tiny_trainer, weights_of
from method_helpers import SD, AffineGenerator, FixedLevels, batch_of, context, denoiser_of, f64, run, spatial
from torch import nn

from fastdiff.diffusion import Gaussian
from fastdiff.methods.ladd import LADD, LADDConfig
from fastdiff.models.analytic import ExactNetwork


def method(**config) -> LADD:
    return LADD(LADDConfig(**{"timesteps": (999,)} | config))


# The gradient


@pytest.mark.parametrize(("loss", "name"), [("softplus", "soft_rkl"), ("hinge", "rkl")])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_golden_gradients_with_the_optimal_logit(scenario, loss, name):
    laboratory = Laboratory(scenario, "student/gan")
    one = method(gan_loss=loss, noise_law="uniform")
    terms = one.student_loss(laboratory.batch, laboratory.ctx)
    assert laboratory.derivatives(terms["gan"]) == pytest.approx(GOLD[scenario][name], abs=1e-10)


def test_gradient_in_each_sample_is_the_weighted_gap_of_scores():
    """sigmoid(-l) alpha (s_student - s_teacher), in two dimensions and at several times."""
    generator = torch.Generator().manual_seed(2)
    teacher_law = Gaussian(f64([0.7, -0.4]), f64([[0.64, 0.2], [0.2, 0.5]]))
    student = AffineGenerator(f64([[1.1, 0.3], [-0.2, 0.8]]), f64([-0.2, 0.5]))
    own = Gaussian(student.b.detach(), (student.A @ student.A.T).detach())
    teacher = ExactNetwork(teacher_law, SD, "epsilon")
    denoiser = denoiser_of(teacher, student=student)
    t = torch.tensor([30, 400, 700, 950])
    ctx = context(denoiser, 4, {"f/t": t}, modules={"discriminator": OracleHeads(teacher, student)})
    x = torch.randn(4, 2, 1, 1, generator=generator, dtype=torch.float64).requires_grad_()
    one = method(gan_loss="softplus", noise_law="uniform")
    (gradient,) = torch.autograd.grad(one.adversary.student_term(x, batch_of(4, 2).cond, ctx, "f"), x)

    x_t = SD.add_noise(x, ctx.random.normal("f/eps", (2, 1, 1)), t).detach()
    gap = own.score(x_t, t, SD) - teacher_law.score(x_t, t, SD)
    log_ratio = teacher_law.log_prob(x_t, t, SD) - own.log_prob(x_t, t, SD)
    weight = (torch.sigmoid(-log_ratio) * SD.alpha(t.double()))[:, None, None, None]
    torch.testing.assert_close(gradient, weight * gap / 4, rtol=1e-9, atol=1e-12)


class Perturbed(nn.Module):
    """An oracle's logit plus a polynomial that vanishes."""

    def __init__(self, oracle) -> None:
        super().__init__()
        self.oracle, self.coefficients = oracle, nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, noisy, clean):
        x = noisy.flatten(1)
        return self.oracle(noisy, clean) + torch.cat([x**0, x, x**2], 1) @ self.coefficients[:, None]


@pytest.mark.parametrize(("loss", "stationary"), [("softplus", True), ("hinge", False)])
def test_the_log_ratio_is_the_optimal_logit_of_softplus_losses_only(loss, stationary):
    alpha, sigma, a = SCENARIOS["I"]
    schedule, count = FixedLevels(alpha, sigma), 4000
    quantiles = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    laws = {"fake": (-0.2, a**2), "real": (0.7, 0.64)}
    # Midpoint quantiles of the noised laws, seen as clean samples without noise.
    x = {k: (alpha * m + (alpha**2 * s + sigma**2) ** 0.5 * quantiles) / alpha for k, (m, s) in laws.items()}
    student = AffineGenerator(f64([[a]]), f64([-0.2]), schedule)
    teacher = ExactNetwork(Gaussian(f64([0.7]), f64([[0.64]])), schedule, "epsilon")
    heads = Perturbed(OracleHeads(teacher, student))
    none = {f"critic/gan_{side}/eps": torch.zeros(count, 1, 1, 1) for side in ("real", "fake")}
    denoiser = denoiser_of(teacher, schedule, student=student)
    ctx = context(denoiser, count, none, modules={"discriminator": heads})
    ctx.store["x"] = spatial(x["fake"][:, None])
    batch = batch_of(count, 1, spatial(x["real"][:, None]))
    method(gan_loss=loss).discriminator_loss(batch, ctx)["discriminator"].backward()
    assert (heads.coefficients.grad.abs().max().item() < 1e-3) == stationary


MU, COV = f64([0.7, -0.4]), f64([[0.64, 0.2], [0.2, 0.5]])


def gaussian_student():
    student = AffineGenerator(f64([[0.9, 0.2], [-0.1, 0.8]]), f64([0.3, 0.1]))
    teacher = ExactNetwork(Gaussian(MU, COV), SD, "epsilon")
    return student, teacher, denoiser_of(teacher, student=student)


def distance(student):
    return max((student.b - MU).abs().max(), (student.A @ student.A.T - COV).abs().max()).item()


@pytest.mark.slow
def test_converges_to_the_teachers_law_with_optimal_heads():
    student, teacher, denoiser = gaussian_student()
    heads, steps = {"discriminator": OracleHeads(teacher, student)}, 150
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    one = method(noise_mean=0.0, update_rule="every", student_update_every=1)
    one.updates = lambda step: [one_update for one_update in LADD.updates(one, step) if one_update.name == "student"]
    run(one, denoiser, {"student": optimizer}, batch_of(64, 2), steps, lambda step: schedule.step(), heads)
    assert distance(student) < 1e-2


@pytest.mark.slow
def test_converges_with_heads_that_learn():
    """Heads on the exact teacher's features; the law is found to a few percent (closer with more steps)."""
    torch.manual_seed(0)
    student, _teacher, denoiser = gaussian_student()
    one = method(gan_loss="softplus", noise_mean=0.0, update_rule="every", student_update_every=2)
    heads, steps = one.modules(denoiser), 160
    own = torch.optim.Adam(student.parameters(), lr=2e-2, betas=(0.0, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(own, steps)
    others = torch.optim.Adam(heads["discriminator"].parameters(), lr=3e-3, betas=(0.0, 0.99))
    start = distance(student)
    for step in range(steps):
        ctx = context(denoiser, 96, step=step, modules=heads)
        batch = batch_of(96, 2, Gaussian(MU, COV).sample(ctx.random.normal("data", (2, 1, 1)).double()))
        for update in one.updates(step):
            optimizer = own if update.name == "student" else others
            trained = optimizer.param_groups[0]["params"]
            sum(update.loss(batch, ctx).values()).backward(inputs=trained)
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
    assert start > 0.4 and distance(student) < 0.15


# The student's inputs


def test_each_sample_starts_at_one_of_the_students_times():
    one = method(timesteps=(999, 749, 499, 249), timestep_probabilities=(0.7, 0.1, 0.0, 0.2))
    denoiser = denoiser_of(
        ExactNetwork(Gaussian(f64([0.0]), f64([[1.0]])), SD, "epsilon"),
        student=AffineGenerator(f64([[1.0]]), f64([0.0])),
    )
    rows = 4000
    batch = batch_of(rows, 1, torch.full((rows, 1, 1, 1), 3.0, dtype=torch.float64))
    ctx = context(denoiser, rows)
    t, x_t = one._noised_images(batch, ctx)
    shares = [(t == index).float().mean().item() for index in (999, 749, 499, 249)]
    assert shares == pytest.approx([0.7, 0.1, 0.0, 0.2], abs=0.03) and shares[2] == 0
    eps = ctx.random.normal("student/0", (1, 1, 1)).double()
    first = t == 999
    assert torch.equal(x_t[first], eps[first])
    alpha, sigma = (level(t.double())[:, None, None, None] for level in (SD.alpha, SD.sigma))
    torch.testing.assert_close(x_t[~first], (alpha * 3 + sigma * eps)[~first])
    even = method(timesteps=(999, 499))
    positions = even._positions(torch.tensor([0.0, 0.499, 0.5, 0.999]))
    assert positions.tolist() == [0, 0, 1, 1]


def test_the_rollout_may_stand_for_the_images():
    one = method(timesteps=(999, 499), multi_step_input="simulate")
    denoiser = denoiser_of(
        ExactNetwork(Gaussian(f64([0.0]), f64([[1.0]])), SD, "epsilon"),
        student=AffineGenerator(f64([[2.0]]), f64([0.5])),
    )
    ctx = context(denoiser, 3, {"student/step": 1})
    x = one.sample(batch_of(3, 1), ctx)  # no images
    z = [ctx.random.normal(f"student/{k}", (1, 1, 1)).double() for k in (0, 1)]
    level = torch.tensor(499.0).double()
    middle = SD.alpha(level) * (2 * z[0] + 0.5) + SD.sigma(level) * z[1]
    torch.testing.assert_close(x, 2 * middle + 0.5)
    assert x.requires_grad


# Who is trained


@pytest.mark.parametrize(("rule", "names"), [("exclusive", ["student"]), ("every", ["student", "discriminator"])])
def test_turns(rule, names):
    one = method(update_rule=rule, student_update_every=2)
    assert [update.name for update in one.updates(0)] == names
    assert [update.name for update in one.updates(1)] == ["discriminator"]
    assert [update.trains for update in one.updates(1)] == [("discriminator",)]
    assert one.needs() == "images"


def test_the_heads_turn_reaches_heads_only_and_the_students_passes_through_the_teacher(tiny_sd, tmp_path):
    trainer = tiny_trainer(method(gan_r1_weight=1.0), tiny_sd, tmp_path)
    batch = next(iter(trainer.batches.steps(0)))[0]
    roles, heads = trainer.networks.roles, list(trainer.networks.modules["discriminator"].parameters())
    ctx = context(trainer.networks.denoiser, len(batch), modules=trainer.networks.modules)
    assert len(trainer.networks.modules["discriminator"]) == 5

    sum(trainer.method.discriminator_loss(batch, ctx).values()).backward()  # everything that has a graph
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in heads if p.dim() > 1)
    assert all(p.grad is None for p in roles.parameters("student"))
    trainer.method.student_loss(batch, ctx)["gan"].backward(inputs=roles.parameters("student"))
    assert any(p.grad.abs().max() > 0 for p in roles.parameters("student"))
    others = {id(p) for p in roles.parameters("student")}
    assert all(p.grad is None for p in roles.base.parameters() if id(p) not in others)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_trains_and_resumes_exactly_and_leaves_the_teacher_alone(tiny_sd, tmp_path, kind):
    before, again = frozen_weights(tiny_sd), copy.deepcopy(tiny_sd)

    def trainer(pipeline, folder, **more):
        one = method(timesteps=(999, 499), student_update_every=2)
        return tiny_trainer(one, pipeline, tmp_path / folder, student=kind, **more)

    straight = trainer(tiny_sd, "straight")
    straight.train()
    assert same(before, frozen_weights(tiny_sd))
    first = trainer(copy.deepcopy(again), "split")
    for batches in first.batches.steps(0):
        first.train_step(batches)
        if first.step == 2:
            break
    first.save()
    second = trainer(copy.deepcopy(again), "split", resume_from_checkpoint="latest")
    second.train()
    assert same(weights_of(second), weights_of(straight))


@pytest.mark.parametrize("same", [False, True])
def test_sample_and_image_may_be_judged_at_one_time_and_noise(same):
    """The discriminator is shown x_t = alpha x + sigma eps of both; equal images then look equal."""
    denoiser = denoiser_of(ExactNetwork(Gaussian(f64([0.0, 0.0]), torch.eye(2).double()), SD, "epsilon"))
    ctx, batch = context(denoiser, 4), batch_of(4, 2, torch.ones(4, 2, 1, 1, dtype=torch.float64))
    ctx.store["x"] = torch.ones(4, 2, 1, 1, dtype=torch.float64)
    one = method(gan_same_noise=same)
    shown = {}
    object.__setattr__(one.adversary, "discriminator_terms", lambda real, fake, *_: shown.update(real=real, fake=fake))
    one.discriminator_loss(batch, ctx)
    assert torch.equal(shown["real"].t, shown["fake"].t) == same
    assert torch.equal(shown["real"].x_t, shown["fake"].x_t) == same


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"timesteps": (499, 999)}, "timesteps"),
        ({"timestep_probabilities": (0.5, 0.5)}, "timestep_probabilities"),
        ({"timestep_probabilities": (0.9,)}, "timestep_probabilities"),
        (
            {"timesteps": (999, 499), "timestep_probabilities": (0.5, 0.5), "multi_step_input": "simulate"},
            "simulate",
        ),
        ({"student_update_every": 1}, "exclusive"),
        ({"noise_std": 0.0}, "noise_std"),
        ({"discriminator_learning_rate": -1.0}, "discriminator_learning_rate"),
    ],
)
def test_senseless_settings_are_refused(config, named):
    with pytest.raises(ValueError, match=named):
        method(**config)
