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
    PROCESSES,
    JumpNet,
    S,
    behind_boundary,
    data,
    gaussian_denoiser,
    images,
    levels,
    orders,
    settings,
    student_loss,
)

from fastdiff.diffusion import FlowSchedule, Prediction, er_sde_5
from fastdiff.engine import Trainer
from fastdiff.methods import LCM, LCMConfig, SCott, SCottConfig
from fastdiff.methods._trajectory import grid_points
from fastdiff.models.analytic import ExactNetwork
from fastdiff.models.analytic_networks import PointNet
from fastdiff.models.sampler import SamplerSpec
from fastdiff.models.teacher import Teacher

pytestmark = pytest.mark.filterwarnings("ignore:noise_strength", "ignore:sde_solver er_sde_5")
SCHEDULES = pytest.mark.parametrize("schedule", [SD, FLOW], ids=["vp", "flow"])
PLAIN = {"guidance_scale": 1.0, "target_decay": 0.0, "adversarial_weight": 0.0}


def method(**config) -> SCott:
    return SCott(SCottConfig(**PLAIN | {"solver_steps": 1, "num_ddim_timesteps": 10} | config))


def stochastic_step(t: float, s: float, solver: str, eta: float, schedule) -> tuple[float, float]:
    """(what a step with the exact denoiser multiplies x_t - alpha_t mu by, the noise it adds)."""
    (at, st), (as_, ss) = levels(t, schedule), levels(s, schedule)
    kt, ks = st / at, ss / as_
    kept = {  # kappa_t phi(kappa_s) / (kappa_s phi(kappa_t)), which is finite at pure noise
        "ddim": (1 - eta**2 * (1 - (ks / kt) ** 2)).sqrt(),
        "er_sde": (ks / kt) ** eta**2,
        "er_sde_5": ((ks**0.3).exp() + 10) / ((kt**0.3).exp() + 10),
    }[solver]
    slope = (as_ * at * S + kept * ss * st) / (at**2 * S + st**2)
    return slope.item(), (ss * (1 - kept**2).clamp_min(0).sqrt()).item()


def closed_form(points: list[int], eta: float, schedule, solver: str = "ddim", steps: int = 1):
    """(index -> slope of the optimum, each pair's residual there where all noise is 1), from the end of the grid up."""
    slopes, residuals = {points[0]: 1.0}, []
    for low, high in pairwise(points):
        bottom = -1 if low == 0 else low  # LCM's grid on a table is cut at index 0
        way = [max(low, round(high + (bottom - high) * step / steps)) for step in range(steps + 1)]
        slope, noise = 1.0, 0.0
        for t, s in pairwise(way):
            factor, fresh = stochastic_step(t, s, solver, eta, schedule)
            slope, noise = slope * factor, noise * factor + fresh
        slopes[high] = slopes[low] * slope
        residuals.append(slopes[low] * noise)
    return slopes, residuals


def optimum(points: list[int], slopes: dict[int, float], schedule) -> JumpNet:
    """The network whose consistency function has these slopes; on the table the boundary weights are undone."""

    def f(x, t, s):
        slope = f64([slopes[int(index)] for index in t.flatten()])[:, None]
        value = levels(points[0], schedule)[0] * MU + slope * (x - levels(t, schedule)[0] * MU)
        return value if schedule is FLOW else behind_boundary(value, x, t)

    # Named by its clean prediction: the jump to the clean end.
    return JumpNet(f, lambda index: torch.full_like(index, -1.0), schedule)


def grid(schedule) -> list[int]:
    points = grid_points(10).tolist()
    return [0, *points[1:]] if schedule is SD else points


# Limits


def loss_and_gradients(one, schedule, draws=None, kind=None):
    torch.manual_seed(0)
    network, kind = PointNet(1, 1).double(), kind or KINDS[schedule]
    denoiser = denoiser_of(ExactNetwork(LAW, schedule, kind), schedule, kind, student=network)
    loss = student_loss(one, denoiser, 16, draws)["consistency"]
    return [loss.detach(), *torch.autograd.grad(loss, list(network.parameters()))]


