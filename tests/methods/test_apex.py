"""APEX (arXiv 2604.12322): the released losses at rest on exact maps, their order, groups; the printed ones collapse."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from flow_map_helpers import (
    LAW,
    PROCESSES,
    Latents,
    MapNetwork,
    sd_batch,
    settings,
    teacher_network,
    told_end,
)
from method_helpers import batch_of, context, denoiser_of, f64, settle, signs, spatial
from torch import nn

from fastdiff.diffusion import FlowSchedule
from fastdiff.engine import Trainer
from fastdiff.engine.networks import build_networks
from fastdiff.methods._apex_paper import paper_losses, shifted
from fastdiff.methods.apex import APEX, APEXConfig, barron, told
from fastdiff.methods.base import Batch
from fastdiff.models.analytic import AnalyticFamily, AnalyticTeacher
from fastdiff.models.analytic_networks import PointNet
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.embeddings import with_extra_times
from fastdiff.models.roles import FullSpec, Roles
from fastdiff.models.teacher import Teacher


def method(**config) -> APEX:
    return APEX(APEXConfig(**config))


def denoiser_with(student: nn.Module, process: str = "flow") -> Denoiser:
    schedule, kind, *_ = PROCESSES[process]
    return denoiser_of(teacher_network(process), schedule, kind, student=student)


def exact_velocity(process: str, t: torch.Tensor):
    schedule, _, *_ = PROCESSES[process]
    x0, eps = torch.randn(2, 4, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return schedule, schedule.add_noise(LAW.sample(x0), eps, t)


def residual_at(process: str, t, s, tilt: float = 0.0, **config) -> torch.Tensor:
    schedule, kind, *_ = PROCESSES[process]
    denoiser, batch = denoiser_with(MapNetwork(schedule, kind, tilt), process), batch_of(4, 2)
    ctx = context(denoiser, 4)
    schedule, x_t = exact_velocity(process, t)
    v = denoiser(x_t, t, batch.cond, "teacher").flow
    apex = method(**config)
    F = apex.ask(x_t, t, s, batch.cond, ctx).flow
    return apex.residual(F, v, x_t, t, s, batch.cond, ctx)


@pytest.mark.parametrize("segments", [1, 2, 3])
def test_the_residual_vanishes_with_the_step_at_the_exact_map_whatever_the_segments(segments):
    t, s, lengths = f64([0.35, 0.5, 0.8, 0.95]), f64([0.1, 0.2, 0.0, 0.3]), (0.04, 0.02, 0.01, 0.005)
    sizes = [residual_at("flow", t, s, difference_step=d, segments=segments).norm().item() for d in lengths]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(sizes)]
    assert orders == pytest.approx([1] * 3, abs=0.15)
    if segments > 1:
        assert sizes[-1] == pytest.approx(residual_at("flow", t, s, difference_step=0.005, segments=1).norm().item())
    assert residual_at("flow", t, s, tilt=0.1, difference_step=0.005).norm() > 5 * sizes[-1]


def test_the_residual_vanishes_on_stable_diffusions_table_too():
    t, s = f64([300.5, 500.25, 700.5, 999.0]), f64([-1.0, 100.5, 40.25, -1.0])
    sizes = [residual_at("epsilon", t, s, difference_step=d).norm().item() for d in (0.02, 0.01, 0.005)]
    assert sizes[0] > sizes[1] > sizes[2] and sizes[1] / sizes[2] == pytest.approx(2, abs=0.4)


def test_at_the_first_index_of_a_table_the_residual_is_the_velocitys():
    """No network knows a time below it, where the difference would end."""
    t, s = f64([0.0, 0.0, 0.3, 0.3]), f64([-1.0, -0.5, -1.0, -0.2])
    schedule, x_t = exact_velocity("epsilon", t)
    denoiser, batch = denoiser_with(MapNetwork(schedule, "epsilon"), "epsilon"), batch_of(4, 2)
    ctx, apex = context(denoiser, 4), method()
    v = denoiser(x_t, t, batch.cond, "teacher").flow
    F = apex.ask(x_t, t, s, batch.cond, ctx).flow
    torch.testing.assert_close(apex.residual(F, v, x_t, t, s, batch.cond, ctx), F - v)


def test_small_steps_of_one_segment_are_meanflows_identity():
    """R -> F + (a_t - a_s) dF/da - v, the latter by differences on a network that is no map at all."""
    torch.manual_seed(0)
    student = with_extra_times(PointNet(2, 1), 2).double()
    nn.init.normal_(student.slot.weight, std=0.02)
    denoiser, batch = denoiser_with(student), batch_of(4, 2)
    ctx, t, s = context(denoiser, 4), f64([0.35, 0.5, 0.8, 0.95]), f64([0.1, 0.2, 0.0, 0.3])
    _, x_t = exact_velocity("flow", t)
    v = denoiser(x_t, t, batch.cond, "teacher").flow
    apex, h = method(segments=1, difference_step=1e-6), 1e-6

    def F(step):
        return apex.ask(x_t + step * v, t + step, s, batch.cond, ctx).flow

    expected = F(0) + (t - s)[:, None, None, None] * (F(h) - F(-h)) / (2 * h) - v
    found = apex.residual(F(0), v, x_t, t, s, batch.cond, ctx)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_jumps_shorter_than_the_step_regress_the_velocity():
    torch.manual_seed(0)
    denoiser, batch = denoiser_with(with_extra_times(PointNet(2, 1), 2)), batch_of(4, 2)
    ctx, t = context(denoiser, 4), f64([0.35, 0.5, 0.8, 0.95])
    _, x_t = exact_velocity("flow", t)
    F, v = torch.randn(2, 4, 2, 1, 1, dtype=torch.float64)
    found = method().residual(F, v, x_t, t, t - 0.005, batch.cond, ctx)
    torch.testing.assert_close(found, F - v)


class Spy(PointNet):
    """Notes what it is asked, and answers with its input's scale."""

    def __init__(self):
        super().__init__(2, 1)
        self.seen = []

    def forward(self, x_t, time, labels, timestep_cond=None):
        flag = told_end(timestep_cond, 1).round().abs() > 1
        self.seen.append((time.clone(), told_end(timestep_cond).round(), flag, labels.clone()))
        return super().forward(x_t, time, labels)


