"""DMD2 (arXiv 2405.14867): gradients in closed form on Gaussians, the update rule, and what may get a gradient."""

from __future__ import annotations

import pytest
import torch
from method_helpers import (
    SD,
    AffineGenerator,
    FixedLevels,
    LabelledGaussians,
    OracleFake,
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
from torch.nn.functional import softplus

from fastdiff.data.source import PromptData
from fastdiff.diffusion import Gaussian
from fastdiff.engine import Settings, Trainer
from fastdiff.methods import DMD2, DMD2Config
from fastdiff.methods._rollout import student_sample
from fastdiff.models.analytic import AnalyticTeacher, ExactNetwork
from fastdiff.models.analytic_networks import AffinePerBin

MU, COV = f64([0.7, -0.4]), f64([[0.64, 0.2], [0.2, 0.5]])
A, B = f64([[1.1, 0.3], [-0.2, 0.8]]), f64([-0.2, 0.5])


def method(**config) -> DMD2:
    return DMD2(DMD2Config(**{"guidance_scale": 1.0} | config))


def gaussian_setup(mu, cov, a, b, schedule=SD, kind="epsilon"):
    student = AffineGenerator(a, b, schedule, kind)
    base = ExactNetwork(Gaussian(mu, cov), schedule, kind)
    return student, denoiser_of(base, schedule, kind, student=student, fake_score=OracleFake(student))


def draws(points, dim, t):
    """z for the student's input and eps for the comparison of scores, at one time for all."""
    return {
        "student/0": spatial(points[:, :dim]),
        "student/eps": spatial(points[:, dim : 2 * dim]),
        "student/t": torch.full((len(points),), t),
    }


def root(cov):
    values, basis = torch.linalg.eigh(cov)
    return basis @ values.sqrt().diag() @ basis.T


# The gradient


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow"])
def test_gradient_vanishes_exactly_where_student_and_teacher_agree(kind):
    points = sigma_points(4)
    for shift, vanishes in [(0.0, True), (0.01, False)]:
        student, denoiser = gaussian_setup(MU, COV, root(COV), MU + shift, kind=kind)
        ctx = context(denoiser, len(points), draws(points, 2, 400))
        (term,) = method().student_loss(batch_of(len(points), 2), ctx).values()
        term.backward()
        largest = max(student.A.grad.abs().max(), student.b.grad.abs().max()).item()
        assert (largest < 1e-12) == vanishes
        assert largest < 1 and torch.isfinite(term)


@pytest.mark.parametrize("w", [1.0, 3.0])
def test_gradient_in_x_is_the_normalised_gap_and_only_the_teacher_is_guided(w):
    rows, dim = 5, 3
    generator = torch.Generator().manual_seed(1)
    table, eps = (torch.randn(rows, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    eps = eps.float()
    laws = [Gaussian(f64([m] * dim), s * torch.eye(dim).double()) for m, s in [(1.0, 0.3), (-0.5, 0.9)]]
    fake_laws = [Gaussian(f64([m] * dim), torch.eye(dim).double()) for m in (0.2, 50.0)]
    student, fake = TableGenerator(table), LabelledGaussians(fake_laws)
    denoiser = denoiser_of(LabelledGaussians(laws), student=student, fake_score=fake)
    t = torch.tensor([20, 300, 500, 700, 980])
    ctx = context(denoiser, rows, {"student/eps": spatial(eps), "student/t": t})
    method(guidance_scale=w).student_loss(batch_of(rows, dim), ctx)["distribution_matching"].backward()

    alpha, sigma = SD.alpha(t.double())[:, None], SD.sigma(t.double())[:, None]
    x_t = alpha * table + sigma * eps

    def mean_of(m, s):  # E[x0 | x_t] of N(m, s I)
        return m + alpha * s / (alpha**2 * s + sigma**2) * (x_t - alpha * m)

    real = mean_of(-0.5, 0.9) + w * (mean_of(1.0, 0.3) - mean_of(-0.5, 0.9))
    p_real, p_fake = table - real, table - mean_of(0.2, 1.0)
    expected = (p_real - p_fake) / p_real.abs().mean(1, keepdim=True) / table.numel()
    torch.testing.assert_close(student.table.grad, expected, rtol=1e-9, atol=1e-12)


def use_weight(monkeypatch, weight):
    """Replaces the normaliser, so that the x-gradient is `weight` times the gap."""
    monkeypatch.setattr("fastdiff.methods._score_gap.dmd_normaliser", lambda x, real: 1 / weight)


@pytest.mark.parametrize("t", [50, 400, 900])
def test_expected_gradient_is_that_of_the_divergence(monkeypatch, t):
    points, time = sigma_points(4), torch.tensor(float(t)).double()
    alpha, sigma = SD.alpha(time), SD.sigma(time)
    use_weight(monkeypatch, alpha**2 / sigma**2)
    student, denoiser = gaussian_setup(MU, COV, A, B)
    ctx = context(denoiser, len(points), draws(points, 2, t))
    (2 * method().student_loss(batch_of(len(points), 2), ctx)["distribution_matching"]).backward()
    eye = torch.eye(2).double()
    real = torch.linalg.inv(alpha**2 * COV + sigma**2 * eye)
    fake = torch.linalg.inv(alpha**2 * A @ A.T + sigma**2 * eye)
    torch.testing.assert_close(student.b.grad, alpha**2 * real @ (B - MU), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(student.A.grad, alpha**2 * (real - fake) @ A, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("sigma", "a", "gold_a", "gold_b"),
    [(0.4, 1.1, 0.3494685068, -0.8299180328), (0.8, 1.3, 0.1628039773, -0.3722426471)],
)
def test_reverse_kl_golden_numbers(monkeypatch, sigma, a, gold_a, gold_b):
    use_weight(monkeypatch, 0.6**2 / sigma**2)
    points, schedule = signs(2), FixedLevels(0.6, sigma)
    mu, cov = f64([0.7]), f64([[0.64]])
    student, denoiser = gaussian_setup(mu, cov, f64([[a]]), f64([-0.2]), schedule)
    ctx = context(denoiser, len(points), draws(points, 1, 400))
    method().student_loss(batch_of(len(points), 1), ctx)["distribution_matching"].backward()
    assert student.A.grad.item() == pytest.approx(gold_a, abs=2e-10)
    assert student.b.grad.item() == pytest.approx(gold_b, abs=2e-10)


def test_guided_optimum_of_gaussians_with_one_covariance():
    """b = mu_0 + w (mu_c - mu_0) and A A^T = S at every time."""
    w, null_mean = 4.0, f64([0.1, 0.3])
    points = sigma_points(4)
    optimum = null_mean + w * (MU - null_mean)
    student = AffineGenerator(root(COV), optimum)
    base = LabelledGaussians([Gaussian(MU, COV), Gaussian(null_mean, COV)])
    denoiser = denoiser_of(base, student=student, fake_score=OracleFake(student))
    for t in (20, 500, 980):
        ctx = context(denoiser, len(points), draws(points, 2, t))
        (term,) = method(guidance_scale=w).student_loss(batch_of(len(points), 2), ctx).values()
        term.backward()
    assert max(student.A.grad.abs().max(), student.b.grad.abs().max()) < 1e-11


@pytest.mark.parametrize(("weighted", "mean", "std"), [(False, 2.1324572, 0.0), (True, 1.4225620, 0.1956970)])
def test_guided_fixed_points_in_one_dimension(monkeypatch, weighted, mean, std):
    """Null N(0,1), condition N(1,.25), w = 3: guided scores are those of no diffused law.

    So the fixed point depends on the weight: with that of the exact divergence a narrow law, with weight 1 a single
    point; the guided probability-flow ODE gives 1.47 +- .12. Expectations over all times and noises are exact here.
    """
    t = torch.arange(20, 981).repeat_interleave(4)
    levels = SD.alpha(t.double()), SD.sigma(t.double())
    weight = (levels[0] / levels[1])[:, None, None, None] ** 2 if weighted else torch.ones(())
    use_weight(monkeypatch, weight)
    points = signs(2).repeat(961, 1)
    laws = [Gaussian(f64([m]), f64([[s]])) for m, s in [(1.0, 0.25), (0.0, 1.0)]]

    def gradient(b, a):
        student = AffineGenerator(f64([[a]]), f64([b]))
        denoiser = denoiser_of(LabelledGaussians(laws), student=student, fake_score=OracleFake(student))
        ctx = context(denoiser, len(t), draws(points, 1, 0) | {"student/t": t})
        method(guidance_scale=3.0).student_loss(batch_of(len(t), 1), ctx)["distribution_matching"].backward()
        return student.b.grad.item(), student.A.grad.item()

    by_mean, by_std = gradient(mean, std or 1e-3)
    assert abs(by_mean) < 1e-6
    assert by_std > 0 if std == 0 else abs(by_std) < 1e-5
    assert gradient(mean + 0.1, std + 0.1)[0] > 1e-2 and gradient(mean + 0.1, std + 0.1)[1] > 1e-3


# The fake score


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow"])
def test_fake_score_loss_is_stationary_at_the_students_exact_denoiser(kind):
    points, t = sigma_points(4), 400
    time = torch.tensor(float(t)).double()
    alpha, sigma = SD.alpha(time), SD.sigma(time)
    C, eye = A @ A.T, torch.eye(2).double()
    gain = alpha * C @ torch.linalg.inv(alpha**2 * C + sigma**2 * eye)
    fake = AffineGenerator(gain, B - alpha * gain @ B, kind=kind)
    denoiser = denoiser_of(
        ExactNetwork(Gaussian(MU, COV), SD, kind), SD, kind, student=AffineGenerator(A, B, kind=kind), fake_score=fake
    )
    given = {
        "student/0": spatial(points[:, :2]),
        "critic/eps": spatial(points[:, 2:]),
        "critic/t": torch.full((len(points),), t),
    }
    loss = method().critic_loss(batch_of(len(points), 2), context(denoiser, len(points), given))["denoising"]
    loss.backward()
    assert max(fake.A.grad.abs().max(), fake.b.grad.abs().max()) < 1e-12
    assert denoiser.roles.network("student").A.grad is None
    # In x0 the least error is tr(C - alpha^2 C (alpha^2 C + sigma^2)^-1 C); the others weigh it by a function of t.
    weight = {"epsilon": alpha**2 / sigma**2, "sample": 1.0, "v_prediction": 1 / sigma**2}
    weight["flow"] = ((alpha + sigma) / sigma) ** 2
    least = torch.trace(C - alpha * gain @ C)
    assert loss.item() == pytest.approx((weight[kind] * least / 2).item(), rel=1e-10)


def test_fake_score_sees_all_times_and_the_score_gap_the_inner_ones():
    seen = {}
    _, denoiser = gaussian_setup(MU, COV, A, B)
    rows = 20_000

    def record(name):
        fallback = ctx.random.fallback.integers

        def integers(site, low, high):
            seen[site] = (low, high)
            return fallback(site, low, high)

        ctx.random.fallback.integers = integers

    ctx = context(denoiser, rows)
    record("times")
    loss = method()
    loss.student_loss(batch_of(rows, 2), ctx)
    loss.critic_loss(batch_of(rows, 2), ctx)
    assert seen == {"student/t": (20, 981), "critic/t": (0, 1000)}


# Update rule


def test_a_fake_score_that_would_never_step_is_refused():
    with pytest.raises(ValueError, match="never trains the fake score"):
        method(student_update_every=1, update_rule="exclusive")


@pytest.mark.parametrize(("rule", "fake_steps"), [("every", 3), ("exclusive", 2)])
def test_after_r_iterations_the_student_has_stepped_once(tmp_path, rule, fake_steps):
    teacher = AnalyticTeacher.gaussian(MU, COV)
    settings = Settings(
        output_dir=str(tmp_path),
        max_train_steps=3,
        train_batch_size=4,
        student="full",
        fake_score="full",
        report_to="none",
    )
    trainer = Trainer(
        method(student_update_every=3, update_rule=rule), teacher, PromptData(["a sample"] * 8), settings
    )
    assert trainer.train() == "done"
    states = {name: optimizer.optimizer.state.values() for name, optimizer in trainer.optimizers.items()}
    taken = {name: int(next(iter(state))["step"]) for name, state in states.items()}
    assert taken == {"student": 1, "fake_score": fake_steps}


def test_a_critic_update_reuses_the_students_sample_of_its_step():
    _, denoiser = gaussian_setup(MU, COV, A, B)
    ctx, batch = context(denoiser, 4), batch_of(4, 2)
    updates = list(method().updates(0))
    assert [update.name for update in updates] == ["student", "fake_score"]
    updates[0].loss(batch, ctx)
    before = denoiser.calls
    updates[1].loss(batch, ctx)
    assert denoiser.calls - before == 4  # the fake score alone
    assert not ctx.store["x"].requires_grad
    assert [update.name for update in method().updates(1)] == ["fake_score"]


# Backward simulation


def test_backward_simulation_moments():
    """Student := posterior mean of N(.7, .64); means and variances of its k-step samples, from exact designs."""
    means = [0.6979087675, 0.6999226388, 0.6999847254, 0.6999912760]
    variances = [0.0019151970, 0.0228023831, 0.1023038142, 0.1901330524]
    law = Gaussian(f64([0.7]), f64([[0.64]]))
    denoiser = denoiser_of(ExactNetwork(law, SD, "epsilon"), student=ExactNetwork(law, SD, "epsilon"))
    points = signs(4)
    noise = {f"student/{k}": spatial(points[:, k : k + 1]) for k in range(4)}
    for k, (mean, variance) in enumerate(zip(means, variances)):
        before = denoiser.calls
        ctx = context(denoiser, len(points), noise | {"student/step": k})
        x = student_sample(batch_of(len(points), 1), ctx, (999, 749, 499, 249)).flatten()
        assert x.mean().item() == pytest.approx(mean, abs=1e-9)
        assert x.var(correction=0).item() == pytest.approx(variance, abs=1e-9)
        assert denoiser.calls - before == (k + 1) * len(points)  # the rollout stops at the drawn step


def test_only_the_last_call_of_the_rollout_keeps_its_graph():
    generator = AffineGenerator(A, B)
    denoiser = denoiser_of(ExactNetwork(Gaussian(MU, COV), SD, "epsilon"), student=generator)
    ctx = context(denoiser, 4, {"student/step": 1})
    x = student_sample(batch_of(4, 2), ctx, (999, 499))
    x.sum().backward()
    t = torch.tensor(499.0).double()
    z = [ctx.random.normal(f"student/{k}", (2, 1, 1)).flatten(1).double() for k in (0, 1)]
    middle = SD.alpha(t) * (z[0] @ A.T + B) + SD.sigma(t) * z[1]
    torch.testing.assert_close(generator.A.grad, middle.sum(0).expand(2, 2), rtol=1e-10, atol=1e-10)


def test_noised_data_replaces_the_rollout():
    denoiser = denoiser_of(ExactNetwork(Gaussian(MU, COV), SD, "epsilon"), student=AffineGenerator(A, B))
    latents = torch.randn(4, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ctx = context(denoiser, 4, {"student/step": 1})
    x = student_sample(batch_of(4, 2, latents), ctx, (999, 499), "noised_data")
    t = torch.tensor(499.0).double()
    x_t = SD.alpha(t) * latents + SD.sigma(t) * ctx.random.normal("student/1", (2, 1, 1)).double()
    torch.testing.assert_close(x.flatten(1), x_t.flatten(1) @ A.T + B, rtol=1e-10, atol=1e-10)
    assert denoiser.calls == 4
    with pytest.raises(ValueError, match="train_data_dir"):
        student_sample(batch_of(4, 2), ctx, (999, 499), "noised_data")


# The adversarial term, and who gets a gradient


@pytest.fixture
def with_gan():
    from fastdiff.models.analytic_networks import PointNet

    torch.manual_seed(0)
    teacher = AnalyticTeacher.gaussian(MU, COV)
    gan = method(gan_weight=0.5, gan_discriminator_weight=0.25)
    networks = {"student": PointNet(2, 1), "fake_score": PointNet(2, 1)}
    denoiser = denoiser_of(teacher.network, **networks)
    denoiser.family.feature_tap = "mid_block"
    modules = gan.modules(denoiser)
    batch = batch_of(6, 2, torch.randn(6, 2, 1, 1).double())
    return gan, denoiser, modules, batch, context(denoiser, 6, modules=modules)


def features(denoiser, x, t, cond):
    kept = []
    handle = denoiser.roles.network("fake_score").mid_block.register_forward_hook(lambda m, i, o: kept.append(o))
    denoiser(x, t, cond, "fake_score")
    handle.remove()
    return kept[0].float()


def noised(ctx, x, site):
    t = ctx.random.integers(f"{site}/t", 0, 1000).float()
    return SD.add_noise(x, ctx.random.normal(f"{site}/eps", x.shape[1:]), t), t


def test_adversarial_terms_are_softplus_of_logits_on_the_fake_scores_features(with_gan):
    gan, denoiser, modules, batch, ctx = with_gan
    terms = gan.student_loss(batch, ctx)
    x, head = ctx.store["x"], modules["discriminator"]
    logits = head(features(denoiser, *noised(ctx, x, "student/gan"), batch.cond))
    torch.testing.assert_close(terms["gan"], 0.5 * softplus(-logits).mean(), rtol=1e-6, atol=1e-7)

    terms = gan.critic_loss(batch, ctx)
    fake = head(features(denoiser, *noised(ctx, x, "critic/gan_fake"), batch.cond))
    real = head(features(denoiser, *noised(ctx, batch.latents, "critic/gan_real"), batch.cond))
    expected = 0.25 * (softplus(fake).mean() + softplus(-real).mean())
    torch.testing.assert_close(terms["discriminator"], expected, rtol=1e-6, atol=1e-7)
    plain = method().critic_loss(batch, ctx)["denoising"]  # the same draws without the two further row blocks
    torch.testing.assert_close(terms["denoising"], plain, rtol=1e-10, atol=1e-12)


def test_a_students_turn_leaves_no_gradient_elsewhere(with_gan):
    gan, denoiser, modules, batch, ctx = with_gan
    student, critic = denoiser.roles.parameters("student"), denoiser.roles.parameters("fake_score")
    head = list(modules["discriminator"].parameters())
    turn, other = gan.updates(0)
    assert turn.trains == ("student",) and other.trains == ("fake_score", "discriminator")
    terms = turn.loss(batch, ctx)
    through_gan = torch.autograd.grad(terms["gan"], student[:1], retain_graph=True)[0]
    assert through_gan.abs().max() > 0
    dm_only = torch.autograd.grad(terms["distribution_matching"], critic, retain_graph=True, allow_unused=True)
    assert all(gradient is None for gradient in dm_only)
    sum(terms.values()).backward(inputs=student)  # as the engine does
    assert all(p.grad is None for p in critic + head)
    assert all(p.grad is not None for p in student if p.requires_grad and p is not student[-1])
    for p in student:
        p.grad = None
    sum(other.loss(batch, ctx).values()).backward(inputs=critic + head)
    assert all(p.grad is None for p in student)
    assert all(p.grad is not None for p in critic + head)


def test_adapters_get_gradients_and_the_teacher_none(tiny_sd):
    from fastdiff.models.denoiser import Denoiser
    from fastdiff.models.families import StableDiffusion
    from fastdiff.models.roles import AdapterSpec, Roles

    spec = AdapterSpec(4, 4.0, ("to_q", "conv1"))
    roles = Roles(tiny_sd.unet, {"student": spec, "fake_score": spec})
    denoiser = Denoiser(roles, StableDiffusion(), SD, "epsilon")
    embeds = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    batch = _sd_batch(embeds)
    gan = method(gan_weight=0.1)
    ctx = context(denoiser, 2, modules=gan.modules(denoiser))
    for update in gan.updates(0):
        groups = [*update.trains]
        trained = [
            p for g in groups for p in (ctx.modules[g].parameters() if g in ctx.modules else roles.parameters(g))
        ]
        sum(update.loss(batch, ctx).values()).backward(inputs=trained)
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
        if update.name == "student":
            assert all(p.grad is None for p in roles.parameters("fake_score"))
    trainable = {id(p) for role in ("student", "fake_score") for p in roles.parameters(role)}
    assert all(p.grad is None and not p.requires_grad for p in roles.base.parameters() if id(p) not in trainable)


def test_untrained_adapters_have_no_score_gap(tiny_sd):
    from fastdiff.models.denoiser import Denoiser
    from fastdiff.models.families import StableDiffusion
    from fastdiff.models.roles import AdapterSpec, Roles

    spec = AdapterSpec(4, 4.0, ("to_q", "conv1"))
    denoiser = Denoiser(Roles(tiny_sd.unet, {"student": spec, "fake_score": spec}), StableDiffusion(), SD, "epsilon")
    batch = _sd_batch(torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0)))
    ctx = context(denoiser, 2)
    assert method().student_loss(batch, ctx)["distribution_matching"].item() < 1e-10
    assert method(guidance_scale=3.0).student_loss(batch, ctx)["distribution_matching"].item() > 1e-8


def _sd_batch(embeds):
    from fastdiff.methods import Batch
    from fastdiff.models.conditioning import Conditioning

    cond = Conditioning({"prompt_embeds": embeds[:-1]})
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    return Batch(torch.arange(2), cond, Conditioning({"prompt_embeds": embeds[-1:]}), (4, 16, 16), latents)


def test_images_are_needed_for_the_adversarial_term(with_gan):
    gan, *_, ctx = with_gan
    with pytest.raises(ValueError, match="train_data_dir"):
        gan.critic_loss(batch_of(6, 2), ctx)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"timesteps": (499, 999)}, "timesteps"),
        ({"timesteps": ()}, "timesteps"),
        ({"min_timestep": 500, "max_timestep": 400}, "max_timestep"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"student_update_every": 0}, "student_update_every"),
        ({"gan_weight": float("nan")}, "gan_weight"),
    ],
)
def test_bad_settings_are_named(config, named):
    with pytest.raises(ValueError, match=named):
        DMD2Config(**config)


