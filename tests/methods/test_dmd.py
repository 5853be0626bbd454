"""DMD (arXiv 2311.18828): DMD2's gradient with a regression on pairs; which rows start from which noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gaussian_cases import COV, MU, denoiser_with_fake, draws
from method_helpers import batch_of, context, f64, signs

from fastdiff.data.source import PromptData
from fastdiff.engine import Settings, Trainer
from fastdiff.methods.dmd import DMD, DMDConfig
from fastdiff.methods.dmd2 import DMD2, DMD2Config

ROWS = 6


def method(**config) -> DMD:
    in_latents = {"regression_loss": "latent_l2"} if config.get("regression_weight", 1) else {}
    return DMD(DMDConfig(**{"guidance_scale": 1.0} | in_latents | config))


def pairs(rows: int = ROWS, seed: int = 0):
    """Noise and sample of a teacher that maps z to root(S) z + mu in one step."""
    z = torch.randn(rows, 2, 1, 1, generator=torch.Generator().manual_seed(seed))
    y = (z.double().flatten(1) @ torch.linalg.cholesky(COV).T + MU)[:, :, None, None]
    return z, y


def batch_with_pairs(rows: int = ROWS, seed: int = 0):
    z, y = pairs(rows, seed)
    return replace(batch_of(rows, 2, y), extra={"noise": z})


class SquareScorer:
    name, sha256 = "square", ""

    def distance(self, a, b):
        return (a - b).square().flatten(1).sum(1)


def test_without_regression_it_is_dmd2_without_gan_bit_for_bit():
    found = []
    for one in (method(regression_weight=0.0), DMD2(DMD2Config(guidance_scale=1.0, student_update_every=1))):
        student, denoiser = denoiser_with_fake()
        optimizers = {"student": torch.optim.AdamW(student.parameters(), lr=1e-2)}
        for step in range(5):
            ctx = context(denoiser, ROWS, step=step)
            names = []
            for update in one.updates(step):
                names.append((update.name, update.trains))
                loss = sum(update.loss(batch_of(ROWS, 2), ctx).values())
                if update.name == "student":
                    loss.backward(inputs=list(student.parameters()))
                    optimizers["student"].step()
                    optimizers["student"].zero_grad()
                found.append(loss.detach())
            assert names == [("student", ("student",)), ("fake_score", ("fake_score",))]
        found += [student.A.detach(), student.b.detach()]
    ours, theirs = found[: len(found) // 2], found[len(found) // 2 :]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_last_rows_start_from_the_noise_of_their_pairs():
    student, denoiser = denoiser_with_fake()
    batch, ctx = batch_with_pairs(), context(denoiser, ROWS)
    one = method(regression_share=0.4)
    assert one.paired_rows(batch) == 3
    x = one.sample(batch, ctx, with_grad=True).flatten(1)
    z = torch.cat([ctx.random.normal("student/0", (2, 1, 1))[:3], batch.extra["noise"][3:]]).double().flatten(1)
    torch.testing.assert_close(x, z @ student.A.T + student.b, rtol=1e-10, atol=1e-12)
    assert (
        method(regression_share=0.01).paired_rows(batch) == 1 and method(regression_share=1.0).paired_rows(batch) == 6
    )


def test_regression_vanishes_exactly_at_the_teachers_map_and_only_paired_rows_count():
    student, denoiser = denoiser_with_fake(a=torch.linalg.cholesky(COV), b=MU)
    batch = batch_with_pairs()
    terms = method().student_loss(batch, context(denoiser, ROWS))
    assert terms["regression"].item() < 1e-24
    student.b.data += 0.1
    unpaired = replace(batch, latents=torch.cat([batch.latents[:3] + 100, batch.latents[3:]]))
    terms = method(regression_weight=0.5).student_loss(unpaired, context(denoiser, ROWS))
    assert terms["regression"].item() == pytest.approx(0.5 * 0.01, rel=1e-9)
    by_b = torch.autograd.grad(terms["regression"], student.b, retain_graph=True)[0]
    torch.testing.assert_close(by_b, f64([0.05, 0.05]), rtol=1e-9, atol=1e-12)


def test_perceptual_regression_compares_decoded_samples_and_its_target_has_no_graph():
    _, denoiser = denoiser_with_fake()
    batch, ctx = batch_with_pairs(), context(denoiser, ROWS)
    ctx.scorer, ctx.decode = SquareScorer(), lambda latents: 3 * latents
    one = method(regression_loss="perceptual")
    terms = one.student_loss(batch, ctx)
    x = one.sample(batch, ctx, with_grad=False)[3:]
    expected = 0.25 * 9 * (x - batch.latents[3:]).square().flatten(1).sum(1).mean()
    torch.testing.assert_close(terms["regression"], expected, rtol=1e-10, atol=1e-12)
    assert one.needs_scorer() and not method().needs_scorer()
    assert not DMD(DMDConfig(regression_weight=0.0)).needs_scorer()


@pytest.mark.parametrize(
    ("shape", "seen"), [((448, 448), (224, 224)), ((448, 896), (224, 448)), ((224, 500), (224, 500))]
)
def test_the_perceptual_distance_sees_at_most_224_pixels(shape, seen):
    _, denoiser = denoiser_with_fake()
    batch, ctx = batch_with_pairs(), context(denoiser, ROWS)
    sizes = []

    class Mean(SquareScorer):
        def distance(self, a, b):
            sizes.extend([tuple(a.shape[-2:]), tuple(b.shape[-2:])])
            return (a - b).mean((1, 2, 3))

    ctx.scorer, ctx.decode = Mean(), lambda latents: latents.expand(-1, -1, *shape)
    term = method(regression_loss="perceptual").student_loss(batch, ctx)["regression"]
    gap = method().sample(batch, ctx, with_grad=False)[3:] - batch.latents[3:]
    torch.testing.assert_close(term, 0.25 * gap.mean(), rtol=1e-12, atol=1e-14)
    assert sizes == [seen, seen]


def test_the_matching_term_covers_all_rows_and_the_fake_score_sees_them_all():
    """At share 1 the regression's rows are all rows: the gradient is DMD2's on the pairs' noise."""
    points = signs(4)
    given = draws(points, 2, 400)
    student, denoiser = denoiser_with_fake()
    batch = replace(batch_of(len(points), 2, torch.zeros(len(points), 2, 1, 1)), extra={"noise": given["student/0"]})
    ctx = context(denoiser, len(points), {k: v for k, v in given.items() if k != "student/0"})
    method(regression_share=1.0).student_loss(batch, ctx)["distribution_matching"].backward()
    paired = student.A.grad.clone()
    assert ctx.store["x"].shape == (len(points), 2, 1, 1)
    other, denoiser = denoiser_with_fake()
    ctx = context(denoiser, len(points), given)
    DMD2(DMD2Config(guidance_scale=1.0)).student_loss(batch, ctx)["distribution_matching"].backward()
    assert torch.equal(paired, other.A.grad)


