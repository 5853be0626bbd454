"""Progressive distillation (arXiv 2202.00512): the implied clean sample, the chain of stages, grids, weights."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from method_helpers import SD, batch_of, context, f64, settle
from trajectory_helpers import (
    FLOW,
    KINDS,
    LAW,
    JumpNet,
    exact_map,
    factor,
    gaussian_denoiser,
    images,
    jumps,
    levels,
    mapped,
    orders,
    product_map,
    settings,
    student_loss,
)

from fastdiff.diffusion import Prediction, jump
from fastdiff.engine import Trainer
from fastdiff.methods import Progressive, ProgressiveConfig
from fastdiff.methods.progressive import implied_clean, stage_steps
from fastdiff.models.analytic import ExactNetwork
from fastdiff.models.analytic_networks import AffinePerBin
from fastdiff.models.teacher import Teacher
from fastdiff.recipes.starting import start_from

SCHEDULES = pytest.mark.parametrize("schedule", [SD, FLOW], ids=["vp", "flow"])


def method(**config) -> Progressive:
    return Progressive(ProgressiveConfig(**config))


def next_on(steps: int):
    """The next index of the trailing grid of `steps`, whose last is the clean end."""
    return lambda index: index - 1000 // steps


# One step


@SCHEDULES
def test_the_implied_sample_is_the_only_one_whose_step_goes_there(schedule):
    z, z_s = torch.randn(4, 2, 3, dtype=torch.float64), torch.randn(4, 2, 3, dtype=torch.float64)
    t = schedule.time_of_index(torch.tensor([999.0, 749.0, 499.0, 124.0]))
    s = schedule.time_of_index(torch.tensor([499.0, 624.0, 19.0, 0.0]))
    x0 = implied_clean(z, t, z_s, s, schedule)
    torch.testing.assert_close(jump(Prediction.from_x0(x0, z, t, schedule), s), z_s, rtol=1e-12, atol=1e-12)
    clean = schedule.time_of_index(torch.full((4,), -1.0))
    assert torch.equal(implied_clean(z, t, z_s, clean, schedule), z_s)


@SCHEDULES
@pytest.mark.parametrize("weight", ["truncated_snr", "snr_plus_one", "velocity"])
def test_loss_is_the_weighted_error_of_the_clean_sample(schedule, weight):
    """A student that is off by a constant: the weight times its square, at each step of the grid."""
    steps = stage_steps(ProgressiveConfig(num_inference_steps=4))
    fine = [-1, *sorted(steps[:, :-1].flatten().tolist())]

    class Off(JumpNet):
        def forward(self, x_t, time, labels):
            t = time if schedule is SD else time / 1000
            own = Prediction(super().forward(x_t, time, labels), KINDS[schedule], x_t, t, schedule).x0
            return Prediction.from_x0(own + 0.1, x_t, t, schedule).as_kind(KINDS[schedule])

    one = method(num_inference_steps=4, loss_weight=weight)
    student = Off(product_map(fine, schedule), next_on(4), schedule)
    for number, t in enumerate((999, 749, 499, 249)):
        draws = {"step": torch.full((8,), number)}
        found = student_loss(one, gaussian_denoiser(schedule, student=student), 8, draws)["progressive"].item()
        alpha, sigma = levels(t, schedule)
        snr = (alpha / sigma).item() ** 2
        expected = {"truncated_snr": max(snr, 1.0), "snr_plus_one": snr + 1, "velocity": sigma.item() ** -2}[weight]
        assert found == pytest.approx(0.01 * expected, rel=1e-5)


def test_a_teacher_that_needs_one_step_already_is_copied():
    """A teacher whose noise prediction stays the same along a step: two steps are one, the loss is zero."""

    class Constant(ExactNetwork):
        def forward(self, x_t, time, labels):
            return torch.full_like(x_t, 0.3)

    teacher = Constant(LAW, SD, "epsilon")
    denoiser = gaussian_denoiser(student=teacher)
    denoiser.roles.base = teacher
    assert student_loss(method(num_inference_steps=4), denoiser, 16)["progressive"].item() < 1e-24
    assert (
        student_loss(method(), gaussian_denoiser(student=ExactNetwork(LAW, SD, "epsilon")), 16)["progressive"] > 1e-6
    )


# Order


def residual(index: int, steps: int, teacher_steps: int) -> float:
    """The loss of the ODE's own map at one step of the student's, on a flow."""
    one = method(num_inference_steps=steps, teacher_steps=teacher_steps)
    number = torch.full((64,), steps - (index + 1) * steps // 1000)
    denoiser = gaussian_denoiser(FLOW, student=JumpNet(exact_map(FLOW), next_on(steps), FLOW))
    return student_loss(one, denoiser, 64, {"step": number})["progressive"].item()


@pytest.mark.parametrize("index", [399, 799])
def test_residual_of_the_exact_map_is_of_first_order_in_the_students_step(index):
    """Two teacher steps miss the end by the square of their length, which a clean sample is told over the length."""
    found = [residual(index, steps, 2) for steps in (5, 10, 20, 40)]
    assert orders(found) == pytest.approx([1] * 3, abs=0.2)
    assert orders(found)[-1] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("index", [249, 499, 999])
def test_residual_of_the_exact_map_is_of_first_order_in_the_teachers_step(index):
    found = [residual(index, 4, teacher_steps) for teacher_steps in (2, 4, 8, 16, 32)]
    assert orders(found) == pytest.approx([1] * 4, abs=0.05)
    assert orders(found)[-1] == pytest.approx(1, abs=0.02)


# Chain


@SCHEDULES
def test_stages_multiply_to_the_finest_teachers_steps(schedule):
    """8 of 2 teacher steps each, then 4, 2, 1: each stage's optimum has zero loss against the one before."""
    finest = [-1, *sorted(stage_steps(ProgressiveConfig(num_inference_steps=8))[:, :-1].flatten().tolist())]
    assert len(finest) == 17
    previous = None
    for steps in (8, 4, 2, 1):
        student = JumpNet(product_map(finest, schedule), next_on(steps), schedule)
        roles = {"student": student} | ({"previous": previous} if previous else {})
        stage = "previous" if previous else "teacher"
        denoiser = gaussian_denoiser(schedule, **roles)
        draws = {"step": torch.arange(steps).repeat(8)}
        one = method(num_inference_steps=steps, stage_teacher=stage)
        loss = student_loss(one, denoiser, 8 * steps, draws)["progressive"].item()
        assert loss < (1e-20 if schedule is SD else 1e-11)
        previous = student
    x = torch.tensor([-1.0, 2.0], dtype=torch.float64)[:, None, None, None]
    t = schedule.time_of_index(torch.full((2,), 999.0))
    last = gaussian_denoiser(schedule, student=previous)(x, t, batch_of(2, 1).cond, "student").x0
    golden = 1.0
    for high, low in zip(finest[:0:-1], finest[-2::-1], strict=True):
        golden *= factor(high, low, schedule)
    assert ((last[1] - last[0]) / 3).item() == pytest.approx(golden, abs=1e-12 if schedule is SD else 1e-6)
    whole = factor(999, -1, schedule)
    assert abs(golden - whole) > 0.1  # one step of the teacher itself is far off


