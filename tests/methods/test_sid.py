"""SiD, SiDA, SiD-LSG and SIM: gradients in closed form on Gaussians, reductions, guidance, the adversarial term."""

from __future__ import annotations

import copy

import pytest
import torch
from adversarial_cases import frozen_weights, tiny_trainer
from identity_helpers import ALPHA, MEAN, SCALE, SHIFT, SIGMA, VARIANCE, scalar_gradient
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
from torch.nn.functional import softplus

from fastdiff.data.source import PromptData
from fastdiff.diffusion import FlowSchedule, Gaussian
from fastdiff.engine import Settings, Trainer
from fastdiff.methods import SIM, Batch, SiD, SiDA, SiDAConfig, SiDConfig, SiDLSG, SiDLSGConfig, SIMConfig
from fastdiff.methods._prompts import without_prompts
from fastdiff.models.analytic import AnalyticTeacher, ExactNetwork
from fastdiff.models.analytic_networks import AffinePerBin, PointNet
from fastdiff.models.conditioning import Conditioning

MU, NULL_MU, COV = f64([0.7, -0.4]), f64([0.1, 0.3]), f64([[0.64, 0.2], [0.2, 0.5]])
A, B = f64([[1.1, 0.3], [-0.2, 0.8]]), f64([-0.2, 0.5])
EYE = torch.eye(2, dtype=torch.float64)


def sid(**config) -> SiD:
    return SiD(SiDConfig(**{"loss_scale": 1.0} | config))


def gaussian_setup(a=A, b=B, schedule=SD, kind="epsilon"):
    student = AffineGenerator(a, b, schedule, kind)
    base = ExactNetwork(Gaussian(MU, COV), schedule, kind)
    return student, denoiser_of(base, schedule, kind, student=student, fake_score=OracleFake(student))


def use_weight(monkeypatch, weight):
    monkeypatch.setattr("fastdiff.methods._score_gap.dmd_normaliser", lambda x, real: torch.as_tensor(1 / weight))


def expected_gradient(method, t, schedule=SD, kind="epsilon"):
    """dA, db from noise designs that are exact for quadratics."""
    points = sigma_points(4)
    student, denoiser = gaussian_setup(schedule=schedule, kind=kind)
    draws = {
        "student/0": spatial(points[:, :2]),
        "student/eps": spatial(points[:, 2:]),
        "student/t": torch.full((len(points),), t),
    }
    (term,) = method.student_loss(batch_of(len(points), 2), context(denoiser, len(points), draws)).values()
    term.backward()
    return student.A.grad, student.b.grad


def levels(t, schedule=SD):
    time = schedule.time_of_index(torch.tensor(float(t), dtype=torch.float64))
    return schedule.alpha(time), schedule.sigma(time)


# The gradient


@pytest.mark.parametrize("t", [50, 400, 900])
@pytest.mark.parametrize(
    ("schedule", "kind"), [(SD, "epsilon"), (SD, "v_prediction"), (FlowSchedule(), "flow")], ids=["eps", "v", "flow"]
)
def test_alpha_half_is_the_fisher_divergence_and_one_holds_the_law_fixed(monkeypatch, t, schedule, kind):
    alpha, sigma = levels(t, schedule)
    use_weight(monkeypatch, 2 * alpha**2 / sigma**4)
    real = torch.linalg.inv(alpha**2 * COV + sigma**2 * EYE)
    fake = torch.linalg.inv(alpha**2 * A @ A.T + sigma**2 * EYE)
    found_A, found_b = expected_gradient(sid(alpha=0.5), t, schedule, kind)
    scale = fake.abs().max() ** 2
    tight = 1e-9 if schedule is SD else 1e-6  # the index of a flow time is not exact in float32
    near = {"rtol": 10 * tight, "atol": tight * scale}
    torch.testing.assert_close(found_b, 2 * alpha**2 * real @ real @ (B - MU), **near)
    full = 2 * alpha**2 * (real @ real - fake @ fake) @ A
    torch.testing.assert_close(found_A, full, **near)

    found_A, found_b = expected_gradient(sid(alpha=1.0), t, schedule, kind)
    torch.testing.assert_close(found_b, 2 * alpha**2 * fake @ real @ (B - MU), **near)
    M = real - fake
    semi = 2 * alpha**2 * (M @ fake + fake @ M) @ A
    torch.testing.assert_close(found_A, semi, **near)

    other_A, _ = expected_gradient(sid(alpha=1.2), t, schedule, kind)
    torch.testing.assert_close(other_A, full + 1.4 * (semi - full), **near)


