"""Rectified flow (arXiv 2209.03003, 2309.06380, 2405.20320): exact couplings, stock samplers, limits, training."""

from __future__ import annotations

import pytest
import torch
from method_helpers import SD, context, denoiser_of, f64, settle, spatial
from straight_helpers import FLOW, KINDS, LAW, A, Free, PairData, StraightNetwork, noise, pairs, stock_samples
from trajectory_helpers import orders

from fastdiff.diffusion import (
    Prediction,
    Terminal,
    UShaped,
    rewrap,
    sample_huber,
    solve,
    teacher_times,
    trailing_grid,
)
from fastdiff.engine import Settings, Trainer
from fastdiff.methods._flow_map import noise_share, time_of_share
from fastdiff.methods._straight import line_through
from fastdiff.methods.base import Context
from fastdiff.methods.kd import KD, KDConfig
from fastdiff.methods.rectified_flow import RectifiedFlow, RectifiedFlowConfig
from fastdiff.methods.rfpp import RFPP, RFPPConfig
from fastdiff.models.analytic import AnalyticTeacher, ExactNetwork
from fastdiff.models.analytic_networks import AffinePerBin
from fastdiff.models.sampler import SamplerSpec
from fastdiff.models.teacher import Teacher

ROWS = 64


def loss(method, student, z, x0, schedule=SD, kind="epsilon", draws=None, **extra) -> dict[str, torch.Tensor]:
    denoiser = denoiser_of(ExactNetwork(LAW, schedule, kind), schedule, kind, student=student)
    ctx = context(denoiser, len(z), draws)
    for name, value in extra.items():
        setattr(ctx, name, value)
    return dict(method.student_loss(pairs(z, x0), ctx))


def coupled(z: torch.Tensor, matrix: torch.Tensor = A) -> torch.Tensor:
    return LAW.mean + z @ matrix.T


# The optimum


@pytest.mark.parametrize("objective", ["reflow", "distill"])
@pytest.mark.parametrize("case", KINDS)
@pytest.mark.parametrize("options", [{}, {"regress": "native", "start_timestep": 399}, {"times": "u_shaped"}], ids=str)
def test_loss_is_zero_at_the_straight_velocity_of_a_linear_coupling(case, objective, options):
    if objective == "distill":
        options = {name: value for name, value in options.items() if name == "start_timestep"}
        options |= {"num_inference_steps": 4}
    schedule, kind = KINDS[case]
    method, z = RectifiedFlow(RectifiedFlowConfig(objective=objective, **options)), noise(ROWS)
    start = schedule.time_of_index(options.get("start_timestep", 999)).item()
    student = StraightNetwork(LAW.mean, A, schedule, kind, start)
    (value,) = loss(method, student, z, coupled(z), schedule, kind).values()
    assert value < (1e-13 if kind == "flow" else 1e-20)  # a flow's network is told 1000 t, rounded to float32
    (independent,) = loss(method, student, z, coupled(noise(ROWS, seed=1)), schedule, kind).values()
    assert independent > 0.05