# Convergence


def adam(parameters, rate, steps):
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return optimizer, schedule


def test_converges_to_the_teachers_law_with_an_exact_fake_score():
    torch.manual_seed(0)
    steps = 400
    student, denoiser = gaussian_setup(MU, COV, A, B)
    optimizer, schedule = adam(student.parameters(), 3e-2, steps)
    rule = method(student_update_every=1)
    run(rule, denoiser, {"student": optimizer}, batch_of(64, 2), steps, lambda step: schedule.step())
    assert (student.b - MU).abs().max() < 1e-3
    assert (student.A @ student.A.T - COV).abs().max() < 1e-3


@pytest.mark.slow
def test_converges_with_a_learned_fake_score():
    """An affine fake score with ten time bins, trained beside the student; the bins leave an error of a few percent."""
    torch.manual_seed(0)
    student, steps = AffineGenerator(A, B), 1000
    fake = AffinePerBin(2, [50 + 100 * k for k in range(10)])
    denoiser = denoiser_of(ExactNetwork(Gaussian(MU, COV), SD, "epsilon"), student=student, fake_score=fake)
    batch, rule = batch_of(128, 2), method(student_update_every=2)
    warm, _ = adam(fake.parameters(), 2e-2, 1)
    for step in range(150):  # the fake score starts near the student's own
        loss = rule.critic_loss(batch, context(denoiser, len(batch), step=step, seed=1))["denoising"]
        loss.backward(inputs=list(fake.parameters()))
        warm.step()
        warm.zero_grad()
    (one, a), (two, b) = adam(student.parameters(), 2e-2, steps), adam(fake.parameters(), 2e-2, steps)
    run(rule, denoiser, {"student": one, "fake_score": two}, batch, steps, lambda step: (a.step(), b.step()))
    assert (student.A @ student.A.T - COV).abs().max() < 0.06
    assert (student.b - MU).abs().max() < 0.06
