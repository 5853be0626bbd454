"""SwiftBrush (arXiv 2312.05239) and PG-SB (arXiv 2412.02687): one guidance on both scores, and the image-text term."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from adversarial_cases import tiny_trainer
from gaussian_cases import COV, MU, A, B, denoiser_with_fake, divergence_gradient, draws, exactness, golden_setup
from method_helpers import (
    SD,
    AffineGenerator,
    LabelledGaussians,
    TableGenerator,
    batch_of,
    context,
    denoiser_of,
    f64,
    run,
    sigma_points,
    spatial,
)
from tiny_transformers import build

from fastdiff.data.source import PromptData
from fastdiff.diffusion import FlowSchedule, Gaussian
from fastdiff.engine import Settings, Trainer
from fastdiff.methods.diff_instruct import DiffInstruct, DiffInstructConfig
from fastdiff.methods.pg_sb import PGSB, PGSBConfig
from fastdiff.methods.swiftbrush import SwiftBrush, SwiftBrushConfig
from fastdiff.models.analytic import ExactNetwork
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.denoiser import Denoiser


def method(**config) -> SwiftBrush:
    return SwiftBrush(SwiftBrushConfig(**config))


def laws(*means: float, variance: float = 0.5) -> LabelledGaussians:
    """Two-dimensional Gaussians by label; the last is the unconditional one."""
    return LabelledGaussians([Gaussian(f64([m, -m]), variance * torch.eye(2).double()) for m in means])


def table_setup(rows: int = 5):
    """A free table of samples, and two conditional networks that disagree with and without prompt."""
    table = torch.randn(rows, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    student = TableGenerator(table)
    denoiser = denoiser_of(laws(1.0, -0.5), student=student, fake_score=laws(0.3, 2.0, variance=0.8))
    return student, denoiser


def gradient_of(one, denoiser, student, rows=5, **given):
    student.table.grad = None
    one.student_loss(batch_of(rows, 2), context(denoiser, rows, given))["distribution_matching"].backward()
    return student.table.grad


# The gradient


@pytest.mark.parametrize("w", [1.0, 4.5])
def test_gradient_is_the_guided_gap_of_noise_predictions_times_the_noise_variance(w):
    student, denoiser = table_setup()
    given = {"student/t": torch.tensor([20, 300, 500, 700, 980])}
    found = gradient_of(method(guidance_scale=w), denoiser, student, **given)
    batch, ctx = batch_of(5, 2), context(denoiser, 5, given)
    t = given["student/t"].double()
    x_t = SD.add_noise(spatial(student.table.detach()), ctx.random.normal("student/eps", (2, 1, 1)), t)
    null = batch.null.expand(5)
    eps = {
        role: denoiser(x_t, t, null, role).eps
        + w * (denoiser(x_t, t, batch.cond, role).eps - denoiser(x_t, t, null, role).eps)
        for role in ("teacher", "fake_score")
    }
    expected = (SD.sigma(t)[:, None] ** 2 * (eps["teacher"] - eps["fake_score"]).flatten(1)) / 10
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("schedule", "kind"), [(SD, "epsilon"), (FlowSchedule(), "flow")], ids=["vp", "flow"])
@pytest.mark.parametrize("index", [50, 900])
def test_expected_gradient_is_that_of_the_divergence_times_a_power_of_the_noise(schedule, kind, index):
    """Weight alpha sigma instead of (alpha / sigma)^2: the factor is sigma^3 / alpha."""
    points = sigma_points(4)
    student, denoiser = denoiser_with_fake(schedule, kind)
    ctx = context(denoiser, len(points), draws(points, 2, index))
    one = method(guidance_scale=1.0)
    (2 * one.student_loss(batch_of(len(points), 2), ctx)["distribution_matching"]).backward()
    t = schedule.time_of_index(torch.tensor(float(index))).double()
    weight = schedule.sigma(t) ** 3 / schedule.alpha(t)
    by_b, by_A = divergence_gradient(schedule, t)
    torch.testing.assert_close(student.b.grad, weight * by_b, **exactness(kind))
    torch.testing.assert_close(student.A.grad, weight * by_A, **exactness(kind))


@pytest.mark.parametrize("case", ["I", "II"])
def test_reverse_kl_golden_numbers(case):
    student, denoiser, points, (alpha, sigma), (gold_a, gold_b) = golden_setup(case)
    ctx = context(denoiser, len(points), draws(points, 1, 400))
    one = method(guidance_scale=1.0)
    one.student_loss(batch_of(len(points), 1), ctx)["distribution_matching"].backward()
    weight = alpha / sigma**3
    assert weight * student.A.grad.item() == pytest.approx(gold_a, abs=2e-10)
    assert weight * student.b.grad.item() == pytest.approx(gold_b, abs=2e-10)


@pytest.mark.parametrize("w", [1.0, 4.5, 7.5])
def test_a_fake_score_equal_to_the_teacher_gives_no_gradient_at_any_guidance(w):
    student, _ = table_setup()
    denoiser = denoiser_of(laws(1.0, -0.5), student=student, fake_score=laws(1.0, -0.5))
    assert gradient_of(method(guidance_scale=w), denoiser, student).abs().max() == 0
    assert gradient_of(PGSB(PGSBConfig()), denoiser, student).abs().max() == 0


def test_untrained_adapters_give_no_gradient_at_the_first_step(sd_denoiser, sd_batch):
    one = method(guidance_scale=4.5)
    (term,) = one.student_loss(sd_batch, context(sd_denoiser, len(sd_batch))).values()
    term.backward()
    rms = (2 * term.detach()).sqrt()
    assert rms < 1e-6
    with torch.no_grad():  # the same with a fake score that has moved
        for parameter in sd_denoiser.roles.parameters("fake_score"):
            parameter.add_(0.1)
    (moved,) = one.student_loss(sd_batch, context(sd_denoiser, len(sd_batch))).values()
    assert (2 * moved).sqrt() > 1e-3


def test_without_guidance_it_is_diff_instruct_times_alpha_sigma():
    student, denoiser = table_setup()
    given = {"student/t": torch.tensor([20, 300, 500, 700, 980])}
    levels = [f(given["student/t"].double())[:, None] for f in (SD.alpha, SD.sigma)]
    plain = gradient_of(DiffInstruct(DiffInstructConfig()), denoiser, student, **given)
    found = gradient_of(method(guidance_scale=1.0), denoiser, student, **given)
    torch.testing.assert_close(found, plain * levels[0] * levels[1], rtol=1e-10, atol=1e-13)


# Random guidance


def test_pg_sb_on_a_single_point_is_swiftbrush():
    student, denoiser = table_setup()
    fixed = gradient_of(method(guidance_scale=3.25), denoiser, student)
    ranged = gradient_of(PGSB(PGSBConfig(guidance_range=(3.25, 3.25))), denoiser, student)
    assert torch.equal(fixed, ranged)


def test_pg_sb_at_one_is_unguided():
    student, denoiser = table_setup()
    fixed = gradient_of(method(guidance_scale=1.0), denoiser, student)
    ranged = gradient_of(PGSB(PGSBConfig(guidance_range=(1.0, 1.0))), denoiser, student)
    torch.testing.assert_close(ranged, fixed, rtol=1e-12, atol=1e-14)


def test_pg_sb_gives_both_networks_the_same_draw_and_every_sample_its_own():
    _, denoiser = table_setup()
    ctx = context(denoiser, 2000, seed=3)
    asks = PGSB(PGSBConfig()).asks(batch_of(2000, 2), ctx)
    assert [ask.role for ask in asks] == ["teacher", "fake_score"]
    w = asks[0].guidance
    assert torch.equal(w, asks[1].guidance)
    assert w.shape == (2000,) and w.min() > 0.5 and w.max() < 4.0
    assert w.mean().item() == pytest.approx(2.25, abs=0.08) and len(w.unique()) > 1900
    other = PGSB(PGSBConfig()).asks(batch_of(2000, 2), context(denoiser, 2000, step=1, seed=3))
    assert not torch.equal(w, other[0].guidance)


def test_random_guidance_scales_the_guidance_of_each_sample():
    """The gradient is affine in w: three ranges of one point each are on a line, sample by sample."""
    student, denoiser = table_setup()
    low, middle, high = (
        gradient_of(PGSB(PGSBConfig(guidance_range=(w, w))), denoiser, student) for w in (0.5, 2.0, 3.5)
    )
    torch.testing.assert_close(middle, (low + high) / 2, rtol=1e-9, atol=1e-13)
    assert (high - low).abs().min() > 1e-4


# The fake score


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow"])
def test_fake_score_loss_is_the_noise_error_times_the_squared_signal(kind):
    points = sigma_points(4)
    student, fake = AffineGenerator(A, B, kind=kind), AffineGenerator(0.4 * A, B, kind=kind)
    base = ExactNetwork(Gaussian(MU, COV), SD, kind)
    denoiser = denoiser_of(base, SD, kind, student=student, fake_score=fake)
    given = {
        "student/0": spatial(points[:, :2]),
        "critic/eps": spatial(points[:, 2:]),
        "critic/t": torch.tensor([0, 50, 200, 400, 600, 800, 950, 999]),
        "critic/null": 0.5,
    }
    loss = method().critic_loss(batch_of(8, 2), context(denoiser, 8, given))["denoising"]
    t = given["critic/t"].double()
    alpha, sigma = SD.alpha(t)[:, None], SD.sigma(t)[:, None]
    x, eps = points[:, :2].double() @ A.T + B, points[:, 2:].double()
    predicted = ((alpha * x + sigma * eps) - alpha * ((alpha * x + sigma * eps) @ (0.4 * A).T + B)) / sigma
    torch.testing.assert_close(loss, (alpha**2 * (predicted - eps) ** 2).mean(), rtol=1e-10, atol=1e-12)
    loss.backward()
    assert fake.A.grad.abs().max() > 0 and student.A.grad is None


@pytest.mark.parametrize(("drawn", "dropped"), [(0.05, True), (0.15, False)])
def test_a_tenth_of_the_fake_scores_steps_has_no_prompts_at_all(drawn, dropped):
    seen = []

    class Spy(LabelledGaussians):
        def forward(self, x_t, time, labels):
            seen.append(labels)
            return super().forward(x_t, time, labels)

    fake = Spy([Gaussian(MU, COV), Gaussian(-MU, COV)])
    denoiser = denoiser_of(laws(1.0, -0.5), student=AffineGenerator(A, B), fake_score=fake)
    method().critic_loss(batch_of(4, 2), context(denoiser, 4, {"critic/null": drawn}))
    assert seen[0].tolist() == ([-1] * 4 if dropped else [0] * 4)


def test_a_fake_score_that_embeds_guidance_is_never_asked_at_one_it_was_not_trained_at(monkeypatch, tmp_path):
    told, tell = defaultdict(set), Denoiser._told_guidance

    def spy(self, asks, times):
        strengths = tell(self, asks, times)
        for ask, own in zip(asks, strengths.chunk(len(asks)), strict=True):
            told[ask.role] |= set(own.tolist())
        return strengths

    monkeypatch.setattr(Denoiser, "_told_guidance", spy)
    flux = build("flux")
    for one in (method(), PGSB(PGSBConfig())):
        with pytest.raises(ValueError, match="embeds guidance"):
            tiny_trainer(one, flux, tmp_path)
    unguided = method(guidance_scale=1.0)
    own = {"resolution": 32, "max_train_steps": 1, "lora_target_modules": ()}
    assert tiny_trainer(unguided, flux, tmp_path, **own).train() == "done"
    assert told == {"student": {3.5}, "teacher": {1.0}, "fake_score": {3.5}}


# The image-text term


class DotScorer:
    """Images and texts are their own embeddings."""

    name, sha256 = "dot", ""

    def image_embedding(self, images):
        return torch.nn.functional.normalize(images.flatten(1), dim=1)

    def text_embedding(self, prompts):
        return torch.tensor([{"right": (1.0, 0.0), "up": (0.0, 1.0)}[p] for p in prompts], dtype=torch.float64)


def with_prompts(denoiser, rows, step=0, **given):
    from dataclasses import replace

    batch = replace(batch_of(rows, 2), prompts=("right", "up") * (rows // 2))
    ctx = context(denoiser, rows, given, step=step)
    ctx.scorer, ctx.decode = DotScorer(), lambda latents: 2 * latents
    return batch, ctx


def test_clamped_term_pulls_only_samples_that_miss_their_prompt():
    angles = torch.tensor([1.2, 0.1, -2.0, 1.4]).double()  # cosines .36, .0998, -.42, .985
    student = TableGenerator(torch.stack([angles.cos(), angles.sin()], 1))
    denoiser = denoiser_of(laws(1.0, -0.5), student=student, fake_score=laws(1.0, -0.5))
    batch, ctx = with_prompts(denoiser, 4)
    one = method(clip_weight=0.1)
    term = one.student_loss(batch, ctx)["clip"]
    cosines = torch.stack([angles[0].cos(), angles[1].sin(), angles[2].cos(), angles[3].sin()])
    torch.testing.assert_close(term, 0.1 * (0.37 - cosines).clamp_min(0).mean(), rtol=1e-10, atol=1e-12)
    term.backward()
    pulled = student.table.grad.abs().sum(1) > 0
    assert pulled.tolist() == [True, True, True, False]
    assert one.needs_scorer() and not method().needs_scorer()


def test_its_weight_may_fall_to_nothing():
    falling = method(clip_weight=0.1, clip_steps=200)
    assert [falling.clip_weight_at(step) for step in (0, 50, 200, 300)] == pytest.approx([0.1, 0.075, 0, 0])
    assert method(clip_weight=0.1).clip_weight_at(10**6) == 0.1


def test_nothing_is_decoded_for_a_term_that_has_fallen_to_nothing():
    _, denoiser = table_setup(4)
    decoded = []
    for step in (199, 200):
        batch, ctx = with_prompts(denoiser, 4, step=step)
        ctx.decode = lambda latents, step=step: decoded.append(step) or latents
        terms = method(clip_weight=0.1, clip_steps=200).student_loss(batch, ctx)
    assert decoded == [199] and set(terms) == {"distribution_matching"}


def test_data_without_prompts_is_refused():
    _, denoiser = table_setup(4)
    _, ctx = with_prompts(denoiser, 4)
    with pytest.raises(ValueError, match="captions"):
        method(clip_weight=0.1).student_loss(batch_of(4, 2), ctx)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"prompt_dropout": 1.5}, "prompt_dropout"),
        ({"guidance_range": (4.0, 0.5)}, "guidance_range"),
        ({"guidance_range": (4.0, float("inf"))}, "guidance_range must be .* finite"),
        ({"guidance_range": (0.5, 4.0), "guidance_scale": 2.0}, "guidance_scale has no effect with guidance_range"),
        ({"clip_threshold": 0.2, "clip_steps": 9}, "clip_threshold, clip_steps has no effect with clip_weight 0"),
        ({"clip_threshold": 2.0}, "clip_threshold"),
        ({"clip_steps": 0}, "clip_steps"),
        ({"clip_weight": -1.0}, "clip_weight"),
    ],
)
def test_bad_settings_are_named(config, named):
    with pytest.raises(ValueError, match=named):
        SwiftBrushConfig(**config)


# Training


def test_converges_to_the_teachers_law_with_an_exact_fake_score():
    torch.manual_seed(0)
    student, denoiser = denoiser_with_fake(SD)
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    rule = method(guidance_scale=1.0)
    run(rule, denoiser, {"student": optimizer}, batch_of(32, 2), 200, lambda step: decay.step())
    assert (student.b - MU).abs().max() < 2e-3
    assert (student.A @ student.A.T - COV).abs().max() < 2e-3


def test_trains_adapters_through_decoder_and_scorer_and_leaves_all_else_alone(tiny_sd, tmp_path):
    from fastdiff.models.teacher import Teacher

    settings = Settings(output_dir=str(tmp_path), max_train_steps=3, train_batch_size=2, lora_rank=4, report_to="none")
    teacher = Teacher(tiny_sd, "tiny")
    before = {name: p.detach().clone() for name, p in teacher.network.named_parameters()}
    data = PromptData(["a red apple", "a dog", "blue cat"])
    trainer = Trainer(PGSB(PGSBConfig(clip_weight=0.1, clip_threshold=1.0)), teacher, data, settings)
    start = {role: trainer.networks.roles.state_dict(role) for role in ("student", "fake_score")}
    start = {role: {name: tensor.clone() for name, tensor in state.items()} for role, state in start.items()}
    assert trainer.train() == "done"
    for role, state in start.items():
        assert any(not torch.equal(t, state[n]) for n, t in trainer.networks.roles.state_dict(role).items())
    frozen = dict(teacher.network.named_parameters())
    for name, tensor in before.items():
        now = frozen.get(
            name, frozen.get(name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias"))
        )
        assert torch.equal(now, tensor) and now.grad is None, name
    frozen_networks = [*trainer.scorer.tower.model.parameters(), *teacher.codec.autoencoder.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in frozen_networks)


@pytest.fixture
def sd_denoiser(tiny_sd):
    from fastdiff.models.families import StableDiffusion
    from fastdiff.models.roles import AdapterSpec, Roles

    spec = AdapterSpec(4, 4.0, ("to_q", "to_v", "conv1"))
    return Denoiser(Roles(tiny_sd.unet, {"student": spec, "fake_score": spec}), StableDiffusion(), SD, "epsilon")


@pytest.fixture
def sd_batch():
    from fastdiff.methods import Batch

    embeds = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    cond, null = (Conditioning({"prompt_embeds": rows}) for rows in (embeds[:2], embeds[2:]))
    return Batch(torch.arange(2), cond, null, (4, 16, 16))
