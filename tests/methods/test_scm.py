"""sCM (arXiv 2410.11081): zero tangent at the exact consistency function, the limit of small steps, warm-up, training."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from flow_map_helpers import LAW, ConsistencyNetwork, Latents, sd_batch, settings
from method_helpers import SD, batch_of, context, denoiser_of, f64, spatial
from torch import nn

from fastdiff.diffusion import FlowSchedule, Terminal, TrigSchedule, jump
from fastdiff.engine import Trainer
from fastdiff.engine.networks import build_networks
from fastdiff.methods.base import log_normal_time
from fastdiff.methods.scm import SCM, SCMConfig, tangent, trig_velocity
from fastdiff.models.analytic import AnalyticTeacher, ExactNetwork, pretrain
from fastdiff.models.analytic_networks import PointNet
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.tangents import Tangents
from fastdiff.models.teacher import Teacher

PROCESSES = {
    "epsilon": (SD, "epsilon", [4.5, 250.0, 612.25, 999.0]),
    "v_prediction": (SD, "v_prediction", [4.5, 250.0, 612.25, 999.0]),
    "flow": (FlowSchedule(), "flow", [0.03, 0.4, 0.75, 0.98]),
    "trig": (TrigSchedule(), "v_prediction", [0.05, 0.6, 1.2, 1.5]),
}


def method(**config) -> SCM:
    return SCM(SCMConfig(**{"tangent_warmup": 0} | config))


def noisy(process: str, rows: int = 4):
    schedule, kind, times = PROCESSES[process]
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, rows, 2, 1, 1, generator=generator, dtype=torch.float64)
    t = f64(times)
    return schedule, kind, schedule.add_noise(LAW.sample(x0), eps, t), t


def found_tangent(process: str, student: nn.Module, share: float = 1.0):
    schedule, kind, x_t, t = noisy(process)
    denoiser = denoiser_of(ExactNetwork(LAW, schedule, kind), schedule, kind, student=student)
    batch = batch_of(4, 2)
    teacher = denoiser(x_t, t, batch.cond, "teacher")
    g = tangent(teacher, batch, context(denoiser, 4), Tangents(), share)
    return g, denoiser, batch, x_t, t


@pytest.mark.parametrize("process", PROCESSES)
def test_the_tangent_vanishes_at_the_exact_consistency_function_and_only_there(process):
    schedule, kind, _ = PROCESSES[process]
    g, *_ = found_tangent(process, ConsistencyNetwork(schedule, kind))
    assert g.abs().max() < 1e-11
    g, *_ = found_tangent(process, ConsistencyNetwork(schedule, kind, tilt=0.2))
    assert g.flatten(1).norm(dim=1).min() > 1e-3


@pytest.mark.parametrize("process", PROCESSES)
def test_the_tangent_is_the_cosine_times_the_change_of_the_clean_prediction(process):
    """cos(a) df/da along the teacher's trajectory, the latter by a difference on the closed-form flow map."""
    schedule, kind, _ = PROCESSES[process]
    g, denoiser, batch, x_t, t = found_tangent(process, ConsistencyNetwork(schedule, kind, tilt=0.2))
    angle, h = schedule.kappa(t).atan(), 1e-6

    def f(a):
        time = schedule.time_of_kappa(a.tan())
        return denoiser(LAW.flow_map(x_t, t, time, schedule), time, batch.cond, "student").x0

    if schedule is SD:  # differences must not cross a knot of the table; the last index has a left side only
        change = (f(angle) - f(angle - h)) / h if t[-1] == 999 else None
        inner = (f(angle + h) - f(angle)) / h
        change = torch.cat([inner[:3], change[3:]])
    else:
        change = (f(angle + h) - f(angle - h)) / (2 * h)
    torch.testing.assert_close(g, angle.cos()[:, None, None, None] * change, rtol=1e-3, atol=1e-5)


def slope(loss: torch.Tensor, denoiser) -> torch.Tensor:
    weights = denoiser.roles.parameters("student")
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, materialize_grads=True)])


