"""SDXL-Lightning (arXiv 2402.13929): progressive distillation without its discriminator, and what that sees with it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from functools import partial

import pytest
import torch
from method_helpers import SD, batch_of, context, denoiser_of, f64, settle, spatial
from straight_helpers import KINDS, LAW, Free, PairData, noise
from trajectory_helpers import (
    FLOW,
    MU,
    JumpNet,
    exact_map,
    factor,
    gaussian_denoiser,
    jumps,
    levels,
    mapped,
    orders,
    product_map,
    student_loss,
)

from fastdiff.diffusion import jump, teacher_times
from fastdiff.engine import Settings, Trainer
from fastdiff.engine.networks import build_networks
from fastdiff.methods._adversarial import Noisy
from fastdiff.methods.base import Batch
from fastdiff.methods.lightning import CRITIC, HEAD, Lightning, LightningConfig, with_extra_starts
from fastdiff.methods.progressive import PREVIOUS, Progressive, ProgressiveConfig
from fastdiff.models.analytic import ExactNetwork
from fastdiff.models.analytic_networks import AffinePerBin
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.teacher import Teacher

ROWS = 24


def method(**config) -> Lightning:
    return Lightning(LightningConfig(**{"num_inference_steps": 4, "teacher_steps": 2} | config))


def free(case: str = "vp") -> Free:
    slope, offset = torch.tensor([[0.3, 0.1], [0.0, 0.5]]), torch.tensor([0.2, -0.1])
    return Free(slope.double(), offset, *KINDS[case])


# Without a discriminator


@pytest.mark.parametrize("case", KINDS)
def test_with_squares_it_is_progressive_distillation_below_the_first_step(case):
    """Loss and gradient; at the first step the input is plain noise instead of noised data."""
    schedule, kind = KINDS[case]
    student = free(case)
    denoiser = denoiser_of(ExactNetwork(LAW, schedule, kind), schedule, kind, student=student)
    batch, found = batch_of(ROWS, 2, spatial(noise(ROWS))), []
    numbers = torch.arange(ROWS) % 4
    for one in (method(objective="mse"), Progressive(ProgressiveConfig(num_inference_steps=4, teacher_steps=2))):
        steps = one._steps.host
        below = numbers.clone()
        below[steps[numbers, 0] == 999] = int((steps[:, 0] != 999).nonzero()[0])
        (value,) = one.student_loss(batch, context(denoiser, ROWS, {"step": below})).values()
        found.append((value, *torch.autograd.grad(value, list(student.parameters()))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_the_first_step_is_fed_plain_noise():
    denoiser = denoiser_of(ExactNetwork(LAW, SD, "epsilon"), student=free())
    lightning = method()
    first = int((lightning._steps.host[:, 0] == 999).nonzero()[0])
    ctx = context(denoiser, 2, {"step": torch.tensor([first, (first + 1) % 4])})
    x0 = spatial(noise(2))
    step = lightning.transition(batch_of(2, 2, x0), ctx)
    eps = ctx.random.normal("eps", (2, 1, 1)).double()
    assert step.start.t[0] == 999 and torch.equal(step.start.x_t[0], eps[0])
    noised = SD.add_noise(x0, eps, step.start.t)
    torch.testing.assert_close(step.start.x_t[1], noised[1], rtol=0, atol=0)


@pytest.mark.parametrize("case", KINDS)
def test_both_ends_are_where_student_and_teacher_step_to(case):
    schedule, kind = KINDS[case]
    student, teacher = free(case), ExactNetwork(LAW, schedule, kind)
    denoiser = denoiser_of(teacher, schedule, kind, student=student)
    ctx = context(denoiser, 8, {"step": torch.arange(8) % 4})
    step = method().transition(batch_of(8, 2, spatial(noise(8))), ctx)
    labels = batch_of(8, 2).cond
    prediction = denoiser(step.start.x_t, step.start.t, labels, "student")
    torch.testing.assert_close(step.fake, jump(prediction, step.end), rtol=0, atol=1e-12)
    starts = step.index + 250
    middle = schedule.time_of_index(((starts + step.index) / 2).round())
    x = jump(denoiser(step.start.x_t, schedule.time_of_index(starts), labels, "teacher"), middle)
    x = jump(denoiser(x, middle, labels, "teacher"), step.end)
    torch.testing.assert_close(step.real, x, rtol=0, atol=1e-5 if kind == "flow" else 1e-12)
    assert step.fake.requires_grad and not step.real.requires_grad
    clean = step.index == -1
    assert clean.any() and torch.allclose(step.fake[clean], prediction.x0[clean])


def test_a_student_that_is_its_teacher_takes_the_same_step():
    denoiser = denoiser_of(ExactNetwork(LAW, SD, "epsilon"), student=ExactNetwork(LAW, SD, "epsilon"))
    step = method(teacher_steps=1).transition(batch_of(8, 2, spatial(noise(8))), context(denoiser, 8))
    torch.testing.assert_close(step.fake, step.real, rtol=0, atol=1e-13)


def test_a_chain_of_stages_learns_the_product_of_the_finest_teachers_steps():
    """128 DDIM steps by 32, 8, 4, 2, 1: each stage fits its teacher, the student before it, and the last takes one step."""
    previous, x = None, f64([-1.0, 2.0])
    for steps, many in ((32, 4), (8, 4), (4, 2), (2, 2), (1, 2)):
        stage = PREVIOUS if previous else "teacher"
        config = {"num_inference_steps": steps, "teacher_steps": many, "first_timestep": 991, "stage_teacher": stage}
        one = method(objective="mse", **config)
        if not previous:
            finest = [-1, *sorted(one._steps.host[:, :-1].flatten().tolist())]
        student = AffinePerBin(1, sorted(one._steps.host[:, 0].tolist())).double()
        denoiser = gaussian_denoiser(student=student, **({PREVIOUS: previous} if previous else {}))
        draws = {"step": torch.arange(4 * steps) % steps}
        learn = partial(student_loss, one, denoiser, 4 * steps, draws)
        settle(lambda learn=learn: learn()["progressive"], denoiser.roles.parameters("student"))
        assert learn()["progressive"] < 1e-20
        previous = copy.deepcopy(student).requires_grad_(False)
    assert len(finest) == 129
    torch.testing.assert_close(jumps(denoiser, x, 991, -1), mapped(product_map(finest), x, 991, -1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("index", [399, 799, 999])
def test_residual_of_the_exact_map_is_of_first_order_in_the_students_step(index):
    """With squares, in the clean sample and on a flow; index 999 is fed plain noise."""
    found = []
    for steps in (5, 10, 20, 40):
        number = torch.full((64,), steps - (index + 1) * steps // 1000)
        student = JumpNet(exact_map(FLOW), lambda i, steps=steps: i - 1000 // steps, FLOW)
        denoiser, one = gaussian_denoiser(FLOW, student=student), method(objective="mse", num_inference_steps=steps)
        found.append(student_loss(one, denoiser, 64, {"step": number})["progressive"].item())
    assert orders(found) == pytest.approx([1] * 3, abs=0.2)
    assert orders(found)[-1] == pytest.approx(1, abs=0.05)


def test_sampling_is_stock_trailing_ddim():
    assert method().sampler().timesteps == tuple(int(t) for t in teacher_times(SD, 4)[:-1])
    assert len(method(num_inference_steps=1).sampler()) == 1


# The discriminator


@pytest.fixture
def networks(tiny_sd):
    def build(**config):
        lightning = method(**config)
        settings = Settings(student="lora", fake_score="lora", lora_rank=2)
        found = build_networks(lightning, Teacher(copy.deepcopy(tiny_sd), "tiny"), settings)
        torch.manual_seed(0)
        for group in ("student", CRITIC):
            for parameter in found.parameters(group):
                torch.nn.init.normal_(parameter, std=0.1)
        return lightning, found

    return build


def sd_batch(rows: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(rows + 1, 16, 16, generator=generator)
    latents = torch.randn(rows, 4, 16, 16, generator=generator)
    cond, null = ({"prompt_embeds": part} for part in (embeds[:rows], embeds[rows:]))
    return Batch(torch.arange(rows), Conditioning(cond), Conditioning(null), (4, 16, 16), latents)


def ends(lightning, networks, batch):
    ctx = context(networks.denoiser, len(batch), {"step": torch.tensor([0, 2])}, modules=networks.modules)
    return ctx, lightning.transition(batch, ctx)


@pytest.mark.parametrize("objective", ["conditional", "unconditional"])
def test_gradients_of_both_players(networks, objective):
    lightning, built = networks(objective=objective)
    batch = sd_batch()
    ctx = context(built.denoiser, 2, modules=built.modules)
    value = lightning.student_loss(batch, ctx)["gan"]
    value.backward(inputs=built.parameters("student"))
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in built.parameters("student"))
    for p in built.parameters("student"):
        p.grad = None
    loss = lightning.critic_loss(batch, ctx)["discriminator"]
    loss.backward()
    assert all(p.grad is None for p in built.parameters("student"))
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in built.parameters(CRITIC))
    assert all(p.grad is not None for p in built.parameters(HEAD))
    own = {id(p) for group in ("student", CRITIC) for p in built.roles.parameters(group)}
    assert all(p.grad is None for p in built.roles.base.parameters() if id(p) not in own)


def test_without_the_weights_of_the_start_the_conditional_form_is_the_unconditional_one(networks):
    lightning, built = networks(objective="conditional")
    plain, bare = networks(objective="unconditional")
    wide, narrow = built.modules[HEAD][0].layers[0], bare.modules[HEAD][0].layers[0]
    assert wide.in_channels == 2 * narrow.in_channels
    with torch.no_grad():
        for own, other in zip(bare.modules[HEAD].parameters(), built.modules[HEAD].parameters(), strict=True):
            if own.shape == other.shape:
                own.copy_(other)
        narrow.weight.copy_(wide.weight[:, : narrow.in_channels])
        wide.weight[:, narrow.in_channels :] = 0
        batch = sd_batch()
        logits = []
        for one, networks_ in ((lightning, built), (plain, bare)):
            ctx, step = ends(one, networks_, batch)
            (found,) = one.logits([Noisy(step.real, step.end.clamp_min(0))], step.start, batch.cond, ctx)
            logits.append(found)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)


def test_only_the_conditional_form_sees_which_end_belongs_to_which_start(networks):
    """Ends exchanged between samples of one time and prompt have the same law; as transitions they are wrong."""
    for objective, blind in (("conditional", False), ("unconditional", True)):
        lightning, built = networks(objective=objective)
        batch = sd_batch()
        batch = dataclasses.replace(batch, cond=batch.cond[torch.tensor([0, 0])])
        ctx = context(built.denoiser, 2, {"step": torch.tensor([1, 1])}, modules=built.modules)
        with torch.no_grad():
            step = lightning.transition(batch, ctx)
            ctx.store["step"] = dataclasses.replace(step, fake=step.real)
            right = lightning.critic_loss(batch, ctx)["discriminator"]
            ctx.store["step"] = dataclasses.replace(step, fake=step.real.flip(0))
            exchanged = lightning.critic_loss(batch, ctx)["discriminator"]
        assert torch.isclose(right, exchanged, rtol=1e-5, atol=1e-6).item() == blind


def test_losses_are_the_softplus_pair(networks):
    lightning, built = networks(objective="unconditional")
    batch = sd_batch()
    ctx = context(built.denoiser, 2, modules=built.modules)
    student = lightning.student_loss(batch, ctx)["gan"].item()
    step = ctx.store["step"]
    times = step.end.clamp_min(0)
    fake, real = lightning.logits([Noisy(step.fake, times), Noisy(step.real, times)], step.start, batch.cond, ctx)
    softplus = torch.nn.functional.softplus
    assert student == pytest.approx(softplus(-fake).mean().item(), rel=1e-4)
    expected = softplus(fake).mean() + softplus(-real).mean()
    assert lightning.critic_loss(batch, ctx)["discriminator"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_ends_are_judged_at_noisier_times_of_the_list_only():
    denoiser = denoiser_of(ExactNetwork(LAW, SD, "epsilon"), student=free())
    lightning = method(num_inference_steps=2, renoise_timesteps=(10, 250, 500, 750))
    steps = lightning._steps.host
    rows = 64
    ctx = context(denoiser, rows, {"step": torch.arange(rows) % 2})
    step = lightning.transition(batch_of(rows, 2, spatial(noise(rows))), ctx)
    fake, real = (
        lightning.judged(x, step, ctx, "gan", name) for name, x in (("fake", step.fake), ("real", step.real))
    )
    assert torch.equal(fake.t, real.t)
    seen = {end: set(fake.t[step.index == end].tolist()) for end in steps[:, -1].tolist()}
    assert seen == {-1: {10.0, 250.0, 500.0, 750.0}, 499: {499.0, 500.0, 750.0}}
    where = fake.t == 499
    torch.testing.assert_close(fake.x_t[where], step.fake[where])
    far = (fake.t == 750) & (step.index == -1)
    alpha, sigma = SD.alpha(750.0), SD.sigma(750.0)
    noises = [(one.x_t - alpha * x)[far] / sigma for one, x in ((fake, step.fake), (real, step.real))]
    assert not torch.isclose(noises[0], noises[1]).any()
    draw = ctx.random.normal("gan/fake", (2, 1, 1)).double()[far]
    torch.testing.assert_close(noises[0], draw, rtol=0, atol=1e-9)


def test_steps_that_do_not_divide_begin_where_the_sampler_does():
    """Three steps from 999 begin at 998, at plain noise; no extra time lies above."""
    lightning = method(num_inference_steps=3)
    assert lightning.sampler().timesteps == (998, 665, 332)
    denoiser = denoiser_of(ExactNetwork(LAW, SD, "epsilon"), student=free())
    ctx = context(denoiser, 3, {"step": torch.arange(3)})
    start = lightning.transition(batch_of(3, 2, spatial(noise(3))), ctx).start
    assert start.t.tolist() == [998.0, 665.0, 332.0]
    torch.testing.assert_close(start.x_t[0], ctx.random.normal("eps", (2, 1, 1)).double()[0])
    with pytest.raises(ValueError, match="extra_timesteps must be from 0 to 997"):
        method(num_inference_steps=3, extra_timesteps=(998,))


def test_a_student_of_one_step_also_learns_the_times_its_teacher_knows():
    """The rest of each of the teacher's steps, against its solution walked by hand; they all end clean."""
    student = free()
    denoiser = denoiser_of(ExactNetwork(LAW, SD, "epsilon"), student=student)
    lightning = method(num_inference_steps=1, extra_timesteps=(749, 499, 249))
    ctx = context(denoiser, 4, {"step": torch.arange(4)})
    x0, labels = spatial(noise(4)), batch_of(4, 2).cond
    step = lightning.transition(batch_of(4, 2, x0), ctx)
    assert step.start.t.tolist() == [999.0, 749.0, 499.0, 249.0] and step.index.tolist() == [-1] * 4
    for row, way in enumerate([(999, 499, -1), (749, 499, -1), (499, -1), (249, -1)]):
        x = step.start.x_t[row : row + 1]
        for start, end in itertools.pairwise(way):
            t, s = (torch.tensor([float(index)]).double() for index in (start, end))
            alpha, sigma = SD.alpha(t), SD.sigma(t)
            clean = LAW.denoise(x, t, SD)
            alpha_s, sigma_s = (1.0, 0.0) if end < 0 else (SD.alpha(s), SD.sigma(s))
            x = alpha_s * clean + sigma_s * (x - alpha * clean) / sigma
        torch.testing.assert_close(step.real[row : row + 1], x, rtol=0, atol=1e-12)
    eps = ctx.random.normal("eps", (2, 1, 1)).double()
    torch.testing.assert_close(step.start.x_t[1:], SD.add_noise(x0, eps, step.start.t)[1:], rtol=0, atol=0)
    torch.testing.assert_close(step.fake, denoiser(step.start.x_t, step.start.t, labels, "student").x0)
    many = lightning.transition(batch_of(200, 2, spatial(noise(200))), context(denoiser, 200)).start.t
    assert sorted(set(many.tolist())) == [249.0, 499.0, 749.0, 999.0]


