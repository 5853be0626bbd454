"""TCM (arXiv 2410.14895): step lengths, the truncation's two sides, times, order at the exact map, who learns."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from flow_map_helpers import LAW, PROCESSES, ConsistencyNetwork, Latents, sd_batch, settings, teacher_network
from method_helpers import SD, CleanMap, batch_of, context, denoiser_of, f64, settle, spatial
from torch import nn
from trajectory_helpers import FLOW, MU, S, data, gaussian_denoiser

from fastdiff.diffusion import FlowSchedule, jump
from fastdiff.engine import Trainer
from fastdiff.engine.networks import build_networks
from fastdiff.methods import LCM, LCMConfig
from fastdiff.methods.tcm import TCM, TCMConfig, heavy_tailed
from fastdiff.models.analytic import AnalyticTeacher
from fastdiff.models.analytic_networks import AffinePerBin, PointNet
from fastdiff.models.teacher import Teacher


def method(**config) -> TCM:
    return TCM(TCMConfig(**config))


def test_steps_keep_the_published_share_of_the_noise():
    """q = 2 at kappa = .1, 1, 5, 80."""
    kappa = f64([0.1, 1.0, 5.0, 80.0])
    golden = {0: [0, 0, 0.473, 0.5], 3: [0.700, 0.803, 0.934, 0.9375], 7: [0.981, 0.988, 0.9959, 0.9961]}
    for stage, shares in golden.items():
        found = method(step_base=2.0, step_stage=stage, longest_kept=0.9999).kept(kappa)
        assert found.tolist() == pytest.approx(shares, abs=5e-4)
    assert (method(step_base=2.0, step_stage=12, longest_kept=0.99).kept(kappa) == 0.99).all()


def test_steps_shorten_with_every_stage_and_with_noise():
    kappa = torch.linspace(0.05, 80, 200, dtype=torch.float64)
    shares = torch.stack([method(step_stage=a, longest_kept=0.9999).kept(kappa) for a in range(6)])
    assert (shares.diff(dim=0) >= 0).all() and (shares.diff(dim=1) >= 0).all()


@pytest.mark.parametrize(("stage", "golden"), [(0, 0.426), (1, 0.507), (2, 0.614), (3, 0.660), (5, 0.690), (7, 0.698)])
def test_early_stages_lose_variance_that_later_ones_keep(stage, golden):
    """Deviation of one-step samples from sigma 80 at the optimum: the teacher's steps from there, of q = 2."""
    tcm, denoiser = method(step_base=2.0, step_stage=stage, longest_kept=0.9999), gaussian_denoiser(FLOW)
    x, t, cond = spatial(f64([[0.0], [1.0]])), FLOW.time_of_kappa(f64([80.0, 80.0])), batch_of(2, 1).cond
    while FLOW.kappa(t)[0] > 1e-2:
        r = tcm.next_time(t, FLOW)
        x, t = jump(denoiser(x, t, cond, "teacher"), r), r
    slope = ((x[1] - x[0]) / (1 - t[0])).item() / 81  # a flow's x is alpha times the variance-exploding one
    assert slope * (80**2 + S) ** 0.5 == pytest.approx(golden, abs=6e-4)


def test_one_index_of_stable_diffusion_has_as_much_noise_as_signal():
    assert SD.kappa(f64(354.0)).item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("process", ["epsilon", "flow"])
def test_times_lie_above_the_truncation_and_the_share_at_it_is_as_asked(process):
    schedule, kind, *_ = PROCESSES[process]
    denoiser = denoiser_of(teacher_network(process), schedule, kind)
    boundary, t = method(truncation_index=354).times(context(denoiser, 4000))
    low = schedule.time_of_index(354)
    assert boundary.float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert (t[boundary] == low).all() and (t >= low).all() and t.max() <= schedule.t_max
    assert t[~boundary].float().std() > 0.05 * schedule.t_max