@pytest.mark.parametrize(
    ("method", "config", "gold"),
    [
        (SiD, SiDConfig(loss_scale=1.0, alpha=0.5), (2.9638106674, -4.2516292663)),
        (SiD, SiDConfig(loss_scale=1.0, alpha=1.0), (2.3470013885, -2.7868301974)),
        (SIM, SIMConfig(distance="l2"), (2.3470013885, -2.7868301974)),
    ],
)
def test_golden_numbers_of_the_squared_distance(method, config, gold):
    found = scalar_gradient(method, config, 2 * ALPHA**2 / SIGMA**4)
    assert found == pytest.approx(gold, abs=2e-10)


def test_golden_numbers_of_the_pseudo_huber_distance():
    """On scores with c = 1/2: in clean predictions c is sigma^2/alpha times that, and the loss alpha/sigma^2 less."""
    config = SIMConfig(huber_c=0.5 * SIGMA**2 / ALPHA)
    found = scalar_gradient(SIM, config, ALPHA / SIGMA**2)
    assert found == pytest.approx((0.27911810, -0.87136645), abs=1e-8)


class LogCosh(SIM):
    """Any distance: sum log cosh(d)."""

    def distance_gradient(self, gap):
        return gap.tanh()


@pytest.mark.parametrize(
    ("cls", "distance", "rho"),
    [
        (LogCosh, "pseudo_huber", lambda d: d.cosh().log()),
        (SIM, "l2", lambda d: d.square() / 2),
        (SIM, "pseudo_huber", lambda d: (d.square() + 0.01).sqrt()),
    ],
)
def test_any_distance_has_the_gradient_with_the_law_held_fixed(cls, distance, rho):
    """E rho(D_real - D_fake) over fixed x_t ~ N(a b, a^2 A^2 + s^2), differentiated through the fake score's law alone."""
    config = SIMConfig(distance=distance, **({"huber_c": 0.1} if distance == "pseudo_huber" else {}))
    A, b = f64([SCALE]).requires_grad_(), f64([SHIFT]).requires_grad_()
    spread, width = ALPHA**2 * SCALE**2 + SIGMA**2, torch.arange(-10, 10.001, 1 / 64, dtype=torch.float64)
    weights = torch.exp(-(width**2) / 2)
    x_t = ALPHA * SHIFT + spread**0.5 * width
    real = -(x_t - ALPHA * MEAN) / (ALPHA**2 * VARIANCE + SIGMA**2)
    fake = -(x_t - ALPHA * b) / (ALPHA**2 * A**2 + SIGMA**2)
    expected = (weights * rho(SIGMA**2 / ALPHA * (real - fake))).sum() / weights.sum()
    gold = [gradient.item() for gradient in torch.autograd.grad(expected, (A, b))]
    assert scalar_gradient(cls, config, 1.0) == pytest.approx(gold, abs=1e-8)


