"""Phased DMD (arXiv 2510.27684): the fixed point of a phase in closed form, rollouts through experts, and plain DMD2."""

from __future__ import annotations

import pytest
import torch
from adversarial_cases import GOLD, SCENARIOS, Laboratory, tiny_trainer, weights_of
from method_helpers import (
    SD,
    AffineGenerator,
    batch_of,
    context,
    denoiser_of,
    f64,
    run,
    sigma_points,
    spatial,
)
from torch import nn

from fastdiff.data.source import PromptData
from fastdiff.diffusion import FlowSchedule, Gaussian, Prediction
from fastdiff.engine import Settings, Trainer
from fastdiff.methods import DMD2, DMD2Config, PhasedDMD, PhasedDMDConfig
from fastdiff.models.analytic import AnalyticTeacher, ExactNetwork
from fastdiff.recipes.starting import start_from

MU, COV = f64([0.7, -0.4]), f64([[0.64, 0.2], [0.2, 0.5]])
FLOW = FlowSchedule(shift=3.0)
PROCESSES = {"vp": (SD, "epsilon"), "flow": (FLOW, "flow")}
EYE = torch.eye(2).double()


def method(**config) -> PhasedDMD:
    return PhasedDMD(PhasedDMDConfig(**{"guidance_scale": 1.0} | config))


@pytest.fixture(params=PROCESSES)
def process(request):
    return PROCESSES[request.param]


def root(cov):
    values, basis = torch.linalg.eigh(cov)
    return basis @ values.sqrt().diag() @ basis.T


def levels(schedule, index):
    """(alpha, sigma) at an index, float64; times are drawn in float32."""
    time = schedule.time_of_index(torch.tensor(float(index))).double()
    return schedule.alpha(time), schedule.sigma(time)


def boundary(schedule, index=499):
    """(alpha, sigma, the factor by which x_s moves with x0) of a one-step phase from 999 to `index`."""
    (alpha_in, sigma_in), (alpha, sigma) = levels(schedule, 999), levels(schedule, index)
    return alpha, sigma, alpha - sigma * alpha_in / sigma_in


class KernelFake(nn.Module):
    """The exact denoiser at t of x_t = r x_s + q eps where x_s is N(mean, cov)."""

    def __init__(self, mean, cov, schedule, kind, index=499):
        super().__init__()
        self.mean, self.cov, self.schedule, self.kind = mean, cov, schedule, kind
        self.levels = levels(schedule, index)
        self.register_buffer("anchor", torch.zeros((), dtype=torch.float64))

    def forward(self, x_t, time, labels):
        t = time / 1000 if isinstance(self.schedule, FlowSchedule) else time
        flat = x_t.flatten(1)
        alpha, sigma = self.schedule.levels(t, flat)
        kept = alpha / self.levels[0]
        law = kept[:, :, None] ** 2 * (self.cov - self.levels[1] ** 2 * EYE) + sigma[:, :, None] ** 2 * EYE
        score = -torch.linalg.solve(law, (flat - kept * self.mean)[:, :, None]).squeeze(-1)
        x0 = (flat + sigma**2 * score) / alpha
        return Prediction.from_x0(x0, flat, t, self.schedule).as_kind(self.kind).reshape(x_t.shape)


def phase_setup(mean, factor, process):
    """A one-step first phase (999 to 499) whose sample is exactly `factor z + mean`, with its exact fake score."""
    schedule, kind = process
    _, sigma, moves = boundary(schedule)
    _, sigma_in = levels(schedule, 999)
    student = AffineGenerator((factor - sigma / sigma_in * EYE) / moves, mean / moves, schedule, kind)
    fake = KernelFake(mean, factor @ factor.T, schedule, kind)
    base = ExactNetwork(Gaussian(MU, COV), schedule, kind)
    return student, denoiser_of(base, schedule, kind, student=student, fake_score=fake)


ONE_STEP_PHASES = {"timesteps": (999, 499), "phase_steps": (1, 1)}


def draws(points, schedule, index):
    t = schedule.time_of_index(torch.full((len(points),), float(index)))
    return {"student/0": spatial(points[:, :2]), "student/eps": spatial(points[:, 2:])}, t