def test_the_straight_velocity_of_a_flow_is_the_closed_form():
    """v = -mu + (I - A) [(1 - t) A + t I]^-1 (x - (1 - t) mu), and it is z - x0 all along the line."""
    z, t = noise(5), f64([0.1, 0.3, 0.5, 0.9, 1.0])
    x = (1 - t)[:, None] * coupled(z) + t[:, None] * z
    network = StraightNetwork(LAW.mean, A, FLOW, "flow")
    found = network(spatial(x), 1000 * t, torch.zeros(5)).flatten(1)
    eye = torch.eye(2).double()
    for row in range(5):
        inverse = torch.linalg.inv((1 - t[row]) * A + t[row] * eye)
        closed = -LAW.mean + (eye - A) @ inverse @ (x[row] - (1 - t[row]) * LAW.mean)
        torch.testing.assert_close(found[row], closed, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, z - coupled(z), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "method",
    [RectifiedFlow(RectifiedFlowConfig()), RFPP(RFPPConfig(perceptual_weight=0.0, huber_c=10.0))],
    ids=["rectified_flow", "rfpp"],
)
def test_an_affine_student_per_time_learns_the_straight_velocity(method):
    """v = -mu + (I - A) [(1 - t) A + t I]^-1 (x - (1 - t) mu) at each time that is trained."""
    draws = {"t": f64([0.1, 0.4, 0.7, 0.95]).repeat(10)}
    t = method.drawn_times(context(denoiser_of(ExactNetwork(LAW, FLOW, "flow"), FLOW, "flow"), 40, draws))[:4]
    student, z = AffinePerBin(2, (1000 * t).tolist()).double(), noise(40)
    denoiser = denoiser_of(ExactNetwork(LAW, FLOW, "flow"), FLOW, "flow", student=student)
    ctx, weights = context(denoiser, 40, draws), denoiser.roles.parameters("student")
    settle(lambda: method.student_loss(pairs(z, coupled(z)), ctx)["reflow"], weights, sweeps=5)
    eye, x = torch.eye(2).double(), noise(5, seed=3)
    network = denoiser.roles.network("student")
    for time in t:
        inverse = torch.linalg.inv((1 - time) * A + time * eye)
        closed = -LAW.mean + (x - (1 - time) * LAW.mean) @ ((eye - A) @ inverse).T
        with torch.no_grad():
            found = network(spatial(x), torch.full((5,), 1000 * time.item()), torch.zeros(5)).flatten(1)
        torch.testing.assert_close(found, closed, rtol=0, atol=1e-8)


def test_pairs_of_an_inexact_teacher_have_its_own_matrix():
    """Four DDIM steps: the matrix is the product of the steps' factors, not the ODE's root."""
    z = noise(ROWS)

    def exact(x, t):
        return Prediction.from_x0(LAW.denoise(x, t, SD), x, t, SD)

    x0 = solve(exact, z, teacher_times(SD, 4))
    basis = torch.linalg.eigh(LAW.cov)[1]
    factor = torch.ones(2).double()
    for t, s in trailing_grid(4, 1000):
        factor = factor * LAW.ddim_factors(t, Terminal.CLEAN if s < 0 else s, SD)
    B = basis @ torch.diag(factor) @ basis.T
    mean = LAW.mean - SD.alpha(999.0) * B @ LAW.mean  # the solver starts from z, whose mean is 0
    method = RectifiedFlow(RectifiedFlowConfig())
    assert loss(method, StraightNetwork(mean, B), z, x0)["reflow"] < 1e-20
    assert loss(method, StraightNetwork(LAW.mean, A), z, x0)["reflow"] > 1e-3


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2)])
@pytest.mark.parametrize("objective", ["reflow", "distill", "rfpp"])
def test_residual_of_the_exact_straight_velocity_is_of_the_order_of_the_pairs_solver(objective, solver, order):
    if objective == "rfpp":
        method = RFPP(RFPPConfig(distance="l2", perceptual_weight=0.0))
    else:
        method = RectifiedFlow(RectifiedFlowConfig(objective=objective))
    z, student, found = noise(ROWS), StraightNetwork(LAW.mean, A, FLOW, "flow"), []

    def exact(x, t):
        return Prediction.from_x0(LAW.denoise(x, t, FLOW), x, t, FLOW)

    for steps in (5, 10, 20, 40):
        x0 = solve(exact, z, teacher_times(FLOW, steps), solver)
        (value,) = loss(method, student, z, x0, FLOW, "flow").values()
        found.append(value.item())
    assert orders(found) == pytest.approx([order] * 3, abs=0.25)
    assert orders(found)[-1] == pytest.approx(order, abs=0.1)


# Sampling


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("case", KINDS)
def test_stock_schedulers_are_exact_on_the_straight_student(case, steps):
    schedule, kind = KINDS[case]
    z = noise(8)
    spec = RectifiedFlow(RectifiedFlowConfig(num_inference_steps=steps)).sampler()
    found = stock_samples(spec, StraightNetwork(LAW.mean, A, schedule, kind), z, kind)
    torch.testing.assert_close(found, coupled(z), rtol=0, atol=1e-6)


def test_one_step_from_an_earlier_index_is_baked_into_the_stock_scheduler():
    z = noise(8)
    spec = RectifiedFlow(RectifiedFlowConfig(start_timestep=399)).sampler()
    assert spec == SamplerSpec("ddim", (399,))
    found = stock_samples(spec, StraightNetwork(LAW.mean, A, start=399.0), z, "epsilon")
    torch.testing.assert_close(found, coupled(z), rtol=0, atol=1e-6)