def test_signs_are_the_gradient_of_absolute_values():
    gap = torch.randn(4, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(gap.abs().sum(), gap)
    assert torch.equal(SIM(SIMConfig(distance="l1")).distance_gradient(gap), expected)


def test_a_wide_pseudo_huber_distance_is_the_squared_one():
    c, rows = 1e7, 5
    gradients = []
    for method in (SIM(SIMConfig(huber_c=c)), sid(alpha=1.0)):
        student, denoiser = table_setup(rows)
        ctx = context(denoiser, rows, table_draws(rows))
        if method.config.distance == "l2":
            method.weight = lambda x, real: torch.ones(())
        method.student_loss(batch_of(rows, 3), ctx)["score_identity"].backward()
        gradients.append(student.table.grad)
    torch.testing.assert_close(c * 3**0.5 * gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("config", [{"alpha": a} for a in (0.0, 0.5, 1.0, 1.2)] + [{"distance": "pseudo_huber"}])
def test_equal_scores_give_no_loss_and_no_gradient(config):
    rows = 6
    config = {"alpha": 1.0} | config
    table = torch.randn(rows, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    law = Gaussian(f64([0.3] * 3), 0.4 * torch.eye(3, dtype=torch.float64))
    student, network = TableGenerator(table), ExactNetwork(law, SD, "epsilon")
    denoiser = denoiser_of(network, student=student, fake_score=copy.deepcopy(network))
    (loss,) = sid(**config).student_loss(batch_of(rows, 3), context(denoiser, rows, table_draws(rows))).values()
    loss.backward()
    assert loss.abs() < 1e-12 and student.table.grad.abs().max() < 1e-12


# Value, reduction and normaliser


TIMES = torch.tensor([20, 300, 500, 700, 979])


def table_setup(rows, kind="epsilon", student_law=None):
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    laws = [Gaussian(f64([m] * 3), s * eye) for m, s in [(1.0, 0.3), (-0.5, 0.9)]]
    fakes = [Gaussian(f64([m] * 3), s * eye) for m, s in [(0.2, 1.0), (-0.8, 0.6)]]
    student = TableGenerator(table, kind=kind)
    teacher, fake = LabelledGaussians(laws, kind=kind), LabelledGaussians(fakes, kind=kind)
    return student, denoiser_of(teacher, kind=kind, student=student, fake_score=fake)


def table_draws(rows):
    eps = torch.randn(rows, 3, generator=torch.Generator().manual_seed(2))
    return {"student/eps": spatial(eps), "student/t": TIMES.repeat(2)[:rows]}


def posterior(x_t, t, mean, variance):
    alpha, sigma = SD.alpha(t.double())[:, None], SD.sigma(t.double())[:, None]
    return mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x_t - alpha * mean)


@pytest.mark.parametrize(("guided", "w"), [("both", 1.0), ("both", 3.0), ("teacher", 3.0)])
def test_value_is_the_published_sum_over_elements_and_mean_over_samples(guided, w):
    rows, alpha_s = 5, 1.2
    student, denoiser = table_setup(rows)
    draws = table_draws(rows)
    method = SiD(SiDConfig(guidance_scale=w, guided=guided, alpha=alpha_s))
    (loss,) = method.student_loss(batch_of(rows, 3), context(denoiser, rows, draws)).values()
    loss.backward()

    x = student.table.detach().clone().requires_grad_()
    t = draws["student/t"]
    x_t = SD.alpha(t.double())[:, None] * x + SD.sigma(t.double())[:, None] * draws["student/eps"].flatten(1)

    def guide(null, cond, scale):
        return null + scale * (cond - null)

    real = guide(posterior(x_t, t, -0.5, 0.9), posterior(x_t, t, 1.0, 0.3), w)
    fake = guide(posterior(x_t, t, -0.8, 0.6), posterior(x_t, t, 0.2, 1.0), w if guided == "both" else 1.0)
    gap, m = real - fake, (x - real).abs().mean(1, keepdim=True).detach()
    expected = 100 / rows * (gap * ((real - x) - alpha_s * gap) / m).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    (gradient,) = torch.autograd.grad(expected, x)
    torch.testing.assert_close(student.table.grad, gradient, rtol=1e-9, atol=1e-10)


def test_both_networks_are_called_once_with_their_guidance_and_keep_no_weight_gradient():
    student, denoiser = table_setup(4)
    fake = PointNet(3, 1).double()
    denoiser.roles._modules["fake_score"] = fake
    before = denoiser.calls
    terms = sid(guidance_scale=2.0).student_loss(batch_of(4, 3), context(denoiser, 4, table_draws(4)))
    assert denoiser.calls - before == 4 + 2 * 4 + 2 * 4  # student; teacher and fake score with their null rows
    sum(terms.values()).backward(inputs=[student.table])  # as the engine does
    assert student.table.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in fake.parameters())


# The fake score


def test_fake_score_steps_first_on_samples_and_times_of_its_own():
    _, denoiser = gaussian_setup()
    method = sid()
    updates = list(method.updates(0))
    assert [(update.name, update.trains) for update in updates] == [
        ("fake_score", ("fake_score",)),
        ("student", ("student",)),
    ]
    seen, rows = {}, 64
    ctx = context(denoiser, rows)
    normal, integers = ctx.random.fallback.normal, ctx.random.fallback.integers

    def recording(site, low, high):
        seen[site] = (low, high - 1)
        return integers(site, low, high)

    ctx.random.fallback.integers = recording
    ctx.random.fallback.normal = lambda site, *rest: seen.setdefault(site, normal(site, *rest))
    for update in updates:
        update.loss(batch_of(rows, 2), ctx)
    assert seen["critic/t"] == seen["student/t"] == (20, 979)
    assert not torch.equal(seen["critic/student/0"], seen["student/0"])
    assert not torch.equal(seen["critic/eps"], seen["student/eps"])


@pytest.mark.parametrize("cls", [SiD, SiDLSG])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("guided", "w"), [("both", 2.5), ("teacher", 2.5), ("both", 1.0)])
def test_fake_score_is_fitted_through_its_own_guidance_without_some_prompts(cls, kind, guided, w):
    """SiD-LSG weighs a network of v by SNR / (SNR + 1) = alpha^2."""
    rows, eye = 6, torch.eye(3, dtype=torch.float64)
    laws = [(0.2, 1.0), (-0.8, 0.6)]
    own = LabelledGaussians([Gaussian(f64([m] * 3), s * eye) for m, s in laws], kind=kind)
    student = LabelledGaussians([Gaussian(f64([m] * 3), eye) for m in (2.0, -2.0)], kind=kind)
    denoiser = denoiser_of(own, kind=kind, student=student, fake_score=copy.deepcopy(own))
    dropped = torch.tensor([False, True, False, False, True, False])
    generator = torch.Generator().manual_seed(5)
    z, eps = (torch.randn(rows, 3, generator=generator) for _ in range(2))
    t = torch.tensor([20, 300, 500, 700, 979, 100])
    draws = {
        "critic/student/0": spatial(z),
        "critic/eps": spatial(eps),
        "critic/t": t,
        "critic/no_prompt": dropped,
    }
    method = cls(cls.Config(guidance_scale=w, guided=guided))
    (loss,) = method.critic_loss(batch_of(rows, 3), context(denoiser, rows, draws)).values()

    drops = dropped[:, None] & (guided == "both" and w != 1)
    start = torch.full((rows,), 625)
    x = torch.where(drops, posterior(z.double(), start, -2.0, 1.0), posterior(z.double(), start, 2.0, 1.0))
    alpha, sigma = SD.alpha(t.double())[:, None], SD.sigma(t.double())[:, None]
    x_t = alpha * x + sigma * eps
    null = posterior(x_t, t, *laws[1])
    cond = torch.where(drops, null, posterior(x_t, t, *laws[0]))
    clean = null + (w if guided == "both" else 1.0) * (cond - null)
    error = (1 / sigma if cls is SiD and kind == "v_prediction" else alpha / sigma) * (clean - x)
    torch.testing.assert_close(loss, error.square().sum() / rows, rtol=1e-7, atol=1e-9)


