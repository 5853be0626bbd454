"""LCM (arXiv 2310.04378): boundary, solver grid, the optimum in closed form on Gaussians, targets, guidance input."""

from __future__ import annotations

import copy

import pytest
import torch
from method_helpers import (
    SD,
    CleanMap,
    LabelledGaussians,
    batch_of,
    context,
    denoiser_of,
    f64,
    run,
)
from torch import nn
from trajectory_helpers import FLOW, JumpNet, behind_boundary, exact_map, gaussian_denoiser, orders, student_loss
from trajectory_helpers import product_map as flow_product

from fastdiff.data.rejects import Rejects
from fastdiff.diffusion import FlowSchedule, Gaussian, Prediction, jump, lcm_grid
from fastdiff.engine import Settings, Trainer
from fastdiff.engine.networks import build_networks
from fastdiff.methods import LCM, LCMConfig
from fastdiff.methods._trajectory import grid_points
from fastdiff.models.analytic import AnalyticTeacher, ExactNetwork
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.embeddings import guidance_embedding, with_guidance_input
from fastdiff.models.families import StableDiffusion
from fastdiff.models.roles import FullSpec, Roles
from fastdiff.models.sampler import consistency
from fastdiff.models.teacher import Teacher

MU, S = 1.3, 0.49
LAW = Gaussian(f64([MU]), f64([[S]]))


def method(**config) -> LCM:
    own = {"loss_type": "l2"} if "guidance_range" in config else {"guidance_scale": 1.0, "loss_type": "l2"}
    return LCM(LCMConfig(**own | config))


def levels(i: int) -> tuple[float, float]:
    """(alpha, sigma) at an index, from betas, without the code under test."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, 0)[i].item()
    return kept**0.5, (1 - kept) ** 0.5


def factor(t: int, s: int, variance: float) -> float:
    """What one DDIM step with the exact denoiser multiplies x_t - alpha_t mu by."""
    (at, st), (as_, ss) = levels(t), levels(s)
    return (as_ * at * variance + ss * st) / (at**2 * variance + st**2)


def product_map(points: int, mean: float, variance: float) -> dict[int, tuple[float, float, float]]:
    """time -> (slope, centre, offset): f(x, t) = offset + slope (x - centre), the optimum on the solver's grid."""
    slope, table, previous = 1.0, {0: (1.0, 0.0, 0.0)}, 0
    for n in range(1, points + 1):
        t = 1000 // points * n - 1
        slope *= factor(t, previous, variance)
        table[t] = (slope, levels(t)[0] * mean, levels(0)[0] * mean)
        previous = t
    return table


class ConsistencyMap(CleanMap):
    """A network whose consistency function f = c_skip x + c_out x0 is a given table."""

    def __init__(self, table: dict[int, tuple[float, float, float]]) -> None:
        super().__init__(SD, "epsilon")
        self.table = table

    def x0(self, x, time, labels):
        slope, centre, offset = f64([self.table[int(t)] for t in time]).T[:, :, None]
        tau = 10 * time.double()[:, None]
        skip, out = 0.25 / (tau**2 + 0.25), tau / (tau**2 + 0.25) ** 0.5
        f = offset + slope * (x - centre)
        return torch.where(tau > 0, (f - skip * x) / out.clamp_min(1e-9), x)