def test_data_and_settings_that_do_not_fit_are_refused():
    assert method().needs() == "pairs"
    assert method(regression_weight=0.0).needs() == "prompts"
    few = {"regression_weight": 0.0, "timesteps": (999, 499), "multi_step_input": "noised_data"}
    assert method(**few).needs() == "images"
    _, denoiser = denoiser_with_fake()
    with pytest.raises(ValueError, match="pairs"):
        method().student_loss(batch_of(ROWS, 2), context(denoiser, ROWS))
    with pytest.raises(ValueError, match="regression_weight 0"):
        DMDConfig(timesteps=(999, 499))
    with pytest.raises(ValueError, match="regression_share"):
        DMDConfig(regression_share=0.0)
    with pytest.raises(ValueError, match="regression_loss, regression_share has no effect with regression_weight 0"):
        DMDConfig(regression_weight=0.0, regression_loss="latent_l2", regression_share=1.0)
    assert DMDConfig().regression_weight == 0.25 and DMDConfig().guidance_scale == 3.0


def test_regression_alone_brings_back_the_pairing_that_matching_leaves_open():
    """A A^T = S fixes A up to a rotation; pairs fix A itself."""
    torch.manual_seed(0)
    target = torch.linalg.cholesky(COV)
    student, denoiser = denoiser_with_fake()
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    rule = method()
    for step in range(200):
        run_one(rule, denoiser, optimizer, batch_with_pairs(16, seed=step), step)
        decay.step()
    assert (student.b - MU).abs().max() < 5e-3
    assert (student.A - target).abs().max() < 5e-3


def run_one(rule, denoiser, optimizer, batch, step):
    update, _ = rule.updates(step)
    sum(update.loss(batch, context(denoiser, len(batch), step=step)).values()).backward()
    optimizer.step()
    optimizer.zero_grad()


class Pairs(PromptData):
    """Prompts with random noise and samples, as a cache of pairs gives them."""

    def __getitem__(self, index):
        item = index if isinstance(index, int) else index.item
        generator = torch.Generator().manual_seed(item)
        noise, latents = (torch.randn(4, 16, 16, generator=generator) for _ in range(2))
        return super().__getitem__(index) | {"noise": noise, "latents": latents}


def test_trains_adapters_on_pairs_through_decoder_and_scorer(tiny_sd, tmp_path):
    from fastdiff.models.teacher import Teacher

    settings = Settings(output_dir=str(tmp_path), max_train_steps=2, train_batch_size=3, lora_rank=4, report_to="none")
    teacher = Teacher(tiny_sd, "tiny")
    trainer = Trainer(DMD(DMDConfig()), teacher, Pairs(["a red apple", "a dog", "blue cat"]), settings)
    names = set()
    trainer.metrics.add, add = (
        lambda name, *rest, **how: (names.add(name), add(name, *rest, **how)),
        trainer.metrics.add,
    )
    assert trainer.train() == "done"
    assert {"loss/student/regression", "loss/student/distribution_matching", "loss/fake_score/denoising"} <= names
    trained = {id(p) for role in ("student", "fake_score") for p in trainer.networks.roles.parameters(role)}
    for parameter in [*teacher.network.parameters(), *trainer.scorer.tower.model.parameters()]:
        assert id(parameter) in trained or (parameter.grad is None and not parameter.requires_grad)
