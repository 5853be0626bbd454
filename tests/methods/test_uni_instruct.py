"""Uni-Instruct (arXiv 2505.20755): the gradient of E_q[h(r) |s_p - s_q|^2] for every f, and the released code's form."""

from __future__ import annotations

import math

import pytest
import torch
from identity_helpers import ALPHA, MEAN, SCALE, SHIFT, SIGMA, VARIANCE, RatioFake, scalar_gradient
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
    spatial,
)
from torch import nn

from fastdiff.data.source import PromptData
from fastdiff.diffusion import Gaussian
from fastdiff.engine import Settings, Trainer
from fastdiff.methods import SiD, SiDConfig, UniInstruct, UniInstructConfig
from fastdiff.models.analytic import AnalyticTeacher, ExactNetwork

BOUND = "fastdiff.methods.uni_instruct.LOGIT_BOUND"
# Derivatives by A and b of E_q[h(r) (s_p - s_q)^2] in scenario I.
GOLD = {
    "rkl": (2.9638106674, -4.2516292663),
    "soft_rkl": (3.0802725872, -3.3379198113),
    "js": (-0.1164619198, -0.9137094550),
    "sq_hellinger": (0.0250755936, -0.5530930592),
    "fkl": (-0.6477461681, -1.8266932657),
    "jeffreys": (2.3160644993, -6.0783225321),
    "soft_fkl": (-0.5312842483, -0.9129838107),
}
FACTOR = ALPHA**2 / SIGMA**4


def config(divergence="fkl", **values):
    head = {} if divergence == "rkl" else {"gan_head": "channel_mean"}
    own = {"divergence": divergence, "mode": "exact", "loss_scale": 1.0, "gan_weight": 0.0}
    return UniInstructConfig(**own | head | values)


@pytest.fixture(autouse=True)
def unbounded(monkeypatch):
    """Exact expectations reach far into the tails."""
    monkeypatch.setattr(BOUND, 700.0)


@pytest.mark.parametrize("divergence", GOLD)
def test_golden_numbers_of_the_exact_gradient(divergence):
    assert scalar_gradient(UniInstruct, config(divergence), FACTOR) == pytest.approx(GOLD[divergence], abs=3e-10)


def power_integral(gamma, a, b):
    """E_q[r^gamma (s_p - s_q)^2] of Gaussians in closed form: r^gamma q is a Gaussian with a factor."""
    m_r, v_r = f64(ALPHA * MEAN), f64(ALPHA**2 * VARIANCE + SIGMA**2)
    m_f, v_f = ALPHA * b, ALPHA**2 * a**2 + SIGMA**2
    precision = gamma / v_r + (1 - gamma) / v_f
    mean = (gamma * m_r / v_r + (1 - gamma) * m_f / v_f) / precision
    exponent = precision * mean**2 - gamma * m_r**2 / v_r - (1 - gamma) * m_f**2 / v_f
    logs = -precision.log() - gamma * v_r.log() - (1 - gamma) * v_f.log()
    slope = 1 / v_f - 1 / v_r  # s_p - s_q is linear
    offset = m_r / v_r - m_f / v_f
    return ((logs + exponent) / 2).exp() * ((slope * mean + offset) ** 2 + slope**2 / precision)


@pytest.mark.parametrize(
    ("divergence", "values", "gamma", "scale"),
    [
        ("pearson", {}, 2.0, 2.0),
        ("neyman", {}, -1.0, 2.0),
        ("power", {"power": 0.3}, 0.3, 1.0),
        ("power", {"power": 1.0}, 1.0, 1.0),
    ],
)
def test_power_divergences_in_closed_form(divergence, values, gamma, scale):
    a, b = f64(SCALE).requires_grad_(), f64(SHIFT).requires_grad_()
    expected = torch.autograd.grad(scale * power_integral(gamma, a, b), (a, b))
    found = scalar_gradient(UniInstruct, config(divergence, **values), FACTOR)
    near = 1e-5 if gamma < 0 else 1e-8  # 1/r is large where the nodes end
    assert found == pytest.approx([one.item() for one in expected], rel=near, abs=1e-9)
    if gamma == 1.0:
        assert found == pytest.approx(GOLD["fkl"], abs=3e-10)