def test_groups_flags_and_ends():
    spy = Spy()
    denoiser, batch = denoiser_with(spy), batch_of(8, 2, torch.randn(8, 2, 1, 1).double())
    terms = method(near_share=0.05).student_loss(batch, context(denoiser, 8))
    assert set(terms) == {"average_velocity", "adversarial"}
    calls = denoiser.roles.network("student").seen
    sample, main, with_prompt, without, *way, flagged, plain = calls
    assert [len(time) for time, *_ in calls] == [2, 8, 6, 6, 6, 6, 2, 2]
    assert (sample[0] == 1000).all() and (sample[1] == 0).all() and not sample[2].any()
    time, end, flag, _ = main
    assert (time[:2] == 1000).all() and (end[:2] == 0).all()  # end to end
    assert (end[2:4] >= 0.95 * time[2:4] - 1).all() and (end[2:4] <= time[2:4] + 1).all()  # short
    assert (end[4:6] <= time[4:6] + 1).all()  # any
    assert flag.tolist() == [False] * 6 + [True] * 2 and ((end - time)[6:].abs() <= 1).all()  # fakes
    assert ((with_prompt[1] - with_prompt[0]).abs() <= 1).all()
    assert (with_prompt[3] == 0).all() and (without[3] == -1).all()
    assert torch.equal(way[-1][1], main[1][:6]) and len(way) == 2
    assert flagged[2].all() and not plain[2].any() and torch.equal(flagged[0], plain[0])