def data(rows: int) -> torch.Tensor:
    return MU + S**0.5 * torch.randn(rows, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# Boundary and grid


def test_at_index_zero_the_consistency_function_is_its_input_bit_for_bit(tiny_sd):
    denoiser = Denoiser(Roles(tiny_sd.unet, {}), StableDiffusion(), SD, "epsilon")
    x = torch.randn(2, 4, 16, 16)
    cond = Conditioning({"prompt_embeds": torch.randn(2, 16, 16)})
    with torch.no_grad():
        at_zero = denoiser(x, torch.zeros(2), cond, "teacher")
        later = denoiser(x, torch.full((2,), 19.0), cond, "teacher")
    assert torch.equal(consistency(at_zero, 10.0), x)
    assert not torch.allclose(consistency(later, 10.0), x, atol=1e-3)


def test_boundary_weights_at_the_first_grid_time():
    x, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    t = torch.tensor([19.0])
    skip = consistency(Prediction.from_x0(zero, x, t, SD), 10.0).item()
    out = consistency(Prediction.from_x0(x, zero, t, SD), 10.0).item()
    assert skip == pytest.approx(6.925e-6, abs=1e-9)
    assert out == pytest.approx(0.9999965, abs=1e-7)
    assert skip == pytest.approx(0.25 / (190**2 + 0.25), rel=1e-12)
    assert out == pytest.approx(190 / (190**2 + 0.25) ** 0.5, rel=1e-12)


def test_solver_grid_ends_at_index_zero_not_at_the_clean_end():
    seen = []

    class Spy(ConsistencyMap):
        def x0(self, x, time, labels):
            seen.append(time.tolist())
            return super().x0(x, time, labels)

    denoiser = denoiser_of(ExactNetwork(LAW, SD, "epsilon"), student=Spy(product_map(50, MU, S)))
    ctx = context(denoiser, 3, {"pair": torch.tensor([0, 1, 49])})
    method().student_loss(batch_of(3, 1, data(3)), ctx)
    assert seen == [[19.0, 39.0, 999.0], [0.0, 19.0, 979.0]]
    assert len(lcm_grid(50)) == 50


def test_all_pairs_of_the_grid_are_drawn():
    asked = {}
    denoiser = denoiser_of(ExactNetwork(LAW, SD, "epsilon"), student=ConsistencyMap(product_map(50, MU, S)))
    ctx = context(denoiser, 4)
    original = ctx.random.fallback.integers
    ctx.random.fallback.integers = lambda site, low, high: (
        asked.setdefault(site, (low, high)) and original(site, low, high)
    )
    method().student_loss(batch_of(4, 1, data(4)), ctx)
    assert asked == {"pair": (0, 50)}


@pytest.mark.parametrize(("points", "golden"), [(25, 0.653647), (50, 0.676324), (100, 0.688422), (200, 0.694724)])
def test_the_teachers_grid_steps_multiply_to_the_golden_slopes(points, golden):
    assert product_map(points, MU, S)[999][0] == pytest.approx(golden, abs=1e-6)
    denoiser = denoiser_of(ExactNetwork(LAW, SD, "epsilon"))
    x, cond = f64([[-1.0], [2.0]])[:, :, None, None], Conditioning({"labels": torch.zeros(2, dtype=torch.int64)})
    for t, s in reversed(lcm_grid(points)):
        x = jump(denoiser(x, torch.full((2,), float(t)), cond, "teacher"), torch.full((2,), float(s)))
    assert ((x[1] - x[0]) / 3).item() == pytest.approx(golden, abs=1e-6)


# Optimum


def every_pair(points: int, student: nn.Module, base: nn.Module, lcm: LCM, draws=None) -> float:
    rows = 4 * points
    denoiser = denoiser_of(base, student=student)
    pairs = torch.arange(points).repeat(4)
    ctx = context(denoiser, rows, {"pair": pairs} | (draws or {}))
    return lcm.student_loss(batch_of(rows, 1, data(rows)), ctx)["consistency"].item()


@pytest.mark.parametrize("points", [10, 50])
def test_loss_vanishes_at_the_product_map_and_only_there(points):
    table = product_map(points, MU, S)
    base, lcm = ExactNetwork(LAW, SD, "epsilon"), method(num_ddim_timesteps=points)
    assert every_pair(points, ConsistencyMap(table), base, lcm) < 1e-20
    huber = method(num_ddim_timesteps=points, loss_type="huber")
    assert every_pair(points, ConsistencyMap(table), base, huber) < 1e-15
    exact = {t: ((S / (levels(t)[0] ** 2 * S + levels(t)[1] ** 2)) ** 0.5, levels(t)[0] * MU, MU) for t in table if t}
    # The ODE's own consistency function is not the optimum of the discrete loss.
    assert every_pair(points, ConsistencyMap(exact | {0: table[0]}), base, lcm) > 1e-7


@pytest.mark.parametrize("w", [1.0, 3.0, 8.0])
def test_guidance_moves_the_optimum_to_the_guided_mean(w):
    """Equal covariances: the guided teacher is that of N(mu_0 + w (mu_c - mu_0), S)."""
    null = 0.4
    laws = [Gaussian(f64([m]), f64([[S]])) for m in (MU, null)]
    student = ConsistencyMap(product_map(50, null + w * (MU - null), S))
    assert every_pair(50, student, LabelledGaussians(laws), method(guidance_scale=w)) < 1e-18
    if w != 1:
        assert every_pair(50, student, LabelledGaussians(laws), method()) > 1e-6


def test_guidance_is_one_more_than_the_papers_w():
    laws = [Gaussian(f64([m]), f64([[v]])) for m, v in [(MU, S), (0.4, 0.9)]]
    denoiser = denoiser_of(LabelledGaussians(laws))
    batch, t, x = batch_of(5, 1), torch.tensor([0.0, 19.0, 400.0, 700.0, 999.0]), data(5)
    cond, null = (denoiser(x, t, batch.cond[:] if c else batch.null.expand(5), "teacher").x0 for c in (True, False))
    w = f64([0.0, 1.5, 4.0, 7.0, 13.0])
    guided = denoiser(x, t, batch.cond, "teacher", batch.null, w + 1).x0
    expected = cond + w[:, None, None, None] * (cond - null)
    torch.testing.assert_close(guided, expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("index", [399, 799])
@pytest.mark.parametrize(("schedule", "coarsest"), [(SD, 25), (FLOW, 5)], ids=["vp", "flow"])
def test_residual_of_the_exact_consistency_function_is_of_second_order(schedule, coarsest, index):
    """On the table behind the boundary weights, whose trajectory ends at index 0."""

    def exact(x, t, s):
        if schedule is FLOW:
            return exact_map(FLOW)(x, t, s)
        return behind_boundary(exact_map()(x, t, torch.zeros_like(s)), x, t)

    found = []
    for points in (coarsest * 2**k for k in range(4)):
        number = torch.full((64,), (index + 1) * points // 1000 - 1)
        student = JumpNet(exact, lambda i: torch.full_like(i, -1.0), schedule)
        lcm = method(num_ddim_timesteps=points)
        loss = student_loss(lcm, gaussian_denoiser(schedule, student=student), 64, {"pair": number})
        found.append(loss["consistency"].item())
    assert orders(found) == pytest.approx([2] * 3, abs=0.35)
    assert orders(found)[-1] == pytest.approx(2, abs=0.1)


class Table(ConsistencyMap):
    """One learnable slope and intercept a grid time."""

    def __init__(self, times: list[int]) -> None:
        super().__init__({})
        self.times = times
        self.slope = nn.Parameter(torch.full((len(times),), 0.5, dtype=torch.float64))
        self.mean = nn.Parameter(torch.zeros(len(times), dtype=torch.float64))

    def x0(self, x, time, labels):
        index = torch.bucketize(time.double(), f64(self.times))
        return self.mean[index][:, None] + self.slope[index][:, None] * x


@pytest.mark.slow
def test_an_affine_student_per_grid_time_learns_the_product_map():
    points = 10
    times = [t for t, _ in lcm_grid(points)]
    student = Table([0, *times][1:])
    lcm = method(num_ddim_timesteps=points, target_decay=0.0)
    denoiser = denoiser_of(ExactNetwork(LAW, SD, "epsilon"), student=student)
    optimizer = torch.optim.Adam(student.parameters(), 2e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6000, eta_min=1e-3)
    batch = batch_of(80, 1, data(80))
    run(lcm, denoiser, {"student": optimizer}, batch, 6000, lambda step: schedule.step())
    x = f64([[-1.0], [2.0]])[:, :, None, None]
    f = consistency(
        denoiser(x, torch.full((2,), 999.0), batch.cond[:2], "student"), lcm.config.timestep_scaling_factor
    )
    slope, centre, offset = product_map(points, MU, S)[999]
    assert slope == pytest.approx(0.5927684864612562, abs=1e-9)
    assert ((f[1] - f[0]) / 3).item() == pytest.approx(slope, abs=1e-6)
    assert f[1].item() == pytest.approx(offset + slope * (2 - centre), abs=1e-6)


# Flow matching


def test_on_a_flow_the_map_is_the_clean_prediction_down_to_the_clean_end():
    points, schedule = 40, FLOW
    seen, rows = [], 4 * points

    class Optimum(JumpNet):
        def forward(self, x_t, time, labels):
            seen.append(time)
            return super().forward(x_t, time, labels)

    student = Optimum(
        flow_product(grid_points(points).tolist(), schedule), lambda i: torch.full_like(i, -1.0), schedule
    )
    teacher = ExactNetwork(LAW, schedule, "flow")
    denoiser = denoiser_of(teacher, schedule, "flow", student=student)
    ctx = context(denoiser, rows, {"pair": torch.arange(points).repeat(4)})
    one = method(num_ddim_timesteps=points)
    # Times are rounded to float32, which moves the grid by 1e-8.
    assert one.student_loss(batch_of(rows, 1, data(rows)), ctx)["consistency"] < 1e-13
    torch.testing.assert_close(seen[0][:3], torch.tensor([25.0, 50.0, 75.0]))
    torch.testing.assert_close(seen[1][:3], torch.tensor([0.0, 25.0, 50.0]))
    scheduler = one.sampler().build_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow")
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [1000.0, 750.0, 500.0, 250.0] and scheduler.config.stochastic_sampling


def test_a_shifted_flow_shifts_the_grid():
    shifted, seen = FlowSchedule(3.0), []

    class Spy(ExactNetwork):
        def forward(self, x_t, time, labels):
            seen.append(time)
            return super().forward(x_t, time, labels)

    denoiser = denoiser_of(ExactNetwork(LAW, shifted, "flow"), shifted, "flow", student=Spy(LAW, shifted, "flow"))
    ctx = context(denoiser, 2, {"pair": torch.tensor([0, 19])})
    method(num_ddim_timesteps=40).student_loss(batch_of(2, 1, data(2)), ctx)
    u = torch.tensor([0.025, 0.5])
    torch.testing.assert_close(seen[0], 1000 * 3 * u / (1 + 2 * u))


# Guidance input


def test_a_zero_initialised_guidance_input_leaves_the_teacher_as_it_is(tiny_sd):
    widened = with_guidance_input(tiny_sd.unet, 32)
    x, t, embeds = torch.randn(2, 4, 16, 16), torch.tensor([10.0, 900.0]), torch.randn(2, 16, 16)
    w = guidance_embedding(torch.tensor([2.0, 13.0]), 32)
    with torch.no_grad():
        plain = tiny_sd.unet(x, t, embeds).sample
        assert torch.equal(widened(x, t, embeds, timestep_cond=w).sample, plain)
        nn.init.normal_(widened.time_embedding.cond_proj.weight)
        assert not torch.allclose(widened(x, t, embeds, timestep_cond=w).sample, plain, atol=1e-3)
    assert widened.config.time_cond_proj_dim == 32 and tiny_sd.unet.config.time_cond_proj_dim is None


def test_guidance_embedding_is_the_stock_pipelines(tiny_sd):
    w = torch.tensor([0.0, 3.7, 13.0])
    torch.testing.assert_close(
        guidance_embedding(w, 256), tiny_sd.get_guidance_scale_embedding(w, 256), rtol=0, atol=1e-4
    )
    by_hand = (1000 * 3.7 * 10000.0 ** (-5 / 127)) % (2 * torch.pi)
    assert guidance_embedding(w.double(), 256)[1, 5].item() == pytest.approx(
        torch.tensor(by_hand).sin().item(), abs=1e-3
    )


def test_random_guidance_reaches_solver_and_student(tiny_sd):
    lcm = method(guidance_range=(3.0, 15.0))
    student = lcm.student_network(tiny_sd.unet)
    roles = Roles(tiny_sd.unet, {"student": FullSpec(student)})
    denoiser = Denoiser(roles, StableDiffusion(), SD, "epsilon")
    fed = []
    student.register_forward_pre_hook(lambda m, a, k: fed.append(k.get("timestep_cond")), with_kwargs=True)
    batch = _sd_batch()
    ctx = context(denoiser, 2, {"guidance": torch.tensor([0.25, 0.75])})
    lcm.student_loss(batch, ctx)
    expected = guidance_embedding(torch.tensor([6.0, 12.0]) - 1, 256)
    assert len(fed) == 2 and all(torch.allclose(one, expected, atol=1e-4) for one in fed)
    fixed = method(guidance_scale=6.0).student_loss(batch, ctx)["consistency"]
    assert not torch.equal(fixed, lcm.student_loss(batch, ctx)["consistency"])


# Targets and gradients


def _sd_batch():
    from fastdiff.methods import Batch

    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(3, 16, 16, generator=generator)
    cond = Conditioning({"prompt_embeds": embeds[:2]})
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    return Batch(torch.arange(2), cond, Conditioning({"prompt_embeds": embeds[2:]}), (4, 16, 16), latents)


def settings(**changes) -> Settings:
    return Settings(**{"train_batch_size": 2, "lora_rank": 2, "report_to": "none"} | changes)


def test_an_adapters_target_is_the_live_adapter_without_gradient(tiny_sd):
    lcm = method(guidance_scale=3.0)
    networks = build_networks(lcm, Teacher(tiny_sd), settings(student="lora"))
    assert "target" not in networks.roles
    denoiser, batch = networks.denoiser, _sd_batch()
    torch.manual_seed(0)
    for p in networks.parameters("student"):
        nn.init.normal_(p, std=0.3)
    ctx = context(denoiser, 2, {"pair": torch.tensor([0, 30])})
    loss = lcm.student_loss(batch, ctx)["consistency"]
    loss.backward()

    pairs = torch.tensor(lcm_grid(50))[[0, 30]].float()
    x_t = SD.add_noise(batch.latents, ctx.random.normal("eps", (4, 16, 16)), pairs[:, 0])
    with torch.no_grad():
        x_s = jump(denoiser(x_t, pairs[:, 0], batch.cond, "teacher", batch.null, 3.0), pairs[:, 1])
        adapted = consistency(denoiser(x_s, pairs[:, 1], batch.cond, "student"), lcm.config.timestep_scaling_factor)
        bare = consistency(denoiser(x_s, pairs[:, 1], batch.cond, "teacher"), lcm.config.timestep_scaling_factor)
        student = consistency(denoiser(x_t, pairs[:, 0], batch.cond, "student"), lcm.config.timestep_scaling_factor)
    torch.testing.assert_close(loss, (student - adapted).square().mean(), rtol=1e-4, atol=1e-7)
    assert abs((student - bare).square().mean() - loss) > 1e-3 * loss
    assert any(p.grad.abs().max() > 0 for p in networks.parameters("student"))
    own = {id(p) for p in networks.parameters("student")}
    assert all(p.grad is None for p in networks.roles.base.parameters() if id(p) not in own)


def test_untrained_adapters_predict_what_the_teacher_predicts(tiny_sd):
    networks = build_networks(method(), Teacher(tiny_sd), settings(student="lora"))
    batch, t = _sd_batch(), torch.tensor([19.0, 999.0])
    with torch.no_grad():
        student, teacher = (
            networks.denoiser(batch.latents, t, batch.cond, role).x0 for role in ("student", "teacher")
        )
    assert torch.equal(student, teacher)


class Latents:
    """Data in memory: latents with the caption every Gaussian has."""

    def __init__(self, latents: torch.Tensor) -> None:
        self.latents, self.rejects = latents, Rejects(len(latents), source="memory")

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, visit):
        return {"prompt": "a sample", "latents": self.latents[getattr(visit, "item", visit)]}

    def collate(self, items):
        return {"prompt": [item["prompt"] for item in items], "latents": torch.stack([i["latents"] for i in items])}


def test_full_students_have_an_averaged_target_that_gets_no_gradient(tmp_path):
    teacher = AnalyticTeacher.gaussian(f64([MU]), f64([[S]]))
    lcm = method(target_decay=0.9)
    run_settings = settings(student="full", output_dir=str(tmp_path), max_train_steps=2, learning_rate=1e-2)
    trainer = Trainer(lcm, teacher, Latents(data(8).float()), run_settings)
    assert "target" in trainer.networks.roles
    batches = next(trainer.batches.steps(0))
    before = {r: copy.deepcopy(trainer.networks.roles.state_dict(r)) for r in ("student", "target")}
    assert all(torch.equal(before["student"][k], before["target"][k]) for k in before["student"])
    trainer.train_step(batches)
    after = {r: trainer.networks.roles.state_dict(r) for r in ("student", "target")}
    moved = 0.0
    for name, old in before["target"].items():
        expected = 0.9 * old + 0.1 * after["student"][name]
        torch.testing.assert_close(after["target"][name], expected, rtol=1e-5, atol=1e-7)
        moved = max(moved, (after["student"][name] - old).abs().max().item())
    assert moved > 1e-3
    assert all(p.grad is None for p in trainer.networks.parameters("target"))

    ctx = context(trainer.networks.denoiser, 2)
    lcm.student_loss(batches[0], ctx)["consistency"].backward()
    assert all(p.grad is None for p in trainer.networks.parameters("target"))
    assert any(p.grad is not None for p in trainer.networks.parameters("student"))
    assert method(target_decay=0.0).targets() == ()


# Sampler


def test_sampler_times_are_those_of_the_stock_scheduler():
    from diffusers import LCMScheduler

    assert method(num_inference_steps=4).sampler().timesteps == (999, 759, 499, 259)
    assert method(num_inference_steps=8).sampler().timesteps == (999, 879, 759, 639, 499, 379, 259, 139)
    for steps in (1, 2, 3, 5, 6):
        stock = LCMScheduler()
        stock.set_timesteps(steps, original_inference_steps=50)
        assert list(method(num_inference_steps=steps).sampler().timesteps) == stock.timesteps.tolist()
    spec = method(timestep_scaling_factor=7.0).sampler()
    assert (spec.timestep_scaling, spec.original_inference_steps, spec.guidance_scale) == (7.0, 50, 0.0)
    assert method(guidance_range=(3.0, 15.0)).sampler().guidance_scale == 9.0


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"target_decay": 1.0}, "target_decay"),
        ({"guidance_range": (3.0, 2.0)}, "guidance_range"),
        ({"huber_c": 0.0}, "huber_c"),
        ({"num_ddim_timesteps": 0}, "num_ddim_timesteps"),
    ],
)
def test_bad_settings_are_named(config, named):
    with pytest.raises(ValueError, match=named):
        LCMConfig(**config)


def test_images_are_needed():
    denoiser = denoiser_of(ExactNetwork(LAW, SD, "epsilon"), student=ConsistencyMap(product_map(50, MU, S)))
    with pytest.raises(ValueError, match="train_data_dir"):
        method().student_loss(batch_of(3, 1), context(denoiser, 3))
