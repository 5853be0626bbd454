"""SCott (arXiv 2403.01505): zero noise is consistency distillation, the optimum and its loss floor in closed form."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise

import pytest
import torch
from method_helpers import SD, batch_of, context, denoiser_of, f64
from torch import nn
from trajectory_helpers import (
    FLOW,
    KINDS,
    LAW,
    MU,
    JumpNet,
    S,
    data,
    gaussian_denoiser,
    images,
    levels,
    orders,
    settings,
    student_loss,
)

from fastdiff.diffusion import Prediction, er_sde_5
from fastdiff.engine import Trainer
from fastdiff.methods import LCM, LCMConfig, SCott, SCottConfig
from fastdiff.methods._trajectory import grid_points
from fastdiff.models.analytic import ExactNetwork
from fastdiff.models.analytic_networks import PointNet
from fastdiff.models.sampler import SamplerSpec
from fastdiff.models.teacher import Teacher

pytestmark = pytest.mark.filterwarnings("ignore:noise_strength")
SCHEDULES = pytest.mark.parametrize("schedule", [SD, FLOW], ids=["vp", "flow"])
PLAIN = {"guidance_scale": 1.0, "target_decay": 0.0, "adversarial_weight": 0.0}


def method(**config) -> SCott:
    return SCott(SCottConfig(**PLAIN | {"solver_steps": 1, "num_ddim_timesteps": 10} | config))


def stochastic_factor(t: float, s: float, eta: float, schedule) -> tuple[float, float]:
    """(what a DDIM-eta step with the exact denoiser multiplies x_t - alpha_t mu by, the noise it adds)."""
    (at, st), (as_, ss) = levels(t, schedule), levels(s, schedule)
    fresh = eta**2 * (ss / st) ** 2 * (st**2 - (at / as_) ** 2 * ss**2)
    kept = (ss**2 - fresh).clamp_min(0).sqrt()
    return ((as_ * at * S + kept * st) / (at**2 * S + st**2)).item(), fresh.sqrt().item()


def slopes(points: list[int], eta: float, schedule) -> dict[int, float]:
    """index -> slope of the optimum in closed form, from the end of the grid up."""
    found = {points[0]: 1.0}
    for low, high in pairwise(points):
        found[high] = stochastic_factor(high, low, eta, schedule)[0] * found[low]
    return found


def optimum(points: list[int], eta: float, schedule) -> JumpNet:
    """The network whose consistency function is the optimum; on the table the boundary weights are undone."""
    table = slopes(points, eta, schedule)
    end = points[0]

    def f(x, t, s):
        slope = f64([table[int(index)] for index in t.flatten()])[:, None]
        value = levels(end, schedule)[0] * MU + slope * (x - levels(t, schedule)[0] * MU)
        if schedule is FLOW:
            return value
        tau = 10 * t
        skip, out = 0.25 / (tau**2 + 0.25), tau / (tau**2 + 0.25).sqrt()
        return torch.where(tau > 0, (value - skip * x) / out.clamp_min(1e-9), x)

    # Named by its clean prediction: the jump to the clean end.
    return JumpNet(f, lambda index: torch.full_like(index, -1.0), schedule)


def grid(schedule) -> list[int]:
    points = grid_points(10).tolist()
    return [0, *points[1:]] if schedule is SD else points


# Limits


def loss_and_gradients(one, schedule, draws=None):
    torch.manual_seed(0)
    network = PointNet(1, 1).double()
    denoiser = denoiser_of(ExactNetwork(LAW, schedule, KINDS[schedule]), schedule, KINDS[schedule], student=network)
    loss = student_loss(one, denoiser, 16, draws)["consistency"]
    return [loss.detach(), *torch.autograd.grad(loss, list(network.parameters()))]


def same(a, b) -> bool:
    return all(torch.allclose(x, y, rtol=1e-12, atol=1e-12) for x, y in zip(a, b, strict=True))


@SCHEDULES
@pytest.mark.parametrize("solver", ["ddim", "er_sde"])
def test_without_noise_one_sub_step_and_no_discriminator_it_is_lcm(schedule, solver):
    lcm = LCM(LCMConfig(guidance_scale=1.0, target_decay=0.0, loss_type="l2", num_ddim_timesteps=10))
    expected = loss_and_gradients(lcm, schedule)
    assert same(loss_and_gradients(method(noise_strength=0.0, sde_solver=solver), schedule), expected)
    assert not same(loss_and_gradients(method(noise_strength=0.2, sde_solver=solver), schedule), expected)


def test_full_noise_is_ancestral_sampling_in_either_solver():
    draws = {"solver/0": torch.ones(16, 1, 1, 1)}
    pair = [loss_and_gradients(method(noise_strength=1.0, sde_solver=one), FLOW, draws) for one in ("ddim", "er_sde")]
    assert same(*pair)


def test_five_is_the_published_noise_function():
    """x_s = (a_s/a_t) r x + a_s (1 - r) x0 + a_s sqrt(k_s^2 - k_t^2 r^2) z with r = phi(k_s)/phi(k_t)."""
    x, x0, z = f64([0.7]), f64([-0.3]), f64([1.1])
    (at, st), (as_, ss) = levels(600), levels(500)
    kt, ks = st / at, ss / as_
    phi = [k * (math.exp(k**0.3) + 10) for k in (kt, ks)]
    r = phi[1] / phi[0]
    expected = as_ / at * r * x + as_ * (1 - r) * x0 + as_ * (ks**2 - kt**2 * r**2).sqrt() * z
    found = er_sde_5(Prediction.from_x0(x0, x, torch.tensor([600.0]), SD), torch.tensor([500.0]), z)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    at_pure_noise = er_sde_5(Prediction.from_x0(x0, x, f64([1.0]), FLOW), f64([0.5]), z)
    torch.testing.assert_close(at_pure_noise, 0.5 * x0 + 0.5 * z)


def test_sub_steps_share_out_a_pair_in_whole_indices():
    seen = []

    class Spy(ExactNetwork):
        def forward(self, x_t, time, labels):
            seen.append(time.tolist())
            return super().forward(x_t, time, labels)

    denoiser = denoiser_of(Spy(LAW, SD, "epsilon"), student=PointNet(1, 1).double())
    one = method(num_ddim_timesteps=40, solver_steps=3)
    student_loss(one, denoiser, 2, {"pair": torch.tensor([0, 39])})
    assert seen == [[24.0, 999.0], [16.0, 991.0], [7.0, 982.0]]


def test_sub_steps_agree_to_second_order_without_noise():
    """The optimum of one step a pair, judged by five of a fifth of it, from one index on ever finer grids."""
    losses = {1: [], 5: []}
    for points in (5, 10, 20, 40):
        denoiser = gaussian_denoiser(FLOW, student=optimum(grid_points(points).tolist(), 0.0, FLOW))
        draws = {"pair": torch.full((64,), 8 * points // 10 - 1)}
        for steps, found in losses.items():
            one = method(noise_strength=0.0, num_ddim_timesteps=points, solver_steps=steps)
            found.append(student_loss(one, denoiser, 64, draws)["consistency"].item())
    assert max(losses[1]) < 1e-12
    assert orders(losses[5])[-1] == pytest.approx(2, abs=0.1), orders(losses[5])


# Optimum


@SCHEDULES
@pytest.mark.parametrize("eta", [0.2, 0.5, 1.0])
def test_loss_at_the_optimum_is_the_noise_that_it_cannot_know(schedule, eta):
    """The residual at the optimum is slope(u) times the noise added on the way to u, exactly, sample by sample."""
    points = grid(schedule)
    rows = 80
    number = torch.arange(10).repeat(8)
    z = torch.tensor([1.0, -1.0]).repeat(40)[:, None, None, None]
    denoiser = gaussian_denoiser(schedule, student=optimum(points, eta, schedule))
    draws = {"pair": number, "solver/0": z}
    found = student_loss(method(noise_strength=eta), denoiser, rows, draws)["consistency"].item()
    table = slopes(points, eta, schedule)
    expected = [(table[low] * stochastic_factor(high, low, eta, schedule)[1]) ** 2 for low, high in pairwise(points)]
    assert found == pytest.approx(sum(expected) / 10, rel=1e-6)
    silent = student_loss(method(noise_strength=eta), denoiser, rows, draws | {"solver/0": 0 * z})[
        "consistency"
    ].item()
    assert silent < (1e-20 if schedule is SD else 1e-13)


@pytest.mark.parametrize("solver", ["ddim", "er_sde"])
@pytest.mark.parametrize(("points", "steps"), [(1, 1), (5, 1), (5, 4), (40, 1)])
def test_with_full_noise_the_optimum_is_the_teachers_own_denoiser_on_any_grid(solver, points, steps):
    """(S + kappa_s^2) / (S + kappa_t^2) a step: over any steps to the clean end that is the posterior mean's slope."""
    draws = {"pair": torch.arange(points).repeat(4)} | {
        f"solver/{n}": torch.zeros(4 * points, 1, 1, 1) for n in range(steps)
    }
    denoiser = gaussian_denoiser(FLOW, student=ExactNetwork(LAW, FLOW, "flow"))
    found = {}
    for eta in (0.5, 1.0):
        one = method(noise_strength=eta, sde_solver=solver, num_ddim_timesteps=points, solver_steps=steps)
        found[eta] = student_loss(one, denoiser, 4 * points, draws)["consistency"].item()
    assert found[1.0] < 1e-13
    assert (found[0.5] > 1e-6) == (
        points * steps > 1
    )  # one step is the denoiser's clean prediction, whatever the noise