def test_prompts_are_dropped_at_the_given_rate():
    rows = 4000
    _, denoiser = gaussian_setup()
    ctx = context(denoiser, rows)
    asked = []
    drop = ctx.random.fallback.bernoulli
    ctx.random.fallback.bernoulli = lambda site, p: asked.append(p) or drop(site, p)
    SiDLSG(SiDLSGConfig()).critic_loss(batch_of(rows, 2), ctx)
    assert asked == [0.1]


@pytest.mark.parametrize("alpha_s", [0.5, 1.0, 1.2])
def test_guided_optimum_of_gaussians_with_one_covariance(alpha_s):
    """The fake score trained through guidance is the student's exact denoiser, so the optimum is that of guided DMD."""
    w, points = 4.0, sigma_points(4)
    values, basis = torch.linalg.eigh(COV)
    root = basis @ values.sqrt().diag() @ basis.T
    teacher = LabelledGaussians([Gaussian(MU, COV), Gaussian(NULL_MU, COV)])
    for shift, vanishes in [(0.0, True), (0.01, False)]:
        student = AffineGenerator(root, NULL_MU + w * (MU - NULL_MU) + shift)
        denoiser = denoiser_of(teacher, student=student, fake_score=OracleFake(student))
        method = SiDLSG(SiDLSGConfig(guidance_scale=w, alpha=alpha_s))
        for t in (20, 500, 979):
            draws = {"student/0": spatial(points[:, :2]), "student/eps": spatial(points[:, 2:])}
            ctx = context(denoiser, len(points), draws | {"student/t": torch.full((len(points),), t)})
            method.student_loss(batch_of(len(points), 2), ctx)["score_identity"].backward()
        largest = max(student.A.grad.abs().max(), student.b.grad.abs().max())
        assert (largest < 1e-10) == vanishes


# The adversarial term