def test_quantiles_are_those_of_students_t_cut_to_the_range():
    from torch.distributions import StudentT

    low, high = f64([-0.5]), f64([2.0])
    x = heavy_tailed(torch.linspace(0.001, 0.999, 999, dtype=torch.float64), low, high)
    fine = torch.linspace(-0.5, 2.0, 2_000_001, dtype=torch.float64)
    density = (1 + fine**2 / (0.01 * 0.2**2)) ** (-1.01 / 2)
    mass = torch.cumulative_trapezoid(density, fine)
    for k in (50, 300, 500, 900):
        found = (mass[torch.searchsorted(fine, x[k]) - 1] / mass[-1]).item()
        assert found == pytest.approx(0.001 * (k + 1), abs=2e-3)
    ratio = StudentT(f64(0.01), 0.0, 0.2).log_prob(f64([0.3, 1.0])).exp()
    mine = (1 + f64([0.3, 1.0]) ** 2 / (0.01 * 0.2**2)) ** (-1.01 / 2)
    assert (ratio[0] / ratio[1]).item() == pytest.approx((mine[0] / mine[1]).item(), rel=1e-9)


class Constant(nn.Module):
    """Predicts the same velocity everywhere."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self, x_t, time, labels):
        return self.value.expand_as(x_t)

    def enable_gradient_checkpointing(self, _function):
        pass


def test_the_first_stage_serves_below_the_truncation_and_the_student_above():
    schedule, kind, *_ = PROCESSES["flow"]
    denoiser = denoiser_of(teacher_network("flow"), schedule, kind, student=Constant(1.0), first_stage=Constant(-1.0))
    low = schedule.time_of_index(354).item()
    t, batch = f64([low, low + 1e-5, 0.7, 0.95]), batch_of(4, 2)
    x_t, ctx, tcm = torch.randn(4, 2, 1, 1, dtype=torch.float64), context(denoiser, 4), method()
    r = tcm.next_time(t, schedule)
    x_r = x_t + (r - t)[:, None, None, None] * denoiser(x_t, t, batch.cond, "teacher").flow
    value = f64([-1.0, -1.0, 1.0, 1.0])
    expected = x_r - (r * value)[:, None, None, None]
    torch.testing.assert_close(tcm.target(x_t, t, batch, ctx), expected, rtol=1e-9, atol=1e-9)
    assert (r < t).all() and ((r >= low) == torch.tensor([False, False, True, True])).all()


def test_steps_that_keep_no_noise_regress_the_teachers_clean_prediction():
    """In stage 0 with q = 2 up to kappa = ln 7; there the loss is denoising, whoever serves below the truncation."""
    schedule, kind, *_ = PROCESSES["flow"]
    denoiser = denoiser_of(teacher_network("flow"), schedule, kind, student=Constant(1.0), first_stage=Constant(-1.0))
    tcm, t = (
        method(step_base=2.0, step_stage=0, truncation_index=0),
        schedule.time_of_kappa(f64([0.1, 1.0, 1.94, 1.95])),
    )
    x_t, batch, ctx = torch.randn(4, 2, 1, 1, dtype=torch.float64), batch_of(4, 2), context(denoiser, 4)
    clean = denoiser(x_t, t, batch.cond, "teacher").x0
    gap = (tcm.target(x_t, t, batch, ctx) - clean).flatten(1).norm(dim=1)
    assert tcm.next_time(t, schedule)[:3].tolist() == [0, 0, 0]
    assert gap[:3].max() < 1e-12 < 1e-4 < gap[3]


@pytest.mark.parametrize("process", PROCESSES)
def test_a_step_that_keeps_no_noise_ends_in_the_teachers_clean_prediction(process):
    """With q = 2 and a = 0 the step from kappa = 0.9 arrives; a table's first index, short of it, asks the networks."""
    schedule, kind, *_ = PROCESSES[process]
    networks = {"student": Constant(1.0), "first_stage": Constant(-1.0)}
    denoiser, batch = denoiser_of(teacher_network(process), schedule, kind, **networks), batch_of(2, 2)
    t, tcm = schedule.time_of_kappa(f64([0.9, 5.0])), method(step_base=2.0, step_stage=0, truncation_index=100)
    assert tcm.kept(schedule.kappa(t))[0] == 0 < tcm.kept(schedule.kappa(t))[1]
    x_t = torch.randn(2, 2, 1, 1, dtype=torch.float64)
    found, clean = tcm.target(x_t, t, batch, context(denoiser, 2)), LAW.denoise(x_t, t, schedule)
    torch.testing.assert_close(found[0], clean[0], rtol=0, atol=1e-9)
    assert (found[1] - clean[1]).abs().min() > 1e-2