class Constant(nn.Module):
    """One velocity for whatever is not flagged, and `gap` more for what is."""

    def __init__(self, velocity: float, gap: float) -> None:
        super().__init__()
        self.velocity, self.gap = nn.Parameter(f64(velocity)), gap

    def forward(self, x_t, time, labels, timestep_cond):
        flagged = told_end(timestep_cond, 1)[:, None, None, None].abs() > 1
        return torch.where(flagged, self.velocity + self.gap, self.velocity).expand_as(x_t)

    def enable_gradient_checkpointing(self, _function):
        pass


@pytest.mark.parametrize("gap", [0.3, -0.3, 3.0, 0.0])
def test_values_and_slopes_of_both_terms_where_the_velocity_is_constant(gap):
    """Jumps of any length then leave R = F - v. The slope of a distance is 2 mean(r) / sqrt(mean(r^2) / c^2 + 1) / c."""
    rows, velocity, c = 16, 0.4, 1e-3
    place, length = torch.rand(2, rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoiser = denoiser_with(Constant(velocity, gap))
    x = LAW.sample(torch.randn(rows, 2, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    batch, ctx = batch_of(rows, 2, x), context(denoiser, rows, {"t": place, "jump": length})
    terms = method(guidance_strength=0.0).student_loss(batch, ctx)
    only = method(guidance_strength=0.0, adversarial_weight=0.0).student_loss(batch, ctx)
    assert set(terms) == {"average_velocity", "adversarial"}
    assert only == {"average_velocity": terms["average_velocity"]}

    eps, z = (ctx.random.normal(site, (2, 1, 1)).double().flatten(1) for site in ("eps", "fake/z"))
    whole, near, _, fake = torch.arange(rows) % 4 == torch.arange(4)[:, None]
    r = (velocity - (eps - x.flatten(1))).clamp(-1, 1)
    r[fake] = (velocity + gap - (eps - (z - velocity)))[fake]
    moved = torch.where(whole, 1, place * torch.where(near, 0.05 * length, length))
    weight = torch.where(fake, 1, (math.pi * (1 - moved) / 2.5).tan() + 1)
    clipped = f64([[max(-1.0, min(1.0, gap))]])
    for name, factor, wrong in (("average_velocity", weight, r), ("adversarial", 0.5, clipped)):
        square = wrong.square().mean(1)
        shrunk = factor * (square / c**2 + 1).rsqrt() / c
        (slope,) = torch.autograd.grad(terms[name], denoiser.roles.parameters("student"), retain_graph=True)
        torch.testing.assert_close(terms[name], (shrunk * square).mean(), rtol=1e-9, atol=0)
        torch.testing.assert_close(slope, (shrunk * 2 * wrong.mean(1)).mean(), rtol=1e-9, atol=0)


def test_guidance_adds_what_the_prompt_changes():
    torch.manual_seed(0)
    student = with_extra_times(PointNet(2, 1), 2)
    denoiser, batch = denoiser_with(student), batch_of(4, 2)
    ctx, t = context(denoiser, 4), f64([0.35, 0.5, 0.8, 0.95])
    _, x_t = exact_velocity("flow", t)
    v = torch.randn(4, 2, 1, 1, dtype=torch.float64)
    inputs = told(denoiser, t)
    cond = denoiser(x_t, t, batch.cond, "student", **inputs).flow
    null = denoiser(x_t, t, batch.null.expand(4), "student", **inputs).flow
    found = method(guidance_strength=0.6).guided(v, x_t, t, batch.cond, batch, ctx)
    torch.testing.assert_close(found, v + 0.6 * (cond - null))
    assert method(guidance_strength=0.0).guided(v, x_t, t, batch.cond, batch, ctx) is v


def test_the_distance_is_the_length_where_it_is_large_and_quadratic_where_small():
    target = torch.zeros(2, 2)
    found = barron(torch.tensor([[3.0, 3.0], [1e-5, 1e-5]]), target)
    assert found.tolist() == pytest.approx([3.0, 1e-10 / 1e-3], rel=1e-3)
    x = torch.tensor([[3.0, 4.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(barron(x, torch.zeros(1, 2)).sum(), x)
    torch.testing.assert_close(gradient, x.detach() / 12.5**0.5, rtol=1e-4, atol=0)


def test_jumps_weigh_more_the_shorter_they_are():
    denoiser = denoiser_with(with_extra_times(PointNet(2, 1), 2))
    weight = method().weight(f64([1.0, 0.5, 0.5]), f64([0.0, 0.25, 0.5]), context(denoiser, 3))
    expected = [1.0, 1 + math.tan(0.3 * math.pi), 1 + math.tan(0.4 * math.pi)]
    assert weight.tolist() == pytest.approx(expected)
    assert expected[-1] == pytest.approx(4.0777, abs=1e-4)


def test_the_untrained_student_is_the_teacher_and_it_alone_learns(tiny_sd):
    apex = method()
    networks = build_networks(apex, Teacher(tiny_sd), settings(student="full"))
    denoiser, two = networks.denoiser, sd_batch()
    batch = Batch(torch.arange(4), two.cond[[0, 1, 0, 1]], two.null, two.latent_shape, two.latents[[0, 1, 1, 0]])
    t = torch.tensor([40.0, 999.0])
    with torch.no_grad():
        student = denoiser(two.latents, t, two.cond, "student", **apex.sampling_inputs(denoiser, 2, t.device))
        assert torch.equal(student.native, denoiser(two.latents, t, two.cond, "teacher").native)
    sum(apex.student_loss(batch, context(denoiser, 4)).values()).backward(inputs=networks.parameters("student"))
    assert networks.roles.network("student").time_embedding.cond_proj.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in networks.roles.base.parameters())
    with pytest.raises(ValueError, match="full"):
        build_networks(apex, Teacher(tiny_sd), settings(student="lora"))


def test_it_trains_through_the_engine(tmp_path):
    teacher = AnalyticTeacher.gaussian(LAW.mean, LAW.cov)
    data = Latents(LAW.sample(spatial(torch.randn(64, 2))).float())
    run = settings(
        output_dir=str(tmp_path), student="full", max_train_steps=3, train_batch_size=8, checkpointing_steps=3
    )
    trainer = Trainer(method(), teacher, data, run)
    trainer.train()
    assert trainer.step == 3


# The printed losses


def paper(**config) -> APEX:
    with pytest.warns(UserWarning, match="mean of the data"):
        return method(losses="paper", **config)


class EmbeddingFamily(AnalyticFamily):
    """Conditioned on an embedding, which can be shifted."""

    def call(self, network, x_t, time, cond, **inputs):
        return network(x_t, time, cond.tensors["prompt_embeds"], **inputs)


class TwoAffine(nn.Module):
    """An affine velocity for the prompt (embedding 1) and one for its shifted version (embedding 1/2)."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.full((2,), 0.5, dtype=torch.float64))
        self.offset = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x_t, time, prompt_embeds):
        which = (prompt_embeds[:, 0] < 0.75).long()
        return self.slope[which][:, None, None, None] * x_t + self.offset[which][:, None, None, None]

    def enable_gradient_checkpointing(self, _function):
        pass


def embedded_batch(latents: torch.Tensor) -> Batch:
    rows = len(latents)
    cond = Conditioning({"prompt_embeds": torch.ones(rows, 1).double()})
    return Batch(torch.arange(rows), cond, Conditioning({"prompt_embeds": torch.zeros(1, 1)}), (1, 1, 1), latents)


class Apart(nn.Module):
    """As TwoAffine, with parameters of its own for each of the two."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt, self.shifted = (nn.Parameter(f64([0.5, 0.0])) for _ in range(2))

    def forward(self, x_t, time, prompt_embeds):
        lines = torch.stack([self.prompt, self.shifted])[(prompt_embeds[:, 0] < 0.75).long()]
        return lines[:, :1, None, None] * x_t + lines[:, 1:, None, None]

    def enable_gradient_checkpointing(self, _function):
        pass


def exact_expectations(time: float):
    """Student, its denoiser, data of deviation 0.8 with noises whose mean and covariance are exact, and a context."""
    student, points = Apart(), signs(3)[:, :, None, None, None]
    roles = Roles(Apart().requires_grad_(False), {"student": FullSpec(student, torch.float64)})
    denoiser = Denoiser(roles, EmbeddingFamily(""), FlowSchedule(), "flow", torch.float64)
    draws = {"t": torch.full((8,), time), "eps": points[:, 1], "fake/eps": points[:, 2]}
    return student, denoiser, embedded_batch(1.3 + 0.8 * points[:, 0].double()), context(denoiser, 8, draws)


def share_of_the_deviation(denoiser: Denoiser, batch: Batch, ctx) -> float:
    """Deviation of one-step samples over that of data, after a look at their mean."""
    t = ctx.random.uniform("t")
    x_t = denoiser.schedule.add_noise(batch.latents, ctx.random.normal("eps", (1, 1, 1)), t)
    x0 = denoiser(x_t, t, batch.cond, "student").x0
    assert x0.mean().item() == pytest.approx(1.3, abs=1e-2)
    return x0.std(correction=0).item() / 0.8


@pytest.mark.parametrize("mix", [0.25, 0.5, 0.75])
def test_the_printed_losses_collapse_one_step_samples_to_the_mean(mix):
    """Near t = 1 what they train to is a constant: documents why `code` is the default."""
    _, denoiser, batch, ctx = exact_expectations(0.99)
    optimizer, apex = torch.optim.Adam(denoiser.roles.parameters("student"), 5e-2), paper(mix=mix)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        loss = apex.student_loss(batch, ctx)
        (loss["fake"] + 100 * loss["mixed"]).backward()  # t (1 - t) is a hundredth here
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    assert share_of_the_deviation(denoiser, batch, ctx) < 0.05


@pytest.mark.parametrize(("mix", "golden"), [(0.25, 0.53), (0.5, 0.38), (0.75, 0.18)])
def test_half_way_deviation_is_lost_even_without_the_gradient_of_the_samples(mix, golden):
    """At t = 1/2, where each prediction is fitted to its own term in turn until both rest."""
    student, denoiser, batch, ctx = exact_expectations(0.5)
    apex = paper(mix=mix)
    for term, weight in (("fake", student.shifted), ("mixed", student.prompt)) * 24:
        settle(lambda term=term: apex.student_loss(batch, ctx)[term], [weight])
    assert share_of_the_deviation(denoiser, batch, ctx) == pytest.approx(golden, abs=5e-3)


def test_the_printed_losses_are_what_the_paper_prints():
    schedule = FlowSchedule()
    torch.manual_seed(0)
    student = TwoAffine()
    nn.init.normal_(student.slope)
    roles = Roles(TwoAffine().requires_grad_(False), {"student": FullSpec(student, torch.float64)})
    denoiser = Denoiser(roles, EmbeddingFamily(""), schedule, "flow", torch.float64)
    x = torch.randn(4, 1, 1, 1, dtype=torch.float64)
    ctx, batch = context(denoiser, 4, {"t": torch.tensor([0.1, 0.4, 0.6, 0.9])}), embedded_batch(x)
    found = paper_losses(batch, ctx, -0.5, 1.0, 0.3)
    slopes, t = roles.parameters("student")[0], f64([0.1, 0.4, 0.6, 0.9])[:, None, None, None]
    z, noise = (ctx.random.normal(site, (1, 1, 1)).double() for site in ("eps", "fake/eps"))
    x_t = (1 - t) * x + t * z
    sample = x_t - t * slopes[0] * x_t
    fake = (slopes[1] * (t * noise + (1 - t) * sample) - (noise - sample)) ** 2
    mixed = t * (1 - t) * (slopes[0] * x_t - 0.7 * (z - x) - 0.3 * (slopes[1] * x_t).detach()) ** 2
    torch.testing.assert_close(found["fake"], fake.mean(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found["mixed"], mixed.mean(), rtol=1e-6, atol=1e-8)
    own, expected = (
        torch.autograd.grad(a + b, slopes)[0]
        for a, b in ((found["fake"], found["mixed"]), (fake.mean(), mixed.mean()))
    )
    torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("mix", "sees"), [(0.0, False), (0.3, True)])
def test_without_mixing_the_regression_is_flow_matching_whatever_the_shifted_prompt_says(mix, sees):
    """t (1 - t) |F(x_t, t) - (z - x)|^2."""
    found = []
    for shifted_slope in (0.5, -2.0):
        student = TwoAffine()
        with torch.no_grad():
            student.slope[1] = shifted_slope
        roles = Roles(TwoAffine().requires_grad_(False), {"student": FullSpec(student, torch.float64)})
        denoiser = Denoiser(roles, EmbeddingFamily(""), FlowSchedule(), "flow", torch.float64)
        x, t = torch.linspace(-1, 2, 4).double()[:, None, None, None], f64([0.1, 0.4, 0.6, 0.9])
        ctx = context(denoiser, 4, {"t": t})
        found.append(paper(mix=mix).student_loss(embedded_batch(x), ctx)["mixed"].item())
    z, level = ctx.random.normal("eps", (1, 1, 1)).double(), t[:, None, None, None]
    velocity = 0.5 * ((1 - level) * x + level * z)
    expected = (level * (1 - level) * (velocity - (z - x)) ** 2).mean().item()
    assert (found[0] != found[1]) == sees
    assert (found[0] == pytest.approx(expected, rel=1e-6)) != sees


def test_only_prompt_embeddings_are_shifted():
    cond = Conditioning({"prompt_embeds": torch.ones(1, 2), "time_ids": torch.ones(1, 6)})
    moved = shifted(cond, -0.5, 1.0).tensors
    assert (moved["prompt_embeds"] == 0.5).all() and (moved["time_ids"] == 1).all()
    with pytest.raises(ValueError, match="labels"):
        shifted(batch_of(1, 1).cond, -0.5, 1.0)


def test_the_printed_losses_takes_loras_and_nothing_is_added(tiny_sd):
    apex = paper()
    networks = build_networks(apex, Teacher(tiny_sd), settings(student="lora"))
    sum(apex.student_loss(sd_batch(), context(networks.denoiser, 2)).values()).backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in networks.parameters("student"))
    assert apex.sampling_inputs(networks.denoiser, 1, torch.device("cpu")) == {}
    assert method().compares_with_null() and not apex.compares_with_null()


@pytest.mark.parametrize(
    ("losses", "unread"),
    [
        ("code", {"shift_scale": 1.0, "shift_bias": 0.0, "mix": 0.25}),
        (
            "paper",
            {
                "guidance_strength": 0.0,
                "near_share": 0.1,
                "difference_step": 0.1,
                "segments": 1,
                "adversarial_weight": 0.0,
            },
        ),
    ],
)
def test_options_of_the_other_losses_are_refused(losses, unread):
    for name, value in unread.items():
        with pytest.raises(ValueError, match=f"{name} has no effect with losses {losses}"):
            APEXConfig(losses=losses, **{name: value})


@pytest.mark.parametrize("bad", [{"mix": 1.0}, {"segments": 0}, {"difference_step": 0.0}, {"timesteps": (1, 2)}])
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        APEXConfig(**bad)


def test_the_default_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method()