def adversarial_setup(head, w=1.0, rows=6):
    torch.manual_seed(0)
    teacher = AnalyticTeacher.gaussian(MU, COV)
    networks = {"student": PointNet(2, 1), "fake_score": PointNet(2, 1)}
    denoiser = denoiser_of(teacher.network, **networks)
    denoiser.family.feature_tap = "mid_block"
    method = SiDA(SiDAConfig(guidance_scale=w, gan_weight=0.02, gan_discriminator_weight=3.0, gan_head=head))
    modules = method.modules(denoiser)
    latents = torch.randn(rows, 2, 1, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    draws = {"critic/no_prompt": torch.zeros(rows, dtype=torch.bool)}
    return method, denoiser, modules, batch_of(rows, 2, latents), context(denoiser, rows, draws, modules=modules)


def logits_of(denoiser, modules, x_t, t, cond):
    kept = []
    handle = denoiser.roles.network("fake_score").mid_block.register_forward_hook(lambda m, i, o: kept.append(o))
    denoiser(x_t, t, cond, "fake_score")
    handle.remove()
    return modules["discriminator"](kept[0]).double() if modules else kept[0].mean(1).flatten(1)


@pytest.mark.parametrize("w", [1.0, 2.0])
@pytest.mark.parametrize("head", ["channel_mean", "trained"])
def test_adversarial_terms_are_the_published_ones_at_the_scores_noise(head, w):
    method, denoiser, modules, batch, ctx = adversarial_setup(head, w)
    assert bool(modules) == (head == "trained")
    assert method.needs() == "images"
    terms = method.student_loss(batch, ctx)
    x = ctx.store["x"]

    def noised(x, site):
        t = ctx.random.integers(f"{site}/t", 20, 980).float()
        return SD.add_noise(x, ctx.random.normal(f"{site}/eps", (2, 1, 1)), t), t

    x_t, t = noised(x, "student")
    real = denoiser(x_t, t, batch.cond, "teacher", batch.null, w).x0
    m = (x - real).abs().flatten(1).mean(1)
    fooling = softplus(-logits_of(denoiser, modules, x_t, t, batch.cond)).mean()
    torch.testing.assert_close(terms["gan"], 0.02 * 2 * (1 / m).mean() * fooling, rtol=1e-6, atol=1e-8)
    plain = SiD(SiDConfig(guidance_scale=w, alpha=1.0)).student_loss(batch, ctx)
    torch.testing.assert_close(terms["score_identity"], plain["score_identity"], rtol=1e-9, atol=1e-10)

    terms = method.critic_loss(batch, ctx)
    x = method.critic_sample(batch, ctx)
    fake, t = noised(x, "critic")
    real, _ = noised(batch.latents, "critic")
    logits = [logits_of(denoiser, modules, one, t, batch.cond) for one in (fake, real)]
    expected = 1.5 * (softplus(logits[0]).mean() + softplus(-logits[1]).mean())
    torch.testing.assert_close(terms["discriminator"].double(), expected, rtol=1e-6, atol=1e-8)
    plain = SiD(SiDConfig(guidance_scale=w)).critic_loss(batch, ctx)
    torch.testing.assert_close(terms["denoising"], plain["denoising"], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("head", ["channel_mean", "trained"])
def test_who_learns_from_which_term(head):
    method, denoiser, modules, batch, ctx = adversarial_setup(head)
    critic, turn = method.updates(0)
    groups = ("fake_score", "discriminator") if head == "trained" else ("fake_score",)
    assert critic.trains == groups and turn.trains == ("student",)
    student, fake = denoiser.roles.parameters("student"), denoiser.roles.parameters("fake_score")
    heads = [p for module in modules.values() for p in module.parameters()]
    terms = turn.loss(batch, ctx)
    for term in terms.values():
        through = torch.autograd.grad(term, student[:1], retain_graph=True)[0]
        assert through.abs().max() > 0
    sum(terms.values()).backward(inputs=student)
    assert all(p.grad is None for p in fake + heads)
    discriminator = critic.loss(batch, ctx)["discriminator"]
    discriminator.backward(inputs=fake + heads)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in fake)
    assert all(p.grad is not None for p in heads)


def test_logits_are_bounded_for_the_student():
    method, denoiser, _, batch, ctx = adversarial_setup("channel_mean")
    with torch.no_grad():
        denoiser.roles.network("fake_score").mid_block[1].bias += 1e3
    term = method.student_loss(batch, ctx)["gan"]
    (gradient,) = torch.autograd.grad(term, denoiser.roles.parameters("student")[:1])
    assert torch.isfinite(term) and gradient.abs().max() == 0


# Real networks


def tiny_setup(unet, checkpointing):
    from fastdiff.models.denoiser import Denoiser
    from fastdiff.models.families import StableDiffusion
    from fastdiff.models.roles import AdapterSpec, Roles

    spec = AdapterSpec(4, 4.0, ("to_q", "to_v", "conv1"))
    torch.manual_seed(0)
    roles = Roles(unet, {"student": spec, "fake_score": spec}, checkpointing)
    for role in ("student", "fake_score"):
        for parameter in roles.parameters(role):
            torch.nn.init.normal_(parameter, std=0.05)
    denoiser = Denoiser(roles, StableDiffusion(), SD, "epsilon")
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(3, 16, 16, generator=generator)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    cond, null = (Conditioning({"prompt_embeds": rows}) for rows in (embeds[:-1], embeds[-1:]))
    return denoiser, Batch(torch.arange(2), cond, null, (4, 16, 16), latents)


def test_checkpointing_changes_no_gradient_of_the_twice_differentiated_scores(tiny_sd):
    """The graph of a student's step holds three roles of one network: each is recomputed as itself."""
    method = SiDA(SiDAConfig(guidance_scale=2.0, gan_head="trained"))
    found = []
    for checkpointing in (False, True):
        denoiser, batch = tiny_setup(copy.deepcopy(tiny_sd.unet), checkpointing)
        torch.manual_seed(1)
        ctx = context(denoiser, 2, modules=method.modules(denoiser))
        gradients = {}
        for update in method.updates(0):
            trained = [p for g in update.trains if g not in ctx.modules for p in denoiser.roles.parameters(g)]
            sum(update.loss(batch, ctx).values()).backward(inputs=trained)
            gradients[update.name] = [p.grad.clone() for p in trained]
            others = {"student", "fake_score"} - set(update.trains)
            if update.name == "fake_score":
                assert all(p.grad is None for role in others for p in denoiser.roles.parameters(role))
        trainable = {id(p) for role in ("student", "fake_score") for p in denoiser.roles.parameters(role)}
        assert all(p.grad is None for p in denoiser.roles.base.parameters() if id(p) not in trainable)
        found.append(gradients)
    for name in ("student", "fake_score"):
        assert max(gradient.abs().max() for gradient in found[0][name]) > 0
        for one, other in zip(found[0][name], found[1][name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * found[0][name][0].abs().max().item() + 1e-7)


def test_adapters_on_one_base_train_and_leave_the_teacher_as_it_was(tmp_path, tiny_sdxl):
    method = SiDA(SiDAConfig(guidance_scale=2.0, prompt_dropout=0.5))
    before = frozen_weights(tiny_sdxl)
    trainer = tiny_trainer(method, tiny_sdxl, tmp_path, max_train_steps=2, gradient_checkpointing=True)
    old = {role: [p.detach().clone() for p in trainer.networks.roles.parameters(role)] for role in trainer.optimizers}
    assert set(old) == {"student", "fake_score"}
    assert trainer.train() == "done"
    for role, parameters in old.items():
        assert max((a - b).abs().max() for a, b in zip(trainer.networks.roles.parameters(role), parameters)) > 0
    after = frozen_weights(tiny_sdxl)
    assert before.keys() <= after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_dropped_prompt_is_the_null_row_in_every_tensor():
    generator = torch.Generator().manual_seed(0)

    def bundle(rows):
        shapes = {"prompt_embeds": (5, 8), "pooled_prompt_embeds": (8,), "time_ids": (6,)}
        return Conditioning({name: torch.randn(rows, *shape, generator=generator) for name, shape in shapes.items()})

    batch = Batch(torch.arange(3), bundle(3), bundle(1), (4, 2, 2))
    dropped = without_prompts(batch, torch.tensor([True, False, True]))
    for name, tensor in dropped.cond.tensors.items():
        null, cond = batch.null.tensors[name][0], batch.cond.tensors[name]
        torch.testing.assert_close(tensor, torch.stack([null, cond[1], null]), rtol=0, atol=0)


@pytest.mark.parametrize("method", [sid(), SiDLSG(SiDLSGConfig()), SIM(SIMConfig())], ids=lambda m: m.info.name)
def test_trains_through_the_engine(tmp_path, method):
    settings = Settings(
        output_dir=str(tmp_path),
        max_train_steps=2,
        train_batch_size=4,
        student="full",
        fake_score="full",
        report_to="none",
    )
    trainer = Trainer(method, AnalyticTeacher.gaussian(MU, COV), PromptData(["a sample"] * 8), settings)
    before = {r: [p.detach().clone() for p in trainer.networks.roles.parameters(r)] for r in ("student", "fake_score")}
    assert trainer.train() == "done"
    for role, old in before.items():
        assert max((a - b).abs().max() for a, b in zip(trainer.networks.roles.parameters(role), old)) > 0


# Settings


@pytest.mark.parametrize(
    ("config", "values", "named"),
    [
        (SiDConfig, {"distance": "l1"}, "alpha 1.2 belongs to the squared distance: l1 has only"),
        (SiDConfig, {"distance": "pseudo_huber"}, "alpha 1.2 belongs to the squared distance"),
        (SiDConfig, {"alpha": -1.0}, "alpha"),
        (SiDConfig, {"prompt_dropout": 1.0}, "prompt_dropout"),
        (SiDConfig, {"loss_scale": 0.0}, "loss_scale"),
        (SIMConfig, {"huber_c": 0.0}, "huber_c"),
        (SiDAConfig, {"gan_weight": 0.0}, "that method, which needs no images"),
    ],
)
def test_bad_settings_are_named(config, values, named):
    with pytest.raises(ValueError, match=named):
        config(**values)


def test_names_carry_their_papers_defaults():
    assert SiDConfig() == SiDConfig(alpha=1.2, loss_scale=100.0, guidance_scale=1.0, timesteps=(625,))
    assert SiDLSGConfig(distance="l2", gan_weight=0.0).alpha == SiDAConfig().alpha == 1.0
    assert SIMConfig().distance == "pseudo_huber"
    assert SiDLSG(SiDLSGConfig()).needs() == "prompts"
    assert sid(gan_weight=0.01).needs() == "images"  # the adversarial term is an option of all of them


# Convergence


def anneal(parameters, rate, steps):
    optimizer = torch.optim.Adam(parameters, lr=rate)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


@pytest.mark.parametrize(
    "config",
    [
        {"alpha": 1.2},
        pytest.param({"alpha": 0.5}, marks=pytest.mark.slow),
        pytest.param({"distance": "pseudo_huber", "alpha": 1.0}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_converges_to_the_teachers_law_with_an_exact_fake_score(config):
    steps = 250
    student, denoiser = gaussian_setup()
    optimizer, decay = anneal(student.parameters(), 5e-2, steps)
    rule = StudentOnly(SiDConfig(**config))
    run(rule, denoiser, {"student": optimizer}, batch_of(32, 2), steps, lambda step: decay.step())
    assert (student.b - MU).abs().max() < 1e-3
    assert (student.A @ student.A.T - COV).abs().max() < 1e-3


class StudentOnly(SiD):
    def updates(self, step):
        yield from [update for update in super().updates(step) if update.name == "student"]


@pytest.mark.slow
def test_converges_with_a_learned_fake_score():
    """An affine fake score with ten time bins, trained beside the student; the bins leave an error of a few percent."""
    student, steps = AffineGenerator(A, B), 1000
    fake = AffinePerBin(2, [50 + 100 * k for k in range(10)])
    denoiser = denoiser_of(ExactNetwork(Gaussian(MU, COV), SD, "epsilon"), student=student, fake_score=fake)
    batch, rule = batch_of(128, 2), sid(alpha=1.0)
    warm, _ = anneal(fake.parameters(), 2e-2, 1)
    for step in range(150):
        loss = rule.critic_loss(batch, context(denoiser, len(batch), step=step, seed=1))["denoising"]
        loss.backward(inputs=list(fake.parameters()))
        warm.step()
        warm.zero_grad()
    (one, a), (two, b) = anneal(student.parameters(), 1e-2, steps), anneal(fake.parameters(), 2e-2, steps)
    run(rule, denoiser, {"student": one, "fake_score": two}, batch, steps, lambda step: (a.step(), b.step()))
    assert (student.A @ student.A.T - COV).abs().max() < 0.06
    assert (student.b - MU).abs().max() < 0.06