def loss_at(rule, denoiser, schedule, index, monkeypatch, points=None):
    points = sigma_points(4) if points is None else points
    given, t = draws(points, schedule, index)
    monkeypatch.setattr("fastdiff.methods.phased_dmd.any_time", lambda *args: t)
    (term,) = rule.student_loss(batch_of(len(points), 2), context(denoiser, len(points), given)).values()
    return term


# The fixed point of a phase


@pytest.mark.parametrize("form", ["x0", "x_s"])
@pytest.mark.parametrize("index", [520, 700, 980])
def test_gradient_vanishes_exactly_where_the_phase_has_the_teachers_noisy_law(process, form, index, monkeypatch):
    """C_s = alpha_s^2 S + sigma_s^2 I and m_s = alpha_s mu."""
    alpha, sigma, _ = boundary(process[0])
    for shift, vanishes in [(0.0, True), (0.01, False)]:
        student, denoiser = phase_setup(alpha * MU + shift, root(alpha**2 * COV + sigma**2 * EYE), process)
        loss_at(method(gradient_on=form, **ONE_STEP_PHASES), denoiser, process[0], index, monkeypatch).backward()
        largest = max(student.A.grad.abs().max(), student.b.grad.abs().max()).item()
        assert (largest < 1e-11) == vanishes, largest