def same(a, b) -> bool:
    return all(torch.allclose(x, y, rtol=1e-12, atol=1e-12) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("schedule", "kind"), PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("solver", ["ddim", "er_sde"])
def test_without_noise_one_sub_step_and_no_discriminator_it_is_lcm(schedule, kind, solver):
    lcm = LCM(LCMConfig(guidance_scale=1.0, target_decay=0.0, loss_type="l2", num_ddim_timesteps=10))
    expected = loss_and_gradients(lcm, schedule, kind=kind)
    assert same(loss_and_gradients(method(noise_strength=0.0, sde_solver=solver), schedule, kind=kind), expected)
    assert not same(loss_and_gradients(method(noise_strength=0.2, sde_solver=solver), schedule, kind=kind), expected)


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
        grid = grid_points(points).tolist()
        denoiser = gaussian_denoiser(FLOW, student=optimum(grid, closed_form(grid, 0.0, FLOW)[0], FLOW))
        draws = {"pair": torch.full((64,), 8 * points // 10 - 1)}
        for steps, found in losses.items():
            one = method(noise_strength=0.0, num_ddim_timesteps=points, solver_steps=steps)
            found.append(student_loss(one, denoiser, 64, draws)["consistency"].item())
    assert max(losses[1]) < 1e-12
    assert orders(losses[5])[-1] == pytest.approx(2, abs=0.1), orders(losses[5])


# Optimum


@SCHEDULES
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    ("solver", "eta"),
    [("ddim", 0.2), ("ddim", 0.5), ("ddim", 1.0), ("er_sde", 0.2), ("er_sde", 0.5), ("er_sde_5", 0.2)],
)
def test_loss_at_the_optimum_is_the_noise_that_it_cannot_know(schedule, steps, solver, eta):
    """The residual at the optimum is slope(u) times the noise added on the way to u, exactly, sample by sample."""
    points = grid(schedule)
    slopes, residuals = closed_form(points, eta, schedule, solver, steps)
    denoiser = gaussian_denoiser(schedule, student=optimum(points, slopes, schedule))
    one, found = method(noise_strength=eta, sde_solver=solver, solver_steps=steps), []
    z = torch.tensor([1.0, -1.0]).repeat(40)[:, None, None, None]
    for noise in (z, 0 * z):
        draws = {"pair": torch.arange(10).repeat(8)} | {f"solver/{step}": noise for step in range(steps)}
        found.append(student_loss(one, denoiser, 80, draws)["consistency"].item())
    assert found[0] == pytest.approx(sum(r**2 for r in residuals) / 10, rel=1e-6)
    assert found[1] < (1e-20 if schedule is SD else 1e-13)


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


def silent_slope(one: SCott, schedule) -> float:
    """What the teacher's steps without their noise multiply differences by, from index 799 to the clean end."""
    number = torch.arange(8 * one.config.num_ddim_timesteps // 10).repeat(2)
    draws = {"pair": number, "solver/0": torch.zeros(len(number), 1, 1, 1)}
    ctx = context(gaussian_denoiser(schedule, "flow"), len(number), draws)
    x = f64([-1.0, 2.0]).repeat_interleave(len(number) // 2)[:, None, None, None]
    low, high = one.solve(x, one.place(ctx, "cpu"), batch_of(len(number), 1), ctx, 1.0).flatten().chunk(2)
    return ((high - low) / 3).prod().item()


def limit(solver: str, eta: float) -> float:
    """The slope of infinitely many steps from 0.8 of a flow: ln of it is -int kappa^2 / (S + kappa^2) d ln phi."""
    if solver != "er_sde_5":
        return (S / (S + 16)) ** ((1 + eta**2) / 2) / 0.2  # phi = kappa^(1 + eta^2)
    kappa = torch.linspace(0, 2, 20_001, dtype=torch.float64) ** 2
    phi = kappa * ((kappa**0.3).exp() + 10)
    middle = (kappa[1:] + kappa[:-1]) / 2
    shares = middle[1:] ** 2 / (S + middle[1:] ** 2)  # of a first interval nothing is left
    return torch.exp(-(shares * phi[1:].log().diff()).sum()).item() / 0.2


@pytest.mark.parametrize(
    ("solver", "eta"), [("ddim", 0.3), ("ddim", 0.6), ("er_sde", 0.3), ("er_sde", 0.6), ("er_sde_5", 0.2)]
)
def test_the_optimum_comes_to_the_sdes_own_at_first_order(solver, eta):
    errors = [
        silent_slope(method(noise_strength=eta, sde_solver=solver, num_ddim_timesteps=points), FLOW)
        - limit(solver, eta)
        for points in (25, 50, 100, 200)
    ]
    found = orders([error**2 for error in errors])
    assert found == pytest.approx([1] * 3, abs=0.12) and found[-1] == pytest.approx(1, abs=0.03), found


@pytest.mark.parametrize("solver", ["ddim", "er_sde"])
def test_deviation_of_one_step_samples_falls_with_the_noise(solver):
    """(s^2 / (s^2 + kappa^2))^(eta^2 / 2) of the data's, at the kappa of Stable Diffusion's last index."""
    alpha, sigma = levels(999)
    schedule = FlowSchedule(((sigma / alpha) / 4).item())  # as noisy at index 799
    for eta, golden in {0.0: 1.0, 0.1: 0.9701, 0.2: 0.8855, 0.3: 0.7606, 0.6: 0.3348, 1.0: 0.0478}.items():
        coarse, fine = (
            silent_slope(method(noise_strength=eta, sde_solver=solver, num_ddim_timesteps=points), schedule)
            for points in (250, 500)
        )
        signal = alpha / (alpha + sigma)
        deviation = (2 * fine - coarse) * signal * (1 + (sigma / alpha) ** 2 / S).sqrt()
        assert deviation.item() == pytest.approx(golden, abs=1e-4)


def test_the_closed_form_is_where_the_gradient_vanishes():
    """Of a free slope and mean at each time; noise of both signs on the same samples makes expectations exact."""

    class Table(JumpNet):
        def __init__(self, shift: float) -> None:
            super().__init__(self.value, lambda index: torch.full_like(index, -1.0))
            table, _ = closed_form(grid(SD), 0.5, SD)
            self.times = f64(grid(SD)[1:])
            self.slope = nn.Parameter(f64([table[t] for t in grid(SD)[1:]]) + shift)

        def value(self, x, t, s):
            number = torch.bucketize(t.flatten(), self.times).clamp_max(9)
            slope = self.slope[number][:, None]
            return behind_boundary(levels(0)[0] * MU + slope * (x - levels(t)[0] * MU), x, t)

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
    assert closed_form(grid(SD), 0.5, SD)[0][999] == pytest.approx(0.3487, abs=1e-4)


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