@pytest.mark.parametrize("process", PROCESSES)
def test_at_the_exact_consistency_function_the_step_errs_at_second_order(process):
    schedule, kind, *_ = PROCESSES[process]
    exact = ConsistencyNetwork(schedule, kind)
    denoiser = denoiser_of(teacher_network(process), schedule, kind, student=exact, first_stage=exact)
    t = schedule.time_of_kappa(f64([1.2, 2.0, 3.0, 6.0]))
    x0, eps = torch.randn(2, 4, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_t, batch, errors = schedule.add_noise(LAW.sample(x0), eps, t), batch_of(4, 2), []
    for kept in (0.9, 0.95, 0.975):
        target = method(step_stage=20, longest_kept=kept).target(x_t, t, batch, context(denoiser, 4))
        errors.append((target - denoiser(x_t, t, batch.cond, "student").x0).norm().item())
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders == pytest.approx([2, 2], abs=0.25)


class Exact(CleanMap):
    """The consistency function of N(MU, S)."""

    def x0(self, x, time, labels):
        level = time.double()[:, None] / 1000
        return MU + (S / ((1 - level) ** 2 * S + level**2)).sqrt() * (x - (1 - level) * MU)


def test_an_affine_student_per_time_learns_the_steps_above_the_truncation_and_the_first_stage_below(monkeypatch):
    """Times at which every step ends where the next begins; the last ends below the truncation, at the exact map."""
    low, kept = FLOW.kappa(FLOW.time_of_index(354)).item(), 0.8
    kappa = low * kept ** -(torch.arange(6).double() + 0.5)
    ends, t = kappa * kept, kappa / (1 + kappa)
    tcm = method(step_stage=30, longest_kept=kept, huber_c=1e3)  # so wide that squares are what it sees
    monkeypatch.setattr(tcm, "times", lambda ctx: (torch.zeros(24, dtype=torch.bool), t.repeat(4)))
    student = AffinePerBin(1, (1000 * t).tolist()).double()
    denoiser = gaussian_denoiser(FLOW, student=student, first_stage=Exact(FLOW, "flow"))
    batch, ctx = batch_of(24, 1, data(24)), context(denoiser, 24)
    settle(lambda: tcm.student_loss(batch, ctx)["consistency"], denoiser.roles.parameters("student"), 8)
    x, slope = f64([-1.0, 2.0]), (S / (S + ends[0] ** 2)).sqrt() * (1 + ends[0])
    for k in range(6):
        a_t, a_s = 1 / (1 + kappa[k]), 1 / (1 + ends[k])
        slope = slope * a_s / a_t * (S + ends[k] * kappa[k]) / (S + kappa[k] ** 2)  # one more DDIM step
        with torch.no_grad():
            found = denoiser(spatial(x[:, None]), t[k].expand(2), batch.cond[:2], "student").x0.flatten()
        torch.testing.assert_close(found, MU + slope * (x - a_t * MU), rtol=0, atol=1e-6)


def test_without_truncation_it_is_weighted_consistency_distillation(monkeypatch):
    """Value and gradient of mean (1 + 1 / kappa^2) (f - f^-)^2 on LCM's pairs, in the quadratic part of the distance."""
    torch.manual_seed(0)
    student, first, number = PointNet(1, 1).double(), PointNet(1, 1).double(), torch.arange(15)
    denoiser, batch = gaussian_denoiser(FLOW, student=student, first_stage=first), batch_of(15, 1, data(15))
    ctx, weights = context(denoiser, 15, {"pair": number}), denoiser.roles.parameters("student")
    lcm = LCM(LCMConfig(guidance_scale=1.0, num_ddim_timesteps=20, target_decay=0.0))
    pair, t, r = lcm.pair(batch, ctx), (number + 1.0) / 20, number / 20.0
    tcm = method(truncation_index=0, huber_c=1e5)
    monkeypatch.setattr(
        tcm, "times", lambda ctx: (torch.zeros(15, dtype=torch.bool), FLOW.time_of_index(50 * number + 49))
    )
    monkeypatch.setattr(tcm, "kept", lambda kappa: (r / (1 - r)).double() / kappa)
    terms, weight = tcm.student_loss(batch, ctx), 1 + ((1 - t) / t).double() ** 2
    expected = (weight * (pair.student - pair.target).flatten() ** 2).mean()
    assert terms["boundary"] == 0
    found = 2e5 * (1 - tcm.config.boundary_share) * terms["consistency"]
    for one, other in ((found, expected), *zip(*(torch.autograd.grad(v, weights) for v in (found, expected)))):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_the_loss_is_the_two_averages():
    schedule, kind, *_ = PROCESSES["flow"]
    denoiser = denoiser_of(teacher_network("flow"), schedule, kind, student=Constant(1.0), first_stage=Constant(-1.0))
    batch = batch_of(8, 2, torch.randn(8, 2, 1, 1).double())
    tcm, ctx = method(boundary_weight=0.3, boundary_share=0.25), context(denoiser, 8)
    terms = tcm.student_loss(batch, ctx)
    boundary, t = tcm.times(ctx)
    x_t = schedule.add_noise(batch.latents, ctx.random.normal("eps", (2, 1, 1)), t)
    gap = denoiser(x_t, t, batch.cond, "student").x0 - tcm.target(x_t, t, batch, ctx)
    each = (gap.square().flatten(1).mean(1) + 5.4e-4**2).sqrt() - 5.4e-4
    each = each * (1 + 1 / schedule.kappa(t) ** 2)
    torch.testing.assert_close(terms["consistency"], (each * ~boundary).sum() / (8 * 0.75), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(terms["boundary"], 0.3 * (each * boundary).sum() / (8 * 0.25), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("student", ["lora", "full"])
def test_the_student_alone_learns(tiny_sd, student):
    tcm = method(guidance_scale=3.0)
    networks = build_networks(tcm, Teacher(tiny_sd), settings(student=student))
    roles = networks.roles
    assert "first_stage" in roles
    with torch.no_grad():  # the two stages differ once training has begun
        for p in networks.parameters("student"):
            p.add_(0.05 * torch.randn_like(p))
    sum(tcm.student_loss(sd_batch(), context(networks.denoiser, 2)).values()).backward(
        inputs=networks.parameters("student")
    )
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in networks.parameters("student"))
    assert all(p.grad is None for p in roles.parameters("first_stage"))


@pytest.mark.parametrize(
    "bad", [{"timesteps": (999, 200)}, {"boundary_share": 0.0}, {"step_base": 1.0}, {"longest_kept": 1.0}]
)
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        TCMConfig(**bad)


def test_it_trains_through_the_engine(tmp_path):
    teacher = AnalyticTeacher.gaussian(LAW.mean, LAW.cov, schedule=FlowSchedule(), prediction_type="flow")
    data = Latents(LAW.sample(spatial(torch.randn(64, 2))).float())
    run = settings(
        output_dir=str(tmp_path), student="full", max_train_steps=3, train_batch_size=8, checkpointing_steps=3
    )
    trainer = Trainer(method(), teacher, data, run)
    before = [p.clone() for p in trainer.networks.roles.parameters("first_stage")]
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.networks.roles.parameters("first_stage")))