def test_columns_add_up_as_the_divergences_do():
    found = {name: f64(scalar_gradient(UniInstruct, config(name), FACTOR)) for name in GOLD}
    for sum_of, total in [(("soft_rkl", "js"), "rkl"), (("js", "soft_fkl"), "fkl"), (("rkl", "fkl"), "jeffreys")]:
        torch.testing.assert_close(found[sum_of[0]] + found[sum_of[1]], found[total], rtol=1e-9, atol=1e-9)


def test_the_released_form_of_forward_kl_points_the_other_way_in_the_scale():
    """Without the term that moves r, twice the released form has the right derivative by b and a wrong one by A."""
    dA, db = scalar_gradient(UniInstruct, config("fkl", mode="official"), 2 * FACTOR)
    assert dA == pytest.approx(0.8496, abs=5e-5)
    assert db == pytest.approx(GOLD["fkl"][1], abs=3e-10)
    assert math.copysign(1, dA) != math.copysign(1, GOLD["fkl"][0])


# In several dimensions


class Ratio(nn.Module):
    """A network beside which a given map is the middle activation."""

    def __init__(self, network, logits):
        super().__init__()
        self.network, self.logits, self.mid_block = network, logits, nn.Identity()
        self.feature_channels = 1
        self.register_buffer("anchor", torch.zeros((), dtype=torch.float64))

    def forward(self, x_t, time, labels):
        self.mid_block(self.logits[:, None, None, None])
        return self.network(x_t, time, labels)


ROWS = 5
LOGITS = f64([-1.5, -0.3, 0.0, 0.4, 2.0])


def table_setup(logits=LOGITS, equal=False):
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(ROWS, 3, generator=generator, dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    teacher, other = (LabelledGaussians([Gaussian(f64([m] * 3), s * eye)]) for m, s in [(1.0, 0.3), (0.2, 1.0)])
    student = TableGenerator(table)
    fake = Ratio(teacher if equal else other, logits)
    denoiser = denoiser_of(teacher, student=student, fake_score=fake)
    denoiser.family.feature_tap = "mid_block"
    eps = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(2))
    draws = {"student/eps": spatial(eps), "student/t": torch.tensor([20, 300, 500, 700, 979])}
    return student, denoiser, context(denoiser, ROWS, draws)


def gradient(method, **setup):
    student, _, ctx = table_setup(**setup)
    loss = method.student_loss(batch_of(ROWS, 3), ctx)["score_identity"]
    loss.backward()
    return student.table.grad, loss.detach()


def sid(alpha):
    return SiD(SiDConfig(alpha=alpha, loss_scale=1.0))


def test_exact_reverse_kl_is_twice_sid_at_one_half():
    found, loss = gradient(UniInstruct(config("rkl")))
    expected, other = gradient(sid(0.5))
    torch.testing.assert_close(found, 2 * expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss, 2 * other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("divergence", "factor"),
    [("rkl", torch.ones(ROWS)), ("fkl", LOGITS.exp()), ("jeffreys", 0.4 * LOGITS.exp() + 0.6)],
)
def test_official_is_score_matching_times_a_function_of_the_ratio(divergence, factor):
    found, _ = gradient(UniInstruct(config(divergence, mode="official")))
    expected, _ = gradient(sid(1.0))
    torch.testing.assert_close(found, factor[:, None] * expected, rtol=1e-12, atol=1e-12)