def test_lines_begin_where_the_sampler_feeds_noise():
    flow = RectifiedFlow(RectifiedFlowConfig(num_inference_steps=3))
    found = flow.start(torch.zeros(2), context(denoiser_of(ExactNetwork(LAW, SD, "epsilon")), 2))
    assert found.tolist() == [flow.sampler().timesteps[0]] * 2 == [998, 998]


# The teacher as a rectified flow


def test_an_epsilon_teacher_seen_as_a_rectified_flow_has_the_flows_exact_velocity():
    t = f64([0.05, 0.2, 0.5, 0.8, 0.93])
    x = noise(5)
    seen, times = rewrap(x, t, FLOW, SD)
    velocity = Prediction.from_x0(LAW.denoise(seen, times, SD), seen, times, SD).flow
    expected = Prediction.from_x0(LAW.denoise(x, t, FLOW), x, t, FLOW).flow
    torch.testing.assert_close(velocity, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("steps", [2, 10, 50])
def test_an_epsilon_teacher_seen_as_a_rectified_flow_gives_the_same_samples(steps):
    """Euler on the velocity, at the flow times of DDIM's grid, walks DDIM's steps."""
    z = noise(4)

    def epsilon(x, t):
        return Prediction.from_x0(LAW.denoise(x, t, SD), x, t, SD)

    def flow(x, t):
        seen, times = rewrap(x, t, FLOW, SD)
        return Prediction(epsilon(seen, times).flow, "flow", x, t, FLOW)

    times = teacher_times(SD, steps)
    levels = [noise_share(SD, t) for t in times[:-1]]
    start = z / (SD.alpha(999.0) + SD.sigma(999.0))
    as_flow = solve(flow, start, [*levels, Terminal.CLEAN])
    torch.testing.assert_close(as_flow, solve(epsilon, z, times), rtol=0, atol=1e-9)


def test_a_real_network_seen_as_a_rectified_flow_gives_the_same_samples(tiny_sd):
    z = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    embeds = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def epsilon(x, t):
        return Prediction(tiny_sd.unet(x, t, embeds).sample, "epsilon", x, t, SD)

    def flow(x, t):
        seen, times = rewrap(x, t, FLOW, SD)
        return Prediction(epsilon(seen, times).flow, "flow", x, t, FLOW)

    times = teacher_times(SD, 5)
    levels = [noise_share(SD, t) for t in times[:-1]]
    as_flow = solve(flow, z / (SD.alpha(999.0) + SD.sigma(999.0)).float(), [*levels, Terminal.CLEAN])
    stock = solve(epsilon, z, times)
    assert (as_flow - stock).abs().max() < 1e-4 * stock.abs().max()


# Loss


def test_levels_and_times_are_inverse():
    t = f64([0.0, 1.0, 399.0, 998.5, 999.0])
    torch.testing.assert_close(time_of_share(SD, noise_share(SD, t)), t, rtol=0, atol=1e-9)
    assert noise_share(SD, f64([999.0])).item() == pytest.approx(0.93596, abs=1e-5)
    assert noise_share(SD, f64([0.0])).item() == pytest.approx(0.02834, abs=1e-5)
    torch.testing.assert_close(noise_share(FLOW, f64([0.3])), f64([0.3]))


def test_the_line_is_ddims_own():
    z, x0, t = noise(3), noise(3, seed=1), f64([10.0, 499.0, 999.0])
    clean, eps = line_through(z, f64([999.0] * 3), x0, Terminal.CLEAN, SD)
    alpha_T, sigma_T = SD.alpha(999.0), SD.sigma(999.0)
    torch.testing.assert_close(clean, x0, rtol=0, atol=1e-14)
    torch.testing.assert_close(eps, (z - alpha_T * x0) / sigma_T, rtol=0, atol=1e-13)
    alpha, sigma = SD.alpha(t)[:, None], SD.sigma(t)[:, None]
    expected = sigma / sigma_T * z + (alpha - alpha_T * sigma / sigma_T) * x0
    torch.testing.assert_close(SD.add_noise(clean, eps, t), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("index", "golden"), [(20, 1.3), (999, 244.0)])
def test_velocities_weigh_the_noise_error_of_an_epsilon_network(index, golden):
    z = noise(4)
    part = (noise_share(SD, f64([float(index)])) / noise_share(SD, f64([999.0]))).expand(4)
    student = Free(torch.eye(2), torch.zeros(2))
    values = [
        loss(RectifiedFlow(RectifiedFlowConfig(regress=regress)), student, z, coupled(z), draws={"t": part})["reflow"]
        for regress in ("velocity", "native")
    ]
    assert (values[0] / values[1]).item() == pytest.approx(golden, rel=0.02)


def test_distillation_at_one_step_is_regression_on_pairs():
    z, student = noise(ROWS), Free(torch.eye(2).double() * 0.3, torch.ones(2))
    distill = RectifiedFlow(RectifiedFlowConfig(objective="distill"))
    kd = KD(KDConfig())
    values, gradients = [], []
    for method in (distill, kd):
        (value,) = loss(method, student, z, coupled(z)).values()
        values.append(value)
        gradients.append(torch.autograd.grad(value, list(student.parameters())))
    torch.testing.assert_close(values[0], values[1], rtol=1e-13, atol=0)
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_distillation_trains_at_the_students_own_steps():
    method = RectifiedFlow(RectifiedFlowConfig(objective="distill", num_inference_steps=4))
    denoiser = denoiser_of(ExactNetwork(LAW, SD, "epsilon"))
    times = method.drawn_times(context(denoiser, 200))
    assert sorted(set(times.tolist())) == [249.0, 499.0, 749.0, 999.0]
    assert tuple(sorted(set(times.tolist()), reverse=True)) == method.sampler().timesteps


# 2-rectified flow++


def test_u_shaped_times_have_the_golden_moments():
    count = 200_000
    method = RFPP(RFPPConfig())
    times = method.drawn_times(context(denoiser_of(ExactNetwork(LAW, FLOW, "flow"), FLOW, "flow"), count)).double()
    assert times.mean().item() == pytest.approx(0.5, abs=0.002)
    assert times.var().item() == pytest.approx(0.1157, abs=0.001)
    density = [((times - place).abs() < 0.005).double().mean().item() / 0.01 for place in (0.005, 0.5, 0.995)]
    assert density == pytest.approx([2.075, 0.551, 2.075], rel=0.07)
    assert times.min() > 0 and times.max() < 1


def test_a_flat_law_without_weights_is_reflow():
    z, student = noise(ROWS), Free(torch.eye(2).double() * 0.3, torch.ones(2))
    flat = RFPPConfig(u_shape=1e-3, distance="l2", perceptual_weight=0.0, level_weights="none")
    found = loss(RFPP(flat), student, z, coupled(z))["reflow"]
    expected = loss(RectifiedFlow(RectifiedFlowConfig()), student, z, coupled(z))["reflow"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


class Squares:
    """A scorer that says how many ones apart two images are."""

    def distance(self, a, b):
        return (a - b).abs().flatten(1).sum(1)


def test_terms_are_weighted_by_the_level():
    z, student = noise(4), Free(torch.eye(2).double() * 0.3, torch.ones(2), FLOW, "flow")
    x0, u = coupled(z), f64([0.1, 0.4, 0.5, 0.8])
    method = RFPP(RFPPConfig(perceptual_weight=0.5, huber_c=0.1))
    assert method.needs_scorer() and not RFPP(RFPPConfig(perceptual_weight=0.0)).needs_scorer()
    terms = loss(method, student, z, x0, FLOW, "flow", {"t": u}, scorer=Squares(), decode=lambda x: 3 * x)
    t = UShaped(4.0).times(u)
    x_t = (1 - t)[:, None] * x0 + t[:, None] * z
    clean = x_t * 0.3 + 1
    velocity = (x_t - clean) / t[:, None]
    huber = ((velocity - (z - x0)).square().sum(1) + 0.2**2).sqrt() - 0.2
    torch.testing.assert_close(terms["reflow"], ((1 - t) * huber / 2).mean(), rtol=1e-9, atol=0)
    seen = 3 * (clean - x0).abs().sum(1)
    torch.testing.assert_close(terms["perceptual"], (0.5 * seen / t).mean(), rtol=1e-9, atol=0)


def test_the_robust_distance_of_a_sample():
    a, b = (
        torch.zeros(2, 3, 1, 1).double(),
        torch.tensor([[2.0, 1.0, 2.0], [0.0, 0.0, 0.0]])[:, :, None, None].double(),
    )
    width = 5.4e-4 * 3
    expected = f64([((9 + width**2) ** 0.5 - width) / 3, 0.0])
    torch.testing.assert_close(sample_huber(a, b), expected, rtol=1e-14, atol=0)


# Training


def test_a_few_steps_train_and_leave_the_teacher_alone(tmp_path):
    teacher = AnalyticTeacher.gaussian(LAW.mean, LAW.cov)
    z = noise(64)
    data = PairData(spatial(z), spatial(coupled(z)))
    settings = Settings(
        output_dir=str(tmp_path), student="full", train_batch_size=32, max_train_steps=60, learning_rate=3e-3,
        report_to="none", log_every=1, validation_samples=0,
    )  # fmt: skip
    method = RectifiedFlow(RectifiedFlowConfig(regress="native"))
    trainer = Trainer(method, teacher, data, settings)

    def value() -> float:
        (batch,) = next(trainer.batches.steps(0))
        ctx = context(trainer.networks.denoiser, len(batch))
        return method.student_loss(batch, ctx)["reflow"].item()

    before = value()
    trainer.train()
    assert value() < 0.6 * before


@pytest.mark.parametrize(
    "method",
    [RectifiedFlow(RectifiedFlowConfig()), RFPP(RFPPConfig(perceptual_weight=0.0)), KD(KDConfig())],
    ids=lambda method: method.info.name,
)
def test_adapters_train_on_a_real_network_and_its_weights_get_no_gradient(method, tiny_sd, tmp_path):
    generator = torch.Generator().manual_seed(0)
    z, x0 = (torch.randn(2, 4, 16, 16, generator=generator) for _ in range(2))
    settings = Settings(
        output_dir=str(tmp_path), train_batch_size=2, max_train_steps=1, lora_rank=2, report_to="none",
        resolution=32, validation_samples=0,
    )  # fmt: skip
    trainer = Trainer(method, Teacher(tiny_sd, "tiny"), PairData(z, x0, ("a dog", "blue cat")), settings)
    before = [p.detach().clone() for p in trainer.networks.parameters("student")]
    (batch,) = next(trainer.batches.steps(0))
    ctx = Context(trainer.networks.denoiser, 0, context(trainer.networks.denoiser, 2).random, {}, {}, lambda *_: None)
    sum(method.student_loss(batch, ctx).values()).backward()
    own = {id(p) for p in trainer.networks.parameters("student")}
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trainer.networks.parameters("student"))
    assert all(p.grad is None for p in trainer.networks.roles.base.parameters() if id(p) not in own)
    trainer.train_step([batch])
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.networks.parameters("student")))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: RectifiedFlowConfig(start_timestep=1000), "start_timestep"),
        (lambda: RectifiedFlowConfig(objective="distill", times="u_shaped"), "times"),
        (lambda: RectifiedFlowConfig(objective="distill", regress="native"), "regress has no effect"),
        (lambda: RectifiedFlowConfig(u_shape=3.0), "u_shape has no effect"),
        (lambda: RectifiedFlowConfig(huber_c=1e-3), "huber_c has no effect"),
        (lambda: RectifiedFlowConfig(perceptual_weight=-1.0), "perceptual_weight"),
        (lambda: RectifiedFlowConfig(u_shape=0.0), "u_shape"),
        (lambda: RFPPConfig(objective="distill"), "rectified_flow"),
        (lambda: KDConfig(num_inference_steps=2), "num_inference_steps"),
    ],
)
def test_bad_settings_are_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_prompts_alone_are_refused():
    denoiser = denoiser_of(ExactNetwork(LAW, SD, "epsilon"), student=StraightNetwork(LAW.mean, A))
    from method_helpers import batch_of

    with pytest.raises(ValueError, match="fastdiff pairs"):
        RectifiedFlow(RectifiedFlowConfig()).student_loss(batch_of(3, 2), context(denoiser, 3))