def test_affine_students_that_learn_one_from_another_end_at_the_product_of_the_first_teachers_steps():
    """4 steps of 2, then 2, then 1, each learned; eight DDIM steps in one."""
    previous = None
    for steps in (4, 2, 1):
        stage = {"stage_teacher": "previous" if previous else "teacher"}
        starts = sorted(stage_steps(ProgressiveConfig(num_inference_steps=steps))[:, 0].tolist())
        roles = {"student": AffinePerBin(1, starts).double()} | ({"previous": previous} if previous else {})
        denoiser, one = gaussian_denoiser(**roles), method(num_inference_steps=steps, **stage)
        draws = {"step": torch.arange(steps).repeat(4)}
        learn = partial(student_loss, one, denoiser, 4 * steps, draws)
        settle(lambda learn=learn: learn()["progressive"], denoiser.roles.parameters("student"))
        previous = copy.deepcopy(denoiser.roles.network("student")).requires_grad_(False)
    x = f64([-1.0, 2.0])
    found = jumps(denoiser, x, 999, -1)
    torch.testing.assert_close(found, mapped(product_map([-1, *range(124, 1000, 125)]), x, 999, -1), rtol=0, atol=1e-8)


def test_the_first_stage_alone_is_guided():
    seen = {}

    class Spy(ExactNetwork):
        def forward(self, x_t, time, labels):
            seen.setdefault(self.name, []).append(len(x_t))
            return super().forward(x_t, time, labels)

    networks = {}
    for name in ("teacher", "previous", "student"):
        networks[name] = Spy(LAW, SD, "epsilon")
        networks[name].name = name
    denoiser = gaussian_denoiser(student=networks["student"], previous=networks["previous"])
    denoiser.roles.base = networks["teacher"]
    student_loss(method(guidance_scale=3.0, num_inference_steps=4), denoiser, 8)
    assert seen == {"student": [8], "teacher": [16, 16]}
    seen.clear()
    student_loss(method(stage_teacher="previous", num_inference_steps=4), denoiser, 8)
    assert seen == {"student": [8], "previous": [8, 8]}