def test_the_exact_loss_is_the_three_term_surrogate():
    found, loss = gradient(UniInstruct(config("js")))
    student, _, ctx = table_setup()
    x = student.table.detach().clone().requires_grad_()
    t, eps = ctx.random.values["student/t"], ctx.random.values["student/eps"].flatten(1)
    alpha, sigma = SD.alpha(t.double())[:, None], SD.sigma(t.double())[:, None]
    x_t = alpha * x + sigma * eps

    def posterior(mean, variance):
        return mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x_t - alpha * mean)

    real, fake = posterior(1.0, 0.3), posterior(0.2, 1.0)
    r, gap = LOGITS.exp()[:, None], real - fake
    square, cross = gap.square().sum(1, keepdim=True), (gap * (fake - x)).sum(1, keepdim=True)
    q = 1 + r
    push = (2 * r**2 / q**3 * square + 2 * r / q**2 * cross) * gap * alpha / sigma**2
    value = (r**2 / q**2 * square + 2 * r / q * cross).squeeze(1)
    surrogate = value + (push.detach() * x_t).sum(1)
    m = (x - real).abs().mean(1).detach()
    (expected,) = torch.autograd.grad((surrogate / m).mean(), x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(loss, (value / m).mean().detach(), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("mode", ["exact", "official"])
@pytest.mark.parametrize("divergence", ["rkl", "fkl", "jeffreys"])
def test_equal_scores_give_no_loss_and_no_gradient(mode, divergence):
    found, loss = gradient(UniInstruct(config(divergence, mode=mode)), equal=True)
    assert loss.abs() < 1e-12 and found.abs().max() < 1e-12


def test_log_ratios_are_bounded(monkeypatch):
    monkeypatch.setattr(BOUND, 10.0)
    wild, _ = gradient(UniInstruct(config("fkl")), logits=1e3 * LOGITS.sign())
    bounded, _ = gradient(UniInstruct(config("fkl")), logits=10 * LOGITS.sign())
    torch.testing.assert_close(wild, bounded, rtol=0, atol=0)
    assert torch.isfinite(wild).all()


def test_the_ratio_carries_no_gradient():
    logits = LOGITS.clone().requires_grad_()
    student, _, ctx = table_setup(logits=logits)
    UniInstruct(config("js")).student_loss(batch_of(ROWS, 3), ctx)["score_identity"].backward()
    assert logits.grad is None and student.table.grad.abs().max() > 0


# Roles, settings, training


def test_images_are_needed_where_a_ratio_is():
    assert UniInstruct(config("rkl")).needs() == "prompts"
    assert set(UniInstruct(config("rkl")).groups()) == {"student", "fake_score"}
    for method in (UniInstruct(UniInstructConfig(gan_weight=0.0)), UniInstruct(UniInstructConfig(divergence="rkl"))):
        assert method.needs() == "images"
        assert set(method.groups()) == {"student", "fake_score", "discriminator"}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"divergence": "js", "mode": "official"}, "no official mode"),
        ({"gan_discriminator_weight": 0.0, "gan_weight": 0.0}, "takes the density ratio from the discriminator"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, named):
    with pytest.raises(ValueError, match=named):
        UniInstructConfig(**values)


class Points(PromptData):
    """A prompt and a sample of two numbers."""

    def __getitem__(self, index):
        item = index if isinstance(index, int) else index.item
        latents = torch.randn(2, 1, 1, generator=torch.Generator().manual_seed(item))
        return super().__getitem__(index) | {"latents": latents}


@pytest.mark.parametrize(("divergence", "mode"), [("js", "exact"), ("fkl", "official")])
def test_trains_through_the_engine(tmp_path, divergence, mode):
    settings = Settings(
        output_dir=str(tmp_path),
        max_train_steps=2,
        train_batch_size=4,
        student="full",
        fake_score="full",
        report_to="none",
    )
    teacher = AnalyticTeacher.gaussian(f64([0.7, -0.4]), torch.eye(2))
    trainer = Trainer(
        UniInstruct(UniInstructConfig(divergence=divergence, mode=mode)), teacher, Points(["a sample"] * 8), settings
    )
    roles, modules = trainer.networks.roles, trainer.networks.modules
    every = {name: roles.parameters(name) for name in ("student", "fake_score")}
    every["discriminator"] = list(modules["discriminator"].parameters())
    before = {name: [p.detach().clone() for p in parameters] for name, parameters in every.items()}
    assert trainer.train() == "done"
    for name, old in before.items():
        assert max((a - b).abs().max() for a, b in zip(every[name], old)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["fkl", "js"])
def test_converges_to_the_teachers_law_with_exact_scores_and_ratio(divergence, monkeypatch):
    monkeypatch.setattr(BOUND, 3.0)
    mu, cov = f64([0.7, -0.4]), f64([[0.64, 0.2], [0.2, 0.5]])
    student = AffineGenerator(f64([[1.1, 0.3], [-0.2, 0.8]]), f64([-0.2, 0.5]))
    teacher = Gaussian(mu, cov)
    denoiser = denoiser_of(
        ExactNetwork(teacher, SD, "epsilon"), student=student, fake_score=RatioFake(student, teacher)
    )
    denoiser.family.feature_tap = "mid_block"
    steps = 300
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    class StudentOnly(UniInstruct):
        def updates(self, step):
            yield from [update for update in super().updates(step) if update.name == "student"]

    rule = StudentOnly(config(divergence))
    run(rule, denoiser, {"student": optimizer}, batch_of(64, 2), steps, lambda step: decay.step())
    assert (student.b - mu).abs().max() < 1e-3
    assert (student.A @ student.A.T - cov).abs().max() < 1e-3