def test_variance_of_one_step_samples_falls_with_the_noise():
    """Continuous limit (s^2 / (s^2 + kappa^2))^((1 + eta^2) / 2): 1, .886, .335, .048 of the data's deviation."""
    at, st = levels(999)
    kappa = st / at
    for eta, golden in ((0.0, 1.0), (0.2, 0.886), (0.6, 0.335), (1.0, 0.048)):
        limit = (S / (S + kappa**2)) ** ((1 + eta**2) / 2) / at * st / S**0.5  # from noise of the table's own scale
        assert limit.item() == pytest.approx(golden, abs=6e-3)
    fine = slopes([-1, *range(0, 1000)], 0.5, SD)[999]
    limit = (S / (S + kappa**2)) ** ((1 + 0.25) / 2) / at
    assert fine == pytest.approx(limit.item(), rel=0.02)


def test_the_closed_form_is_where_the_gradient_vanishes():
    """Of a free slope and mean at each time; noise of both signs on the same samples makes expectations exact."""

    class Table(JumpNet):
        def __init__(self, shift: float) -> None:
            super().__init__(self.value, lambda index: torch.full_like(index, -1.0))
            table = slopes(grid(SD), 0.5, SD)
            self.times = f64(grid(SD)[1:])
            self.slope = nn.Parameter(f64([table[t] for t in grid(SD)[1:]]) + shift)

        def value(self, x, t, s):
            number = torch.bucketize(t.flatten(), self.times).clamp_max(9)
            slope = self.slope[number][:, None]
            f = levels(0)[0] * MU + slope * (x - levels(t)[0] * MU)
            tau = 10 * t
            skip, out = 0.25 / (tau**2 + 0.25), tau / (tau**2 + 0.25).sqrt()
            return torch.where(tau > 0, (f - skip * x) / out.clamp_min(1e-9), x)

    latents = data(80).repeat(2, 1, 1, 1)
    eps = torch.randn(80, 1, 1, 1, generator=torch.Generator().manual_seed(1)).repeat(2, 1, 1, 1)
    z = torch.tensor([1.0, -1.0]).repeat_interleave(80)[:, None, None, None]
    draws = {"pair": torch.arange(10).repeat(16), "eps": eps, "solver/0": z}
    found = []
    for shift in (0.0, 0.01):
        student = Table(shift)
        denoiser = gaussian_denoiser(student=student)
        loss = method(noise_strength=0.5).student_loss(batch_of(160, 1, latents), context(denoiser, 160, draws))
        (gradient,) = torch.autograd.grad(loss["consistency"], [student.slope])
        found.append(gradient.abs().max().item())
    assert found[0] < 1e-12 < 1e-5 < found[1]
    assert slopes(grid(SD), 0.5, SD)[999] == pytest.approx(0.3487, abs=1e-4)