@pytest.mark.parametrize("index", [520, 700, 980])
def test_expected_gradient_of_a_phase_is_that_of_the_divergence(process, index, monkeypatch):
    """d/db_s = r^2 Sigma_r^-1 (b_s - alpha_s mu), d/dB = r^2 (Sigma_r^-1 - Sigma_f^-1) B, times the factor from x0."""
    schedule = process[0]
    alpha_s, sigma_s, moves = boundary(schedule)
    alpha, sigma = levels(schedule, index)
    mean, factor = f64([-0.2, 0.5]), f64([[1.1, 0.3], [-0.2, 0.9]])
    student, denoiser = phase_setup(mean, factor, process)
    rule = method(gradient_on="x_s", **ONE_STEP_PHASES)
    (2 * loss_at(rule, denoiser, schedule, index, monkeypatch)).backward()
    r = alpha / alpha_s
    real = torch.linalg.inv(alpha**2 * COV + sigma**2 * EYE)
    fake = torch.linalg.inv(r**2 * factor @ factor.T + (sigma**2 - r**2 * sigma_s**2) * EYE)
    torch.testing.assert_close(student.b.grad, moves * r**2 * real @ (mean - alpha_s * MU), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(student.A.grad, moves * r**2 * (real - fake) @ factor, rtol=1e-8, atol=1e-10)


def test_both_forms_pull_the_same_way_since_x_s_moves_with_x0(process, monkeypatch):
    schedule, kind = process
    _, _, moves = boundary(schedule)
    student, denoiser = phase_setup(f64([-0.2, 0.5]), f64([[1.1, 0.3], [-0.2, 0.9]]), process)
    rule = method(**ONE_STEP_PHASES)
    ctx = context(denoiser, 3)
    x0 = rule._rollout(batch_of(3, 2), ctx, with_grad=True).x0
    x_s = rule.sample(batch_of(3, 2), ctx, with_grad=True)
    (by_x0,), (by_x_s,) = torch.autograd.grad(x0.sum(), student.A), torch.autograd.grad(x_s.sum(), student.A)
    torch.testing.assert_close(by_x_s, moves * by_x0, rtol=1e-12, atol=1e-12)
    if kind == "flow":  # the published factor: (t_in - s) / t_in
        s = FLOW.time_of_index(torch.tensor(499.0)).double()
        torch.testing.assert_close(moves, 1 - s, rtol=1e-12, atol=1e-12)
    assert moves > 0
    grads = []
    for form in ("x0", "x_s"):  # for a single sample the two differ by a positive number
        point = torch.tensor([[0.5, -1.0, 0.25, 2.0]])
        term = loss_at(method(gradient_on=form, **ONE_STEP_PHASES), denoiser, schedule, 700, monkeypatch, point)
        (grad,) = torch.autograd.grad(term, student.b)
        grads.append(grad / grad.norm())
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


# The fake score


@pytest.mark.parametrize("weight", ["clamped", "none"])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_fake_score_loss_is_stationary_at_the_exact_denoiser_of_the_phase(kind, weight, monkeypatch):
    schedule, index = SD, 600
    alpha_s, sigma_s, _ = boundary(schedule)
    alpha, sigma = levels(schedule, index)
    mean, factor = f64([-0.2, 0.5]), f64([[1.1, 0.3], [-0.2, 0.9]])
    student, _ = phase_setup(mean, factor, (schedule, kind))
    r = alpha / alpha_s
    law = r**2 * (factor @ factor.T - sigma_s**2 * EYE) + sigma**2 * EYE
    gain = (EYE - sigma**2 * torch.linalg.inv(law)) / alpha  # x0 = (x + sigma^2 score) / alpha
    fake = AffineGenerator(gain, sigma**2 / alpha * torch.linalg.solve(law, r * mean), kind=kind)
    base = ExactNetwork(Gaussian(MU, COV), schedule, kind)
    denoiser = denoiser_of(base, schedule, kind, student=student, fake_score=fake)
    points = sigma_points(4)
    given = {"student/0": spatial(points[:, :2]), "critic/eps": spatial(points[:, 2:])}
    given["critic/t"] = torch.full((len(points),), index)
    rule = method(critic_weight=weight, **ONE_STEP_PHASES)
    loss = rule.critic_loss(batch_of(len(points), 2), context(denoiser, len(points), given))["denoising"]
    loss.backward()
    assert max(fake.A.grad.abs().max(), fake.b.grad.abs().max()) < 1e-11
    assert student.A.grad is None

    # Taking the phase's sample for clean, the same loss pulls the exact denoiser away.
    from fastdiff.diffusion import prediction_target

    def naive(kind, schedule, x_s, s, eps, t):
        return prediction_target(kind, schedule, x_s, eps, t)

    monkeypatch.setattr("fastdiff.methods.phased_dmd.transition_target", naive)
    loss = rule.critic_loss(batch_of(len(points), 2), context(denoiser, len(points), given))["denoising"]
    loss.backward()
    assert max(fake.A.grad.abs().max(), fake.b.grad.abs().max()) > 1e-2


def test_the_clamped_weight():
    """clamp(1/q^2, 0, 10) q^2: below 1 only next to the boundary."""
    _, denoiser = phase_setup(f64([0.0, 0.0]), EYE, (SD, "epsilon"))
    for index, clamped in [(500, True), (520, True), (900, False)]:
        given = {"critic/t": torch.full((3,), index)}
        terms = [
            method(critic_weight=weight, **ONE_STEP_PHASES).critic_loss(batch_of(3, 2), context(denoiser, 3, given))
            for weight in ("clamped", "none")
        ]
        ratio = (terms[0]["denoising"] / terms[1]["denoising"]).item()
        (alpha, sigma), (alpha_s, sigma_s) = levels(SD, index), levels(SD, 499)
        q2 = (sigma**2 - (alpha / alpha_s * sigma_s) ** 2).item()
        assert ratio == pytest.approx(min(1 / q2, 10) * q2, rel=1e-5)
        assert (ratio < 1) == clamped


def test_times_lie_above_the_end_of_the_phase():
    seen = {}
    for phase in (1, 2):
        rule = method(phase=phase)
        denoiser = denoiser_of(
            ExactNetwork(Gaussian(MU, COV), SD, "epsilon"),
            **{role: AffineGenerator(EYE, MU) for role in ("student", "fake_score", "expert_1")},
        )
        ctx = context(denoiser, 4)
        inner = ctx.random.fallback.integers
        ctx.random.fallback.integers = lambda site, low, high: (
            seen.update({(phase, site): (low, high)}) or inner(site, low, high)  # noqa: B023
        )
        rule.student_loss(batch_of(4, 2), ctx)
        rule.critic_loss(batch_of(4, 2), ctx)
    assert seen == {
        (1, "student/t"): (519, 981),
        (1, "critic/t"): (500, 1000),
        (2, "student/t"): (20, 981),
        (2, "critic/t"): (0, 1000),
    }


# Rollouts through experts


@pytest.mark.parametrize("step", [0, 1])
def test_rollout_runs_through_the_frozen_experts_and_jumps_to_the_end(process, step):
    """Phase 2 of 2: Euler through expert 1 to 499, through the student to a random time, then to clean."""
    schedule, kind = process
    teacher = ExactNetwork(Gaussian(MU, COV), schedule, kind)
    expert, student = AffineGenerator(0.7 * EYE, MU, schedule, kind), AffineGenerator(EYE, -MU, schedule, kind)
    denoiser = denoiser_of(teacher, schedule, kind, student=student, fake_score=student, expert_1=expert)
    rule, batch = method(phase=2), batch_of(3, 2)
    ctx = context(denoiser, 3, {"student/step": step})
    before = denoiser.calls
    x = rule.sample(batch, ctx, with_grad=True)
    assert denoiser.calls - before == 3 * (3 + step)

    x_t = ctx.random.normal("student/0", (2, 1, 1)).flatten(1).double()
    times = [999, 749, 499, 249][: 3 + step]
    for here, there, net in zip(times, times[1:], [expert, expert, student], strict=False):
        (alpha, sigma), (alpha_s, sigma_s) = levels(schedule, here), levels(schedule, there)
        x0 = x_t @ net.A.T + net.b
        x_t = alpha_s * x0 + sigma_s * (x_t - alpha * x0) / sigma
    torch.testing.assert_close(x.flatten(1), x_t @ student.A.T + student.b, rtol=1e-9, atol=1e-9)
    x.sum().backward()
    assert expert.A.grad is None
    torch.testing.assert_close(student.A.grad, x_t.detach().sum(0).expand(2, 2), rtol=1e-9, atol=1e-9)


def test_a_phase_ends_at_its_boundary_whatever_step_is_drawn():
    """From any of its times the exact student of one point lands on alpha_s mu + sigma_s eps."""
    denoiser = denoiser_of(
        ExactNetwork(Gaussian(MU, COV), SD, "epsilon"),
        student=AffineGenerator(0 * EYE, MU),
        fake_score=AffineGenerator(EYE, MU),
    )
    alpha_s, sigma_s = levels(SD, 499)
    for step in (0, 1):
        ctx = context(denoiser, 3, {"student/step": step})
        x = method().sample(batch_of(3, 2), ctx, with_grad=False).flatten(1)
        z = ctx.random.normal("student/0", (2, 1, 1)).flatten(1).double()
        alpha, sigma = levels(SD, 999)
        torch.testing.assert_close(x, alpha_s * MU + sigma_s * (z - alpha * MU) / sigma, rtol=1e-9, atol=1e-9)
        assert not x.requires_grad


def test_steps_are_served_by_experts_up_to_the_newest():
    config = {"phase_steps": (1, 2, 1)}
    assert method(**config).experts() == ("student",) * 4
    assert method(phase=2, **config).experts() == ("expert_1", "student", "student", "student")
    assert method(phase=3, **config).experts() == ("expert_1", "expert_2", "expert_2", "student")
    assert method(phase=3, **config).sampler().timesteps == (999, 749, 499, 249)
    assert method(phase=3, **config).frozen() == {"expert_1": "student", "expert_2": "student"}


# Plain DMD2


def trainer_of(rule, folder, steps=4, **settings) -> Trainer:
    defaults = {
        "output_dir": str(folder),
        "max_train_steps": steps,
        "train_batch_size": 4,
        "student": "full",
        "fake_score": "full",
        "learning_rate": 1e-2,
        "report_to": "none",
    }
    teacher = AnalyticTeacher.gaussian(MU, COV)
    return Trainer(rule, teacher, PromptData(["a sample"] * 6), Settings(**(defaults | settings)))


def test_one_phase_of_one_step_is_dmd2_to_the_bit(tmp_path):
    common = {"timesteps": (999,), "student_update_every": 2, "guidance_scale": 1.0}
    phased = PhasedDMD(PhasedDMDConfig(phase_steps=(1,), critic_weight="none", **common))
    trainers = [trainer_of(phased, tmp_path / "a"), trainer_of(DMD2(DMD2Config(**common)), tmp_path / "b")]
    for trainer in trainers:
        trainer.train()
    for role in ("student", "fake_score"):
        pairs = zip(*(trainer.networks.roles.parameters(role) for trainer in trainers), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


# Phase after phase


def test_the_next_phase_takes_experts_and_starts_afresh(tmp_path):
    config = {"timesteps": (999, 749, 499), "phase_steps": (1, 1, 1), "student_update_every": 1}
    first = trainer_of(method(**config), tmp_path / "1")
    first.train()
    second = trainer_of(method(phase=2, **config), tmp_path / "2", ema_decay=0.5)
    untrained = {role: second.networks.roles.state_dict(role) for role in ("student", "fake_score")}
    untrained = {role: {n: t.clone() for n, t in state.items()} for role, state in untrained.items()}
    start_from(second, str(tmp_path / "1"))
    roles = second.networks.roles

    def same(state, other):
        return all(torch.equal(state[name], other[name]) for name in state)

    expert = {name: t.clone() for name, t in roles.state_dict("expert_1").items()}
    assert same(expert, first.networks.roles.state_dict("student"))
    assert all(same(roles.state_dict(role), untrained[role]) for role in untrained)
    second.train()
    assert same(expert, roles.state_dict("expert_1"))  # frozen
    assert not same(roles.state_dict("student"), untrained["student"])

    third = trainer_of(method(phase=3, **config), tmp_path / "3")
    start_from(third, str(tmp_path / "2"))
    roles = third.networks.roles
    assert same(roles.state_dict("expert_1"), expert)
    averaged = second.student.average_tensors()  # what phase 2 exported
    assert all(torch.equal(p, averaged[str(i)]) for i, p in enumerate(roles.parameters("expert_2")))
    assert not same(roles.state_dict("expert_2"), second.networks.roles.state_dict("student"))


def test_a_later_phase_needs_the_earlier_run(tmp_path):
    config = {"timesteps": (999, 749, 499), "phase_steps": (1, 1, 1)}
    with pytest.raises(ValueError, match="expert_1: give that run's folder as --init_from"):
        start_from(trainer_of(method(phase=2, **config), tmp_path / "2"), None)
    trainer_of(method(**config), tmp_path / "1", steps=1).train()
    with pytest.raises(FileNotFoundError, match="holds no expert_1, which the role expert_1"):
        start_from(trainer_of(method(phase=3, **config), tmp_path / "3"), str(tmp_path / "1"))


def test_resuming_a_later_phase_keeps_its_experts(tmp_path):
    config = {"timesteps": (999, 499), "phase_steps": (1, 1), "student_update_every": 1}
    first = trainer_of(method(**config), tmp_path / "1", steps=2)
    first.train()
    second = trainer_of(method(phase=2, **config), tmp_path / "2", steps=2)
    start_from(second, str(tmp_path / "1"))
    second.train()
    again = trainer_of(method(phase=2, **config), tmp_path / "2", steps=2, resume_from_checkpoint="latest")
    again.train()
    pairs = zip(again.networks.roles.parameters("expert_1"), first.networks.roles.parameters("student"), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"phase_steps": (2, 1)}, "phase_steps"),
        ({"phase_steps": (4, 0)}, "phase_steps"),
        ({"phase": 3}, "phase 3 does not exist"),
        ({"phase": 0}, "phase"),
        ({"multi_step_input": "noised_data"}, "multi_step_input"),
        ({"boundary_margin": 500}, "no time up to max_timestep"),
        ({"student_width": 0.5}, "no smaller student"),
        ({"divergence": "js"}, "or the divergence rkl"),
        ({"divergence": "js", "gan_weight": 1e-3, "gan_loss": "hinge"}, "use softplus"),
    ],
)
def test_bad_settings_are_named(config, named):
    with pytest.raises(ValueError, match=named):
        method(**config)