def test_extra_times_lead_to_the_end_of_their_step_by_the_teachers_grid():
    steps = torch.tensor([[999, 749, 499], [499, 249, -1]])
    found = with_extra_starts(steps, (249, 749, 499, 600, 749))
    further = [[749, 749, 499], [600, 600, 499], [249, 249, -1]]
    assert found.tolist() == steps.tolist() + further
    assert with_extra_starts(steps, ()).tolist() == steps.tolist()


def line(x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """(slope, offset) of an affine map from two of its values."""
    slope = ((y[1] - y[0]) / (x[1] - x[0])).item()
    return slope, (y[0] - slope * x[0]).item()


class Oracle(Lightning):
    """Judges by the exact logarithm of the ratio of the laws of both ends, in one dimension, from plain noise."""

    def transition(self, batch, ctx):
        step = super().transition(batch, ctx)
        self.maps = [line(step.start.x_t, end.detach()) for end in (step.real, step.fake)]
        return step

    def logits(self, ends, start, cond, ctx):
        return [(self._log_density(end, start, 0) - self._log_density(end, start, 1)).flatten(1) for end in ends]

    def _log_density(self, end: Noisy, start: Noisy, which: int) -> torch.Tensor:
        (slope, offset), (alpha, sigma) = self.maps[which], levels(end.t)
        seen = self.config.objective == "conditional"
        mean = offset + slope * start.x_t if seen else torch.full_like(end.x_t, offset)
        variance = sigma**2 + (0 if seen else (alpha * slope) ** 2)
        alpha, variance = (value[:, None, None, None] for value in (alpha, variance))
        return -((end.x_t - alpha * mean) ** 2) / (2 * variance) - variance.log() / 2


@pytest.mark.parametrize(
    ("objective", "share", "rests"),
    [
        ("unconditional", 1.0, True),
        ("unconditional", -1.0, True),
        ("unconditional", 0.5, False),
        ("unconditional", -0.5, False),
        ("conditional", 1.0, True),
        ("conditional", -1.0, False),
    ],
)
def test_a_mirrored_step_is_as_good_to_the_unconditional_critic_alone(objective, share, rests):
    """The law of the end is that of the teacher at both slopes +-a; the transition is at +a only."""
    slope = factor(999, 499) * factor(499, -1)
    offset = MU - slope * levels(999)[0].item() * MU
    student = Free(f64([[share * slope]]), f64([offset]))
    denoiser = gaussian_denoiser(student=student)
    config = LightningConfig(num_inference_steps=1, teacher_steps=2, objective=objective, renoise_timesteps=(100,))
    lightning = Oracle(config)
    batch, ctx = batch_of(2048, 1, torch.zeros(2048, 1, 1, 1).double()), context(denoiser, 2048)
    loss = lightning.student_loss(batch, ctx)["gan"]
    (gradient,) = torch.autograd.grad(loss, [student.slope])
    critic = lightning.critic_loss(batch, ctx)["discriminator"].item()
    assert (abs(gradient.item()) < 1e-12) == rests
    assert (abs(critic - 2 * math.log(2)) < 1e-12) == rests and (critic < 2 * math.log(2) - 1e-3) != rests
    if objective == "unconditional" and not rests:
        assert gradient.item() * share < 0  # away from zero, on either side


# Stages and training


def test_stages_go_on_from_one_another():
    first, second = method(stage_teacher="teacher"), method(stage_teacher="previous")
    again = method(stage_teacher="kept", objective="unconditional")
    assert (dict(first.frozen()), dict(second.frozen()), dict(again.frozen())) == (
        {}, {PREVIOUS: "student"}, {PREVIOUS: "student"},
    )  # fmt: skip
    assert first.inherits() == {"student": ("student",)}
    assert second.inherits() == {"student": ("student",), PREVIOUS: ("student",)}
    assert again.inherits() == {"student": ("student",), PREVIOUS: (PREVIOUS,)}
    assert set(method(objective="mse").groups()) == {"student"}
    assert set(second.groups()) == {"student", CRITIC, HEAD}


def test_a_few_steps_train_student_and_critic(tiny_sd, tmp_path):
    z = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = Settings(
        output_dir=str(tmp_path), train_batch_size=2, lora_rank=2, report_to="none", resolution=32,
        validation_samples=0, max_train_steps=2, log_every=1, fake_score="full",
    )  # fmt: skip
    lightning = method(discriminator_learning_rate=1e-3)
    trainer = Trainer(lightning, Teacher(tiny_sd, "tiny"), PairData(z, z, ("a dog", "blue cat")), settings)
    before = {g: [p.detach().clone() for p in trainer.networks.parameters(g)] for g in ("student", CRITIC, HEAD)}
    trainer.train()
    for group, old in before.items():
        assert any(not torch.equal(a, b) for a, b in zip(old, trainer.networks.parameters(group), strict=True)), group
    assert (trainer.folder / "checkpoints" / "step-2" / f"{CRITIC}.safetensors").is_file()
    assert math.isfinite(trainer.seconds)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"renoise_timesteps": (1000,)}, "renoise_timesteps"),
        ({"extra_timesteps": (999,)}, "extra_timesteps"),
        ({"objective": "mse", "renoise_timesteps": (10,)}, "renoise_timesteps has no effect"),
        ({"loss_weight": "velocity"}, "loss_weight has no effect with the objective conditional"),
        ({"discriminator_learning_rate": 0.0}, "discriminator_learning_rate"),
        ({"stage_teacher": "kept", "guidance_scale": 6.0}, "guidance"),
        ({"stage_teacher": "previous", "guidance_scale": 6.0}, "guidance"),
    ],
)
def test_bad_settings_are_named(config, named):
    with pytest.raises(ValueError, match=named):
        LightningConfig(**config)