# Adversarial term


def test_the_discriminator_sees_data_and_the_students_clean_samples_at_any_time(monkeypatch):
    scott = method(adversarial_weight=0.4)
    base = PointNet(1, 1).double()
    denoiser = denoiser_of(base, student=PointNet(1, 1).double())
    denoiser.family.feature_tap = "mid_block"
    modules = {name: module.double() for name, module in scott.modules(denoiser).items()}
    seen, original = [], type(scott.adversary).noised

    def noised(self, x, ctx, site, t=None, start=None):
        seen.append((site, x, start))
        return original(self, x, ctx, site, t, start)

    monkeypatch.setattr(type(scott.adversary), "noised", noised)
    ctx, batch = context(denoiser, 8, modules=modules), batch_of(8, 1, data(8))
    gan = scott.student_loss(batch, ctx)["gan"]
    scott.discriminator_loss(batch, ctx)["discriminator"].backward()
    assert [site for site, *_ in seen] == ["gan/fake", "critic/gan/fake", "critic/gan/real"]
    assert torch.equal(seen[2][1], batch.latents) and all(start is None for *_, start in seen)
    reached = torch.autograd.grad(gan, denoiser.roles.parameters("student"), allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in reached)
    assert all(p.grad is not None for p in modules["discriminator"].parameters())


