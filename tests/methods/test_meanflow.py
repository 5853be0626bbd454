"""MeanFlow as distillation (arXiv 2505.13447): the identity on exact maps, teacher regression, intervals, training."""

from __future__ import annotations

import pytest
import torch
from flow_map_helpers import LAW, PROCESSES, Latents, MapNetwork, sd_batch, settings, teacher_network
from method_helpers import SD, batch_of, context, denoiser_of, f64, spatial
from torch import nn

from fastdiff.diffusion import FlowSchedule, jump
from fastdiff.engine import Trainer
from fastdiff.engine.networks import build_networks
from fastdiff.methods._flow_map import (
    adaptive_distance,
    end_input,
    noise_share,
    noise_share_rate,
    time_of_share,
)
from fastdiff.methods.meanflow import MeanFlow, MeanFlowConfig
from fastdiff.models.analytic import AnalyticTeacher
from fastdiff.models.analytic_networks import PointNet
from fastdiff.models.embeddings import with_extra_times
from fastdiff.models.teacher import Teacher


def method(**config) -> MeanFlow:
    return MeanFlow(MeanFlowConfig(**config))


def places(process: str):
    schedule, kind, t, s = PROCESSES[process]
    x0, eps = torch.randn(2, 4, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return schedule, kind, schedule.add_noise(LAW.sample(x0), eps, f64(t)), f64(t), f64(s)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_identity_holds_at_the_exact_map_and_only_there(process):
    schedule, kind, x_t, t, s = places(process)
    for tilt, holds in ((0.0, True), (0.1, False)):
        student = MapNetwork(schedule, kind, tilt)
        denoiser = denoiser_of(teacher_network(process), schedule, kind, student=student)
        u, target, finite = method().sides(x_t, t, s, batch_of(4, 2), context(denoiser, 4))
        error = (u - target).flatten(1).norm(dim=1)
        assert finite.all()
        assert error.max() < 1e-9 if holds else error.min() > 1e-3


@pytest.mark.parametrize("process", PROCESSES)
def test_the_loss_vanishes_at_the_exact_map_and_only_there(process):
    schedule, kind, *_ = PROCESSES[process]
    mean_flow = method(norm_power=0.0, instant_share=0.25, clean_share=0.25)
    latents = LAW.sample(torch.randn(16, 2, 1, 1, generator=torch.Generator().manual_seed(0)).double())
    for tilt, holds in ((0.0, True), (0.1, False)):
        denoiser = denoiser_of(teacher_network(process), schedule, kind, student=MapNetwork(schedule, kind, tilt))
        batch, ctx = batch_of(16, 2, latents), context(denoiser, 16, {"kind": torch.arange(0.5, 16) / 16})
        loss = mean_flow.student_loss(batch, ctx)["average_velocity"]
        assert loss < 1e-14 if holds else loss > 1e-6
    t, s = mean_flow.interval(ctx)  # the exact map obeys the identity backwards too: the tilted one tells t from s
    x_t = schedule.add_noise(latents, ctx.random.normal("eps", (2, 1, 1)), t)
    u, target, _ = mean_flow.sides(x_t, t, s, batch, ctx)
    torch.testing.assert_close(loss, (u - target).square().mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("process", PROCESSES)
def test_a_jump_by_the_average_velocity_is_one_step_of_ddim_onto_the_exact_flow(process):
    schedule, kind, x_t, t, s = places(process)
    denoiser = denoiser_of(teacher_network(process), schedule, kind, student=MapNetwork(schedule, kind))
    prediction = denoiser(x_t, t, batch_of(4, 2).cond, "student", **end_input(schedule, s))
    torch.testing.assert_close(jump(prediction, s), LAW.flow_map(x_t, t, s, schedule), rtol=1e-9, atol=1e-9)
    alpha, sigma = schedule.levels(t, x_t)
    share, end = (noise_share(schedule, v)[:, None, None, None] for v in (t, s))
    moved = x_t / (alpha + sigma) + (end - share) * prediction.flow
    alpha, sigma = schedule.levels(s, x_t)
    torch.testing.assert_close(moved * (alpha + sigma), jump(prediction, s), rtol=1e-10, atol=1e-10)


def random_student(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    network = with_extra_times(PointNet(2, 1)).double()
    nn.init.normal_(network.slot.weight, std=0.02)
    return network


@pytest.mark.parametrize("process", PROCESSES)
def test_without_length_the_target_is_the_teachers_velocity(process):
    schedule, kind, x_t, t, _ = places(process)
    denoiser = denoiser_of(teacher_network(process), schedule, kind, student=random_student())
    batch = batch_of(4, 2)
    _, target, _ = method().sides(x_t, t, t, batch, context(denoiser, 4))
    torch.testing.assert_close(target, denoiser(x_t, t, batch.cond, "teacher").flow, rtol=1e-12, atol=1e-12)


def test_the_target_differentiates_along_the_guided_teacher_with_the_end_held():
    schedule, _, x_t, t, s = places("flow")
    t = t.clamp_max(0.95)
    denoiser = denoiser_of(teacher_network("flow"), schedule, "flow", student=random_student())
    batch, h = batch_of(4, 2), 1e-5
    _, target, _ = method().sides(x_t, t, s, batch, context(denoiser, 4))
    v = denoiser(x_t, t, batch.cond, "teacher").flow

    def u(step):
        return denoiser(x_t + step * v, t + step, batch.cond, "student", **end_input(schedule, s)).flow

    expected = v - (t - s)[:, None, None, None] * (u(h) - u(-h)) / (2 * h)
    torch.testing.assert_close(target, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("schedule", [SD, FlowSchedule()])
def test_shares_and_times_are_inverse_and_the_rate_is_their_derivative(schedule):
    lowest, highest = (noise_share(schedule, f64(t)) for t in (schedule.t_min, schedule.t_max))
    shares = torch.lerp(lowest, highest, torch.linspace(0.01, 0.99, 50, dtype=torch.float64))
    t = time_of_share(schedule, shares)
    torch.testing.assert_close(noise_share(schedule, t), shares, rtol=1e-10, atol=1e-12)
    h = 1e-7 * (schedule.t_max - schedule.t_min)
    slope = (noise_share(schedule, t + h) - noise_share(schedule, t)) / h
    torch.testing.assert_close(1 / noise_share_rate(schedule, t), slope, rtol=1e-4, atol=1e-9)
    assert time_of_share(schedule, f64([0.0])).item() == schedule.t_clean
    assert noise_share(schedule, f64(schedule.t_clean)) == 0
    assert noise_share_rate(schedule, f64([schedule.t_clean, schedule.t_max])).isfinite().all()


def test_between_the_first_index_and_the_clean_end_shares_grow_from_zero():
    t = time_of_share(SD, f64([0.0, 0.01, 0.02, 0.0283]))
    assert t[0] == -1 and (t.diff() > 0).all() and -0.01 < t[-1] <= 0


def test_intervals_have_the_shares_that_were_asked_for():
    denoiser = denoiser_of(teacher_network("epsilon"))
    ctx = context(denoiser, 4000)
    t, s = method(instant_share=0.5, clean_share=0.25).interval(ctx)
    assert (s == t).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert (s == -1).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert (s <= t).all() and t.min() >= 0 and t.max() <= 999
    logit = SD.kappa(torch.cat(method(instant_share=0.0).interval(ctx))).log()
    assert logit.mean().item() == pytest.approx(-0.4, abs=0.05) and logit.std().item() == pytest.approx(1, abs=0.05)


def test_adaptive_weights_do_not_touch_the_gradients_direction_and_skip_broken_samples():
    x = torch.tensor([[3.0, 4.0], [0.3, 0.4], [1.0, 1.0]], requires_grad=True)
    finite = torch.tensor([True, True, False])
    loss = adaptive_distance(x, torch.zeros(3, 2), 1.0, 0.1, finite)
    assert loss.item() == pytest.approx((12.5 / 12.6 + 0.125 / 0.225) / 3)
    (gradient,) = torch.autograd.grad(loss, x)
    expected = torch.stack([x[0] / 12.6, x[1] / 0.225, 0 * x[2]]).detach() / 3
    torch.testing.assert_close(gradient, expected)
    plain = adaptive_distance(x, torch.zeros(3, 2), 0.0, 0.1)
    assert plain.item() == pytest.approx((12.5 + 0.125 + 1) / 3)


def test_the_untrained_student_is_the_teacher_and_it_alone_learns(tiny_sd):
    mean_flow = method(guidance_scale=3.0, instant_share=0.25)
    networks = build_networks(mean_flow, Teacher(tiny_sd), settings(student="full"))
    denoiser, batch = networks.denoiser, sd_batch()
    t, inputs = torch.tensor([40.0, 999.0]), mean_flow.sampling_inputs(denoiser, 2, torch.device("cpu"))
    with torch.no_grad():
        student = denoiser(batch.latents, t, batch.cond, "student", **inputs)
        assert torch.equal(student.native, denoiser(batch.latents, t, batch.cond, "teacher").native)
    loss = mean_flow.student_loss(batch, context(denoiser, 2))["average_velocity"]
    loss.backward(inputs=networks.parameters("student"))
    slot = networks.roles.network("student").time_embedding.cond_proj.weight
    assert slot.grad.abs().max() > 0
    assert all(p.grad is None for p in networks.roles.base.parameters())


def test_a_lora_is_refused_with_the_reason(tiny_sd):
    with pytest.raises(ValueError, match="full"):
        build_networks(method(), Teacher(tiny_sd), settings(student="lora"))


def test_samplers_say_what_the_network_is_told():
    denoiser = denoiser_of(teacher_network("epsilon"))
    renoise, jumps = method(timesteps=(999, 499)), method(timesteps=(999, 499), sampling="jump")
    t, s = torch.tensor([999.0]), torch.tensor([499.0])
    clean = end_input(SD, torch.tensor([-1.0]))["timestep_cond"]
    assert renoise.sampler().kind == "lcm" and not renoise.sampler().tells_end
    torch.testing.assert_close(renoise.sampling_inputs(denoiser, 1, t.device)["timestep_cond"], clean)
    assert renoise.step_inputs(denoiser, t, s) == {}
    assert jumps.sampler().kind == "ddim" and jumps.sampler().tells_end
    assert jumps.sampling_inputs(denoiser, 1, t.device) == {}
    torch.testing.assert_close(jumps.step_inputs(denoiser, t, s)["timestep_cond"], end_input(SD, s)["timestep_cond"])


@pytest.mark.parametrize(
    "bad", [{"time_std": 0.0}, {"instant_share": 0.9, "clean_share": 0.2}, {"norm_power": 2.0}, {"timesteps": ()}]
)
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        MeanFlowConfig(**bad)


def test_it_trains_through_the_engine(tmp_path):
    teacher = AnalyticTeacher.gaussian(LAW.mean, LAW.cov)
    data = Latents(LAW.sample(spatial(torch.randn(64, 2))).float())
    run = settings(
        output_dir=str(tmp_path), student="full", max_train_steps=3, train_batch_size=8, checkpointing_steps=3
    )
    trainer = Trainer(method(), teacher, data, run)
    trainer.train()
    assert trainer.step == 3