# Other divergences


ONE_PHASE = {"timesteps": (999,), "phase_steps": (1,), "gan_weight": 1e-3, "gan_features": "teacher"}
WIDE = {"ratio_min": 1e-300, "ratio_max": 1e300}


@pytest.mark.parametrize("form", ["x0", "x_s"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_gradients_of_divergences_with_the_exact_ratio(monkeypatch, scenario, form):
    """With one phase of one step the phase's sample is clean; golden numbers of the divergences themselves."""
    alpha, sigma, _ = SCENARIOS[scenario]
    monkeypatch.setattr("fastdiff.methods._score_gap.dmd_normaliser", lambda x, real: sigma**2 / alpha**2)
    laboratory = Laboratory(scenario, "student")
    laboratory.ctx.global_mean = torch.ones_like  # leaves h as it is
    for name, gold in GOLD[scenario].items():
        rule = method(divergence=name, gradient_on=form, **ONE_PHASE, **({} if name == "rkl" else WIDE))
        terms = rule.student_loss(laboratory.batch, laboratory.ctx)
        assert laboratory.derivatives(terms["distribution_matching"]) == pytest.approx(gold, abs=1e-10), name


@pytest.mark.parametrize("form", ["x0", "x_s"])
def test_logits_that_say_nothing_leave_a_phase_as_it_is_and_others_do_not(process, form):
    student, denoiser = phase_setup(MU, root(COV), process)
    found = {}
    for divergence, logits in [
        ("rkl", None),
        ("js", torch.full((6, 1), 0.7)),
        ("fkl", torch.linspace(-1, 1, 6)[:, None]),
    ]:
        gan = {} if logits is None else {"gan_weight": 1e-3, "gan_features": "teacher"}
        rule = method(divergence=divergence, gradient_on=form, **ONE_STEP_PHASES, **gan)
        ctx = context(denoiser, 6, modules={"discriminator": lambda *features, own=logits: own.double()})
        loss = rule.student_loss(batch_of(6, 2), ctx)["distribution_matching"]
        found[divergence] = torch.autograd.grad(loss, student.A)[0]
    torch.testing.assert_close(found["js"], found["rkl"], rtol=1e-12, atol=0)
    assert not torch.allclose(found["fkl"], found["rkl"], rtol=1e-2)


def test_heads_are_shown_samples_noised_on_and_images_noised_as_much(process):
    schedule = process[0]
    _, denoiser = phase_setup(MU, root(COV), process)
    rule, x = method(gan_weight=1e-3, divergence="js", **ONE_STEP_PHASES), torch.randn(64, 2, 1, 1).double()
    ctx = context(denoiser, 64)
    fake, real = (rule.judged(x, ctx, "site", fake=side) for side in (True, False))
    assert torch.equal(fake.t, real.t) and fake.t.min() > schedule.time_of_index(torch.tensor(499.0))
    eps = ctx.random.normal("site/eps", x.shape[1:])
    start = schedule.time_of_index(torch.full((64,), 499.0))
    torch.testing.assert_close(fake.x_t, schedule.transition(x, start, fake.t, eps))
    torch.testing.assert_close(real.x_t, schedule.add_noise(x, eps, real.t))


@pytest.mark.parametrize("features", ["fake_score", "teacher"])
def test_adapters_are_trained_by_another_divergence(tiny_sd, tmp_path, features):
    config = {"divergence": "js", "gan_weight": 1e-3, "gan_discriminator_weight": 1.0, "gan_features": features}
    rule = method(**config, time_bins=4, time_bins_decay=0.75, student_update_every=2, **ONE_STEP_PHASES)
    assert rule.needs() == "images"
    trainer = tiny_trainer(rule, tiny_sd, tmp_path)
    before = weights_of(trainer)
    assert trainer.train() == "done"
    after = weights_of(trainer)
    groups = {name.split("/")[0] for name in before if name in after and not torch.equal(before[name], after[name])}
    assert {"student", "fake_score", "discriminator"} <= groups
    assert rule.state_dict()["ratio_means"].any()


# Convergence


class PhaseOracle(nn.Module):
    """The exact fake score of a first phase of one step, whatever its student is now."""

    def __init__(self, student):
        super().__init__()
        self.student = (student,)
        self.register_buffer("anchor", torch.zeros((), dtype=torch.float64))

    def forward(self, x_t, time, labels):
        (student,) = self.student
        _, sigma, moves = boundary(SD)
        factor = moves * student.A.detach() + sigma / levels(SD, 999)[1] * EYE
        return KernelFake(moves * student.b.detach(), factor @ factor.T, SD, "epsilon")(x_t, time, labels)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["x0", "x_s"])
def test_a_phase_converges_to_the_teachers_noisy_law(form):
    torch.manual_seed(0)
    student, steps = AffineGenerator(f64([[1.1, 0.3], [-0.2, 0.8]]), f64([-0.2, 0.5])), 400
    base = ExactNetwork(Gaussian(MU, COV), SD, "epsilon")
    denoiser = denoiser_of(base, student=student, fake_score=PhaseOracle(student))
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rule = method(gradient_on=form, student_update_every=1, **ONE_STEP_PHASES)
    run(rule, denoiser, {"student": optimizer}, batch_of(64, 2), steps, lambda step: decay.step())
    alpha, sigma, moves = boundary(SD)
    factor = moves * student.A + sigma / levels(SD, 999)[1] * EYE
    assert (moves * student.b - alpha * MU).abs().max() < 2e-3
    assert (factor @ factor.T - alpha**2 * COV - sigma**2 * EYE).abs().max() < 2e-3