# Settings and the engine


def test_strong_noise_without_discriminator_warns():
    with pytest.warns(UserWarning, match="blurred"):
        SCottConfig(noise_strength=0.5, adversarial_weight=0.0)
    with pytest.warns(UserWarning, match="er_sde_5 without an adversarial term"):
        SCottConfig(sde_solver="er_sde_5", adversarial_weight=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SCottConfig(noise_strength=0.5)
        SCottConfig(adversarial_weight=0.0)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"noise_strength": 1.5}, "noise_strength"),
        ({"solver_steps": 0}, "solver_steps"),
        ({"adversarial_weight": -1.0}, "adversarial_weight"),
        ({"num_ddim_timesteps": 0}, "num_ddim_timesteps"),
        ({"sde_solver": "er_sde_5", "noise_strength": 0.3}, "noise_strength has no effect"),
    ],
)
def test_bad_settings_are_named(config, named):
    with pytest.raises(ValueError, match=named):
        SCottConfig(**config)


def test_sampler_is_lcms_on_its_own_grid():
    spec = SCott(SCottConfig()).sampler()
    assert spec == SamplerSpec.lcm_grid(4, 40) and spec.timesteps == (999, 749, 499, 249)


def test_a_lora_trains_and_leaves_the_teacher_alone(tiny_sd, tmp_path):
    scott = SCott(SCottConfig(guidance_scale=2.0))
    trainer = Trainer(scott, Teacher(tiny_sd), images(), settings(tmp_path, student="lora"))
    roles = trainer.networks.roles
    before = {name: p.clone() for name, p in roles.base.named_parameters() if "lora" not in name}
    for batches in trainer.batches.steps(0):
        trainer.train_step(batches)
        break
    assert all(torch.equal(p, before[n]) for n, p in roles.base.named_parameters() if "lora" not in n)
    assert max(p.abs().max() for n, p in roles.named_parameters("student") if "lora_B" in n) > 0
