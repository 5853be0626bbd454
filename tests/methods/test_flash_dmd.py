"""Flash-DMD (arXiv 2511.20549): the split of roles by noise, the adversary of images, and the pulled fake score."""

from __future__ import annotations

import copy

import pytest
import torch
from adversarial_cases import frozen_weights, same, tiny_trainer, weights_of
from method_helpers import SD, AffineGenerator, OracleFake, batch_of, context, denoiser_of, f64, spatial
from torch import nn
from torch.nn.functional import softplus

from fastdiff.diffusion import Gaussian
from fastdiff.methods import DMD2, DMD2Config
from fastdiff.methods.flash_dmd import FlashDMD, FlashDMDConfig
from fastdiff.models.analytic import ExactNetwork
from fastdiff.models.scorers import open_scorer

MU, COV = f64([0.7, -0.4]), f64([[0.64, 0.2], [0.2, 0.5]])
A, B = f64([[1.1, 0.3], [-0.2, 0.8]]), f64([-0.2, 0.5])


def method(**config) -> FlashDMD:
    return FlashDMD(FlashDMDConfig(**{"guidance_scale": 1.0} | config))


def setup(**config):
    student = AffineGenerator(A, B)
    base = ExactNetwork(Gaussian(MU, COV), SD, "epsilon")
    denoiser = denoiser_of(base, student=student, fake_score=OracleFake(student))
    return method(**config), student, denoiser


class Pixels:
    """A scorer whose features are the image itself and its square."""

    feature_channels = (2, 2)

    def features(self, images):
        return [images, images.square()]


class LinearHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(f64([[1.0, -0.5], [0.3, 0.2]]))

    def forward(self, plain, squared):
        return torch.stack([plain.flatten(1) @ self.weight[0], squared.flatten(1) @ self.weight[1]], 1)


def judged(denoiser, rows, draws=None):
    """A context with a decoder that doubles and the scorer above."""
    ctx = context(denoiser, rows, draws, modules={"discriminator": LinearHeads()})
    ctx.decode, ctx.scorer = (lambda latents: 2 * latents), Pixels()
    return ctx


def calls_of(denoiser, *roles):
    """Counts calls of networks from now on."""
    counts = dict.fromkeys(roles, 0)
    for role in roles:

        def count(*_, role=role):
            counts[role] += 1

        denoiser.roles.network(role).register_forward_pre_hook(count)
    return counts


# The two kinds of steps


def test_matching_at_all_steps_is_dmd2():
    config = {"timesteps": (999, 499), "multi_step_input": "simulate"}
    one, student, denoiser = setup(high_noise_steps=2, gan_weight=0.0, **config)
    other = DMD2(DMD2Config(guidance_scale=1.0, student_update_every=1, **config))
    batch = batch_of(6, 2)
    for step in range(3):
        gradients = []
        for rule in (one, other):
            ctx = context(denoiser, 6, step=step)
            terms = [update.loss(batch, ctx) for update in rule.updates(step)]
            assert [set(term) for term in terms] == [{"distribution_matching"}, {"denoising"}]
            gradients.append(torch.autograd.grad(terms[0]["distribution_matching"], list(student.parameters())))
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert one.needs() == "prompts" and not one.needs_scorer()