def test_small_steps_of_consistency_distillation_lead_to_it_at_first_order():
    """The gradient of discrete CD over h tan(a) tends to C times that of the loss, whose C + |g| is C."""
    torch.manual_seed(0)
    schedule, C = TrigSchedule(), 1e6
    teacher, student = ExactNetwork(LAW, schedule, "v_prediction"), PointNet(2, 1)
    denoiser = denoiser_of(teacher, schedule, "v_prediction", student=student)
    batch = batch_of(4, 2, LAW.sample(torch.randn(4, 2, 1, 1, dtype=torch.float64)))
    ctx = context(denoiser, 4, {"t": f64([0.4, 0.7, 1.0, 1.3]).tan().log()})
    scm = method(time_mean=0.0, time_std=1.0, tangent_constant=C)
    limit = C * slope(scm.student_loss(batch, ctx)["consistency"], denoiser)
    t = log_normal_time(ctx, "t", 0.0, 1.0)
    x_t = schedule.add_noise(batch.latents, ctx.random.normal("eps", (2, 1, 1)), t)
    teacher, errors = denoiser(x_t, t, batch.cond, "teacher"), []
    for h in (0.1, 0.05, 0.025, 0.0125):
        with torch.no_grad():
            target = denoiser(jump(teacher, t - h), t - h, batch.cond, "student").x0
        f = denoiser(x_t, t, batch.cond, "student").x0
        discrete = slope(((f - target) ** 2 / (h * t.tan())[:, None, None, None]).mean(), denoiser)
        errors.append(((discrete - limit).norm() / limit.norm()).item())
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders == pytest.approx([1, 1, 1], abs=0.15)
    assert errors[-1] < 0.05


def test_at_the_start_of_the_warm_up_the_student_regresses_the_teacher():
    g, denoiser, batch, x_t, t = found_tangent("epsilon", ConsistencyNetwork(SD, "epsilon", tilt=0.2), share=0.0)
    student, teacher = (denoiser(x_t, t, batch.cond, role).v for role in ("student", "teacher"))
    square = SD.alpha(t)[:, None, None, None] ** 2
    torch.testing.assert_close(g, -square * (student - teacher), rtol=1e-10, atol=1e-12)
    half = found_tangent("epsilon", ConsistencyNetwork(SD, "epsilon", tilt=0.2), share=0.5)[0]
    full = found_tangent("epsilon", ConsistencyNetwork(SD, "epsilon", tilt=0.2), share=1.0)[0]
    torch.testing.assert_close(half, (g + full) / 2, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("norm", "length"), [("rms", 2**0.5), ("l2", 1.0)])
def test_the_loss_is_the_square_of_the_normalised_tangent_and_pulls_the_velocity_along_it(norm, length):
    """With n = g / (|g| + c) a sample, the gradient is that of -2 mean(n F)."""
    torch.manual_seed(0)
    denoiser = denoiser_of(ExactNetwork(LAW, SD, "epsilon"), student=PointNet(2, 1))
    batch = batch_of(4, 2, LAW.sample(torch.randn(4, 2, 1, 1, dtype=torch.float64)))
    for step, warmup, share in ((0, 0, 1.0), (5, 10, 0.5), (30, 10, 1.0)):
        ctx = context(denoiser, 4, step=step)
        scm = method(tangent_norm=norm, tangent_warmup=warmup, tangent_constant=0.3)
        loss = scm.student_loss(batch, ctx)["consistency"]
        t = log_normal_time(ctx, "t", -1.0, 1.4)
        x_t = SD.add_noise(batch.latents, ctx.random.normal("eps", (2, 1, 1)), t)
        g = tangent(denoiser(x_t, t, batch.cond, "teacher"), batch, ctx, Tangents(), share).flatten(1)
        n = g / (g.norm(dim=1, keepdim=True) / length + 0.3)
        torch.testing.assert_close(loss, n.square().mean(), rtol=1e-9, atol=0)
        F = trig_velocity(denoiser(x_t, t, batch.cond, "student")).flatten(1)
        pull = slope(-2 * (n * F).mean(), denoiser)
        torch.testing.assert_close(slope(loss, denoiser), pull, rtol=1e-9, atol=1e-9 * pull.norm().item())