# Grids


def test_teacher_steps_lie_on_whole_indices_between_the_students():
    assert stage_steps(ProgressiveConfig(num_inference_steps=2)).tolist() == [[999, 749, 499], [499, 249, -1]]
    assert stage_steps(ProgressiveConfig(num_inference_steps=4, teacher_steps=2))[:, 1].tolist() == [
        874,
        624,
        374,
        124,
    ]
    first = stage_steps(ProgressiveConfig(num_inference_steps=8, teacher_steps=4))
    assert first[0].tolist() == [999, 968, 936, 905, 874] and first[-1, -1] == -1


@pytest.mark.parametrize("steps", [32, 16, 8, 4, 2, 1])
def test_a_chain_from_32_steps_fits_from_991(steps):
    previous = {"stage_teacher": "previous"} if steps < 32 else {}
    one = method(num_inference_steps=steps, first_timestep=991, **previous)
    scheduler = one.sampler().build_scheduler(
        {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
        "epsilon",
    )
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == stage_steps(one.config)[:, 0].tolist()


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"num_inference_steps": 8, "stage_teacher": "previous"}, "991"),
        ({"num_inference_steps": 4, "stage_teacher": "previous", "guidance_scale": 3.0}, "baked in"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"teacher_steps": 0}, "teacher_steps"),
        ({"num_inference_steps": 500, "teacher_steps": 5}, "5 steps do not fit"),
    ],
)
def test_bad_settings_are_named(config, named):
    with pytest.raises(ValueError, match=named):
        ProgressiveConfig(**config)


def test_sampler_is_stock_ddim():
    assert method(num_inference_steps=4).sampler().timesteps == (999, 749, 499, 249)
    assert method(num_inference_steps=4).sampler().kind == "ddim"


# The engine


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_earlier_student_becomes_start_and_frozen_teacher(tiny_sd_folder, tmp_path, kind, ema):
    """As it was exported: averaged, where its run kept an average."""
    common = {"student": kind, "max_train_steps": 2, "learning_rate": 3e-2, "ema_decay": ema}
    first = Trainer(
        method(num_inference_steps=2, guidance_scale=2.0),
        Teacher.from_pretrained(tiny_sd_folder),
        images(),
        settings(tmp_path / "a", **common),
    )
    first.train()
    second = Trainer(
        method(num_inference_steps=1, stage_teacher="previous"),
        Teacher.from_pretrained(tiny_sd_folder),
        images(),
        settings(tmp_path / "b", **common),
    )
    with pytest.raises(ValueError, match="init_from"):
        start_from(second, None)
    start_from(second, str(tmp_path / "a"))
    roles = second.networks.roles
    with first.student.evaluated():
        learned = [p.clone() for p in first.networks.parameters("student")]
    for role in ("student", "previous"):
        assert all(torch.equal(a, b) for a, b in zip(learned, roles.parameters(role), strict=True))
    live = first.networks.parameters("student")
    assert (ema is None) == all(torch.equal(a, b) for a, b in zip(learned, live, strict=True))
    kept = [p.clone() for p in roles.parameters("previous")]
    second.train_step(next(second.batches.steps(0)))
    assert all(torch.equal(a, b) for a, b in zip(kept, roles.parameters("previous"), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(kept, roles.parameters("student"), strict=True))
    assert all(p.grad is None for p in roles.parameters("previous"))


def test_images_are_needed():
    denoiser = gaussian_denoiser(student=ExactNetwork(LAW, SD, "epsilon"))
    with pytest.raises(ValueError, match="train_data_dir"):
        method().student_loss(batch_of(3, 1), context(denoiser, 3))