def test_only_noisy_steps_are_matched():
    one, _student, denoiser = setup(timesteps=(999, 749, 499, 249), high_noise_steps=2)
    seen = set()
    for step in range(20):
        ctx = context(denoiser, 2, step=step)
        before = denoiser.calls
        one.sample(batch_of(2, 2), ctx, with_grad=False)
        seen.add((denoiser.calls - before) // 2)
    assert seen == {1, 2}


def test_a_clean_step_asks_no_score():
    one, _student, denoiser = setup(timesteps=(999, 749, 499, 249))
    batch, ctx = batch_of(3, 2), judged(denoiser, 3, {"student/step": 0, "student/low/step": 1})
    counts = calls_of(denoiser, "teacher", "fake_score", "student")
    terms = one.student_terms(torch.zeros(3, 2, 1, 1).double(), batch, ctx)
    assert set(terms) == {"gan"}
    assert counts == {"teacher": 0, "fake_score": 0, "student": 4}  # three to finish the chain, one to learn


@pytest.mark.parametrize(("drawn", "low"), [(0, 0), (1, 1)])
def test_the_chain_is_finished_and_one_clean_call_keeps_its_graph(drawn, low):
    times = (999, 749, 499, 249)
    one, student, denoiser = setup(timesteps=times)
    ctx = context(denoiser, 4, {"student/step": drawn, "student/low/step": low})
    x = torch.randn(4, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    y = one.low_noise_sample(x, batch_of(4, 2), ctx)

    def noised(points, index, site):
        t = torch.tensor(float(index)).double()
        return SD.alpha(t) * points + SD.sigma(t) * ctx.random.normal(f"{site}/eps", (2, 1, 1)).double().flatten(1)

    points = x.detach().flatten(1)
    for position in range(drawn + 1, 4):
        points = noised(points, times[position], f"student/finish/{position}") @ A.T + B
    last = noised(points, times[2 + low], "student/low")
    torch.testing.assert_close(y.flatten(1), last @ A.T + B, rtol=1e-10, atol=1e-10)
    y.sum().backward()
    assert x.grad is None
    torch.testing.assert_close(student.A.grad, last.sum(0).expand(2, 2), rtol=1e-10, atol=1e-10)


# The adversary of images


@pytest.mark.parametrize("loss", ["softplus", "hinge"])
def test_heads_judge_decoded_samples_against_decoded_images(loss):
    one, student, denoiser = setup(timesteps=(999, 499), high_noise_steps=1, gan_weight=0.5, gan_loss=loss)
    latents = torch.randn(4, 2, 1, 1, generator=torch.Generator().manual_seed(1)).double()
    batch, ctx = batch_of(4, 2, latents), judged(denoiser, 4)
    terms = one.student_loss(batch, ctx)
    assert set(terms) == {"distribution_matching", "gan"}
    y = one.low_noise_sample(ctx.store["x"], batch, ctx)  # the same draws
    heads = ctx.modules["discriminator"]

    def logits(latents):
        return heads(2 * latents, (2 * latents).square())

    expected = {"softplus": softplus(-logits(y)), "hinge": -logits(y)}[loss].mean()
    torch.testing.assert_close(terms["gan"], 0.5 * expected)
    assert torch.autograd.grad(terms["gan"], student.A, retain_graph=True)[0].abs().max() > 0

    fooled = softplus(logits(y)).mean() + softplus(-logits(latents)).mean()
    margins = torch.relu(1 + logits(y)).mean() + torch.relu(1 - logits(latents)).mean()
    found = one.discriminator_loss(batch, ctx)["discriminator"]
    torch.testing.assert_close(found, fooled if loss == "softplus" else margins)
    found.backward()
    assert heads.weight.grad.abs().max() > 0 and student.A.grad is None


def test_r1_moves_images():
    one, _student, denoiser = setup(gan_r1_weight=2.0)
    ctx = judged(denoiser, 4)
    real = torch.randn(4, 2, 1, 1, generator=torch.Generator().manual_seed(1)).double()
    terms = one.adversary.discriminator_terms(real, torch.zeros_like(real), ctx, "here")
    moved = real + 0.1 * ctx.random.normal("here/r1", (2, 1, 1)).double()
    heads = ctx.modules["discriminator"]
    change = heads(*Pixels().features(moved)) - heads(*Pixels().features(real))
    torch.testing.assert_close(terms["r1"], 2 * change.square().mean())


def test_the_shipped_scorer_says_how_wide_its_features_are():
    scorer = open_scorer("loss_tower")
    images = torch.zeros(2, 3, 32, 32)
    assert scorer.feature_channels == tuple(one.shape[1] for one in scorer.features(images))
    heads = method().scorer_modules(scorer)["discriminator"]
    assert heads(*scorer.features(images)).shape == (2, len(scorer.feature_channels))


# Who is trained when


def test_turns():
    one = method(student_update_every=2)
    student, heads, fake = one.updates(0)
    assert [student.trains, heads.trains, fake.trains] == [("student",), ("discriminator",), ("fake_score",)]
    assert [update.name for update in one.updates(1)] == ["fake_score"]
    assert one.needs() == "images" and one.needs_scorer()


def test_the_fake_score_is_pulled_after_its_own_steps(tiny_sd, tmp_path):
    one = method(timesteps=(999,), high_noise_steps=1, gan_weight=0.0, fake_score_decay=0.75, student_update_every=2)
    # A fake score that does not learn shows the pull alone.
    one.config = FlashDMDConfig(**{**one.config.__dict__, "fake_score_learning_rate": 1e-30})
    trainer = tiny_trainer(one, tiny_sd, tmp_path, student="full", fake_score="full")
    roles = trainer.networks.roles
    start = [p.detach().clone() for p in roles.parameters("fake_score")]
    steps = trainer.batches.steps(0)
    pulled = start
    for _ in range(3):  # student steps at 0 and 2; the fake score is pulled in every step
        trainer.train_step(next(steps))
        pulled = [p + 0.25 * (q.detach() - p) for p, q in zip(pulled, roles.parameters("student"), strict=True)]
    for found, expected in zip(roles.parameters("fake_score"), pulled, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    moved = [(p - q).abs().max() for p, q in zip(roles.parameters("fake_score"), start, strict=True)]
    assert max(moved) > 1e-4


def test_decay_one_pulls_nowhere():
    assert method().targets() == ()
    (target,) = method(fake_score_decay=0.9).targets()
    assert (target.role, target.source, target.decay, target.after) == ("fake_score", "student", 0.9, "fake_score")


@pytest.mark.parametrize("kinds", [("lora", "lora"), ("full", "lora"), ("lora", "full")])
def test_adapters_cannot_be_pulled(tiny_sd, tmp_path, kinds):
    with pytest.raises(ValueError, match="average of products"):
        tiny_trainer(method(fake_score_decay=0.9), tiny_sd, tmp_path, student=kinds[0], fake_score=kinds[1])


@pytest.mark.parametrize(("kind", "decay"), [("lora", 1.0), ("full", 0.9)])
def test_trains_and_resumes_exactly_and_leaves_the_teacher_alone(tiny_sd, tmp_path, kind, decay):
    before, again = frozen_weights(tiny_sd), copy.deepcopy(tiny_sd)

    def trainer(pipeline, folder, **more):
        one = method(timesteps=(999, 499), high_noise_steps=1, fake_score_decay=decay)
        return tiny_trainer(one, pipeline, tmp_path / folder, student=kind, fake_score=kind, **more)

    straight = trainer(tiny_sd, "straight")
    straight.train()
    assert same(before, frozen_weights(tiny_sd))
    first = trainer(copy.deepcopy(again), "split")
    for batches in first.batches.steps(0):
        first.train_step(batches)
        if first.step == 2:
            break
    first.save()
    second = trainer(copy.deepcopy(again), "split", resume_from_checkpoint="latest")
    second.train()
    assert same(weights_of(second), weights_of(straight))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"high_noise_steps": 0}, "high_noise_steps"),
        ({"high_noise_steps": 5}, "high_noise_steps"),
        ({"high_noise_steps": 4}, "adversary"),
        ({"gan_weight": 0.0}, "cleanest"),
        ({"fake_score_decay": 0.0}, "fake_score_decay"),
        ({"fake_score_decay": 1.1}, "fake_score_decay"),
    ],
)
def test_senseless_settings_are_refused(config, named):
    with pytest.raises(ValueError, match=named):
        method(**config)


def test_a_context_without_images_says_so():
    one, _student, denoiser = setup(timesteps=(999, 499), high_noise_steps=1)
    ctx = judged(denoiser, 2)
    ctx.store["images"] = spatial(torch.zeros(2, 2).double())
    with pytest.raises(ValueError, match="train_data_dir"):
        one.discriminator_loss(batch_of(2, 2), ctx)