def test_levels_are_log_normal_and_held_at_the_last_index_the_teacher_knows():
    denoiser = denoiser_of(ExactNetwork(LAW, SD, "epsilon"))
    ctx = context(denoiser, 4, {"t": torch.tensor([-1.0, 0.0, 1.0, 5.0])})
    t = log_normal_time(ctx, "t", -1.0, 1.4)
    assert SD.kappa(t)[:3].log().tolist() == pytest.approx([-2.4, -1.0, 0.4], abs=1e-5)
    assert t[3] == 999 and math.degrees(SD.kappa(t[3]).atan()) == pytest.approx(86.09, abs=0.01)


def test_the_sampler_is_lcms_with_explicit_times():
    betas = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    for times in ((999,), (999, 499)):
        scheduler = method(timesteps=times).sampler().build_scheduler(betas, "epsilon")
        scheduler.set_timesteps(len(times))
        assert tuple(scheduler.timesteps.tolist()) == times


@pytest.mark.parametrize("bad", [{"time_std": 0.0}, {"tangent_constant": 0.0}, {"timesteps": (499, 999)}])
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SCMConfig(**bad)


# On diffusers' UNet, and through the engine


@pytest.mark.parametrize("student", ["lora", "full"])
def test_an_untrained_student_moves_off_the_guided_teacher_and_only_it_gets_gradients(tiny_sd, student):
    scm = method(guidance_scale=3.0, time_mean=0.0)
    networks = build_networks(scm, Teacher(tiny_sd), settings(student=student))
    denoiser, batch = networks.denoiser, sd_batch()
    ctx = context(denoiser, 2)
    loss = scm.student_loss(batch, ctx)["consistency"]
    loss.backward(inputs=networks.parameters("student"))
    gradients = [p.grad for p in networks.parameters("student") if p.grad is not None]
    assert any(g.abs().max() > 0 for g in gradients) and all(g.isfinite().all() for g in gradients)
    own = {id(p) for p in networks.parameters("student")}
    assert all(p.grad is None for p in networks.roles.base.parameters() if id(p) not in own)
    # Unguided, the student is the teacher: during the first warm-up step nothing moves at all.
    still = method(tangent_warmup=10).student_loss(batch, context(denoiser, 2))["consistency"]
    assert still < 1e-8


def gaussian_run(tmp_path, scm: SCM, steps: int, pretraining: int, **changes):
    teacher = AnalyticTeacher.gaussian(LAW.mean, LAW.cov, prediction_type="v_prediction")
    if pretraining:
        pretrain(teacher.start, teacher, pretraining)
    data = Latents(LAW.sample(spatial(torch.randn(512, 2, generator=torch.Generator().manual_seed(0)))).float())
    run = settings(output_dir=str(tmp_path), student="full", max_train_steps=steps, **changes)
    trainer = Trainer(scm, teacher, data, run)
    trainer.train()
    return trainer


def test_it_trains_through_the_engine(tmp_path):
    trainer = gaussian_run(tmp_path, method(tangent_warmup=2), 4, 0, train_batch_size=8, checkpointing_steps=4)
    assert trainer.step == 4


@pytest.mark.slow
def test_it_learns_the_consistency_function_of_a_gaussian(tmp_path):
    """One step of the teacher from pure noise is the mean; the student's has the teacher's spread."""
    scm = method(tangent_warmup=200, time_mean=0.0, time_std=1.4)
    changes = {"train_batch_size": 128, "learning_rate": 2e-4, "adam_beta2": 0.99, "lr_scheduler": "cosine"}
    trainer = gaussian_run(tmp_path, scm, 600, 600, checkpointing_steps=600, **changes)
    denoiser = trainer.networks.denoiser
    z = spatial(torch.randn(256, 2, generator=torch.Generator().manual_seed(1)))
    cond = Conditioning({"labels": torch.zeros(256, dtype=torch.int64)})
    t = torch.full((256,), 999.0)
    with torch.no_grad():
        student, teacher = (denoiser(z, t, cond, role).x0.double() for role in ("student", "teacher"))
    exact = LAW.flow_map(z.double(), t, Terminal.CLEAN, SD)
    assert (teacher - exact).std() > 0.7
    assert (student - exact).std() < 0.4
