"""PeRFlow (arXiv 2405.07510): targets in closed form, exact students, one window is reflow, stock samplers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from method_helpers import SD, LabelledGaussians, batch_of, context, denoiser_of, f64, settle, spatial
from straight_helpers import FLOW, KINDS, LAW, Free, LinearNetwork, noise, pairs, stock_samples
from trajectory_helpers import (
    MU,
    JumpNet,
    data,
    gaussian_denoiser,
    jumps,
    levels,
    mapped,
    orders,
    product_map,
    student_loss,
)
from trajectory_helpers import S as VARIANCE

from fastdiff.diffusion import Gaussian, Prediction, Terminal, solve, teacher_times
from fastdiff.engine import Settings, Trainer
from fastdiff.methods._flow_map import noise_share
from fastdiff.methods._straight import line_through
from fastdiff.methods.perflow import PeRFlow, PeRFlowConfig
from fastdiff.methods.rectified_flow import RectifiedFlow, RectifiedFlowConfig
from fastdiff.models.analytic import AnalyticTeacher, ExactNetwork
from fastdiff.models.analytic_networks import AffinePerBin
from fastdiff.models.teacher import Teacher

ROWS = 40
VALUES, BASIS = torch.linalg.eigh(LAW.cov)


def method(**config) -> PeRFlow:
    own = {"prompt_dropout": 0.0, "solver_steps": 5} | ({} if config.get("cfg_sync") else {"guidance_scale": 1.0})
    return PeRFlow(PeRFlowConfig(**own | config))


def teacher_matrix(law: Gaussian, start: float, end: float, steps: int, schedule) -> torch.Tensor:
    """What the teacher's DDIM steps between two indices multiply x - alpha mean by."""
    times = [schedule.time_of_index(round(start + (end - start) * k / steps)) for k in range(steps + 1)]
    values, basis = torch.linalg.eigh(law.cov)
    factor = math.prod(law.ddim_factors(t, s, schedule) for t, s in itertools.pairwise(times))
    return basis @ torch.diag(factor * torch.ones_like(values)) @ basis.T


class WindowNetwork(LinearNetwork):
    """The exact student: in each window the line through a start and the teacher's solution from it."""

    def __init__(self, law: Gaussian, windows: int, steps: int, schedule, kind: str) -> None:
        super().__init__(schedule, kind)
        self.law, self.windows, self.steps = law, windows, steps
        self.index_times = schedule.time_of_index(torch.arange(1000).double())

    def maps(self, t):
        width, eye = 1000 // self.windows, torch.eye(len(self.law.mean)).double()
        index = (self.index_times[:, None] - t.double()).abs().argmin(0)
        start = (index // width + 1) * width - 1
        edges = {s: teacher_matrix(self.law, s, s - width, self.steps, self.schedule) for s in set(start.tolist())}
        matrix = torch.stack([edges[s] for s in start.tolist()])
        times = (self.schedule.time_of_index(i.double()) for i in (start, start - width, index))
        (a_s, s_s), (a_e, s_e), (a, s) = (
            (self.schedule.alpha(time)[:, None, None], self.schedule.sigma(time)[:, None, None]) for time in times
        )
        scale = a_e * s_s - a_s * s_e
        # With u = x_s - alpha_s mean: clean - mean = C u, eps = E u, and the input is alpha mean + (a C + s E) u.
        C, E = (s_s * matrix - s_e * eye) / scale, (a_e * eye - a_s * matrix) / scale
        slope = C @ torch.linalg.inv(a * C + s * E)
        return slope, self.law.mean - a[:, 0] * (slope @ self.law.mean)


def loss(perflow, student, x0, case="vp", draws=None, law=LAW):
    schedule, kind = KINDS[case]
    denoiser = denoiser_of(ExactNetwork(law, schedule, kind), schedule, kind, student=student)
    return perflow.student_loss(batch_of(len(x0), x0.shape[1], spatial(x0)), context(denoiser, len(x0), draws))[
        "perflow"
    ]


def everywhere() -> dict[str, torch.Tensor]:
    return {"t": torch.arange(0, 1000, 25)[:ROWS] + 24}


# Optimum


@pytest.mark.parametrize("windows", [1, 2, 4, 8])
@pytest.mark.parametrize("case", KINDS)
def test_the_loss_is_zero_at_the_exact_window_maps(case, windows):
    schedule, kind = KINDS[case]
    student = WindowNetwork(LAW, windows, 5, schedule, kind)
    perflow = method(windows=windows, num_inference_steps=windows)
    assert loss(perflow, student, noise(ROWS), case, everywhere()) < (1e-11 if kind == "flow" else 1e-18)
    other = WindowNetwork(LAW, windows, 1, schedule, kind)
    assert loss(perflow, other, noise(ROWS), case, everywhere()) > 1e-7


def test_an_affine_student_per_time_learns_the_line_to_each_windows_edge():
    """From a window's start and from its middle, which lies on the line through both ends."""
    starts = [249, 499, 749, 999]
    times = sorted([*starts, *(start - 125 for start in starts)])
    denoiser = gaussian_denoiser(student=AffinePerBin(1, times).double())
    draws, perflow = {"t": torch.tensor(times * 5)}, method()
    settle(lambda: student_loss(perflow, denoiser, 40, draws)["perflow"], denoiser.roles.parameters("student"))
    x = f64([-1.0, 2.0])
    for start in starts:
        edge, middle = start - 250, start - 125
        expected = mapped(product_map(list(range(edge, start + 1, 50))), x, start, edge)
        torch.testing.assert_close(jumps(denoiser, x, start, edge), expected, rtol=0, atol=1e-8)
        halfway = jumps(denoiser, x, start, middle)
        torch.testing.assert_close(jumps(denoiser, halfway, middle, edge), expected, rtol=0, atol=1e-8)


def exact_line(x, t, edge):
    """To the edge of a window of 200 indices along the chord of the ODE's own ends, of a flow."""
    (at, _), (ae, se), (a_s, ss) = (levels(index, FLOW) for index in (t, edge, edge + 200))
    slope = ((ae**2 * VARIANCE + se**2) / (a_s**2 * VARIANCE + ss**2)).sqrt()
    return ae * MU + slope / (slope + (t - edge) / 200 * (1 - slope)) * (x - at * MU)


@pytest.mark.parametrize("index", [199, 299, 399, 999])
def test_residual_of_the_exact_lines_is_of_first_order_in_the_solvers_step(index):
    student, found = JumpNet(exact_line, lambda i: torch.ceil((i + 1) / 200 - 1) * 200 - 1, FLOW, "flow"), []
    for steps in (5, 10, 20, 40):
        perflow = method(windows=5, num_inference_steps=5, solver_steps=steps)
        draws = {"t": torch.full((64,), index)}
        found.append(
            student_loss(perflow, gaussian_denoiser(FLOW, "flow", student=student), 64, draws)["perflow"].item()
        )
    assert orders(found) == pytest.approx([1] * 3, abs=0.02)


@pytest.mark.parametrize("case", KINDS)
@pytest.mark.parametrize("steps", [4, 8, 40])
def test_stock_samplers_are_exact_at_every_multiple_of_the_windows(case, steps):
    schedule, kind = KINDS[case]
    z = noise(6)
    found = stock_samples(
        method(num_inference_steps=steps).sampler(), WindowNetwork(LAW, 4, 5, schedule, kind), z, kind
    )
    x, mean = z, LAW.mean
    for start in (999, 749, 499, 249):
        t, s = schedule.time_of_index(start), schedule.time_of_index(start - 250)
        matrix = teacher_matrix(LAW, start, start - 250, 5, schedule)
        x = schedule.alpha(s) * mean + (x - schedule.alpha(t) * mean) @ matrix.T
    torch.testing.assert_close(found, x, rtol=0, atol=5e-6)


@pytest.mark.parametrize(("start", "golden"), [(999, 0.99712), (749, 0.97951), (499, 0.90729), (249, 0.50807)])
def test_golden_slopes_of_the_target_under_an_exact_teacher(start, golden):
    """eps~ over x_s - alpha_s mean, by what a student of zeros misses, extrapolated to endless solver steps."""
    denoiser, slopes = gaussian_denoiser(student=AffinePerBin(1, [0.0]).double()), []
    (alpha, sigma), z = levels(start), context(denoiser, 8).random.normal("eps", (1, 1, 1)).double()
    x_s = z if start == 999 else alpha * data(8) + sigma * z
    for steps in (125, 250):
        missed = student_loss(method(solver_steps=steps), denoiser, 8, {"t": torch.full((8,), start - 100)})["perflow"]
        slopes.append((missed / (x_s - alpha * MU).square().mean()).sqrt().item())
    assert 2 * slopes[1] - slopes[0] == pytest.approx(golden, abs=5e-4 if start == 249 else 1e-5)


def test_factors_of_the_public_codes_other_target():
    """eta of `ddim_eps` over that of `diff_eps` in the public windows, the last of which ends at index 0."""
    found = []
    for start, end in ((999, 749), (749, 499), (499, 249), (249, 0), (249, -1)):
        (alpha_s, sigma_s), (alpha_e, sigma_e) = levels(start), levels(end)
        gamma = alpha_s / alpha_e
        found.append(((sigma_e - sigma_s / gamma) / (-(1 - gamma**2).sqrt() / gamma)).item())
    assert found == pytest.approx([0.75058, 0.65844, 0.63151, 0.95877, 1], abs=5e-6)
    assert ", ".join(f"{factor:.3f}" for factor in found[:4]) in PeRFlow.__doc__


@pytest.mark.parametrize(
    ("index", "weight"), [(0, 0.435217826), (499, 0.869565217), (949, 4.347826087), (999, 4.347826087)]
)
def test_reweighting_favours_noise_up_to_the_last_tenth(index, weight):
    denoiser, draws = (
        gaussian_denoiser(student=AffinePerBin(1, [float(index)]).double()),
        {"t": torch.tensor([index] * 8)},
    )
    plain, weighted = (student_loss(method(reweighting=on), denoiser, 8, draws)["perflow"] for on in (False, True))
    assert plain > 0
    assert (weighted / plain).item() == pytest.approx(weight, abs=1e-7)


def test_one_solver_step_a_window_gives_the_teachers_own_noise():
    x, t, s = noise(4), f64([749.0] * 4), f64([499.0] * 4)
    prediction = Prediction.from_x0(LAW.denoise(x, t, SD), x, t, SD)
    x_e = solve(lambda x, t: prediction, x, [t, s])
    torch.testing.assert_close(line_through(x, t, x_e, s, SD)[1], prediction.eps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", KINDS)
def test_one_window_is_reflow_with_pairs_made_on_the_way(case):
    schedule, kind = KINDS[case]
    student = Free(f64([[0.3, 0.1], [0.0, 0.5]]), f64([0.2, -0.1]), schedule, kind)
    index = torch.arange(24, 1000, 25)[:ROWS]
    perflow = method(windows=1, num_inference_steps=1, solver_steps=10)
    draws = {"t": index}
    found = loss(perflow, student, noise(ROWS), case, draws)

    denoiser = denoiser_of(ExactNetwork(LAW, schedule, kind), schedule, kind, student=student)
    z = context(denoiser, ROWS).random.normal("eps", (2, 1, 1)).flatten(1).double()

    def exact(x, t):
        return Prediction.from_x0(LAW.denoise(x, t, schedule), x, t, schedule)

    x0 = solve(exact, z, teacher_times(schedule, 10))
    t = schedule.time_of_index(index.double())
    part = noise_share(schedule, t) / noise_share(schedule, schedule.time_of_index(f64([999.0])))
    reflow = RectifiedFlow(RectifiedFlowConfig(regress="native"))
    expected = reflow.student_loss(pairs(z, x0), context(denoiser, ROWS, {"t": part}))["reflow"]
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=0)


# Guidance, dropped prompts, edges


def test_guidance_reaches_the_solver_unless_it_is_left_to_the_student():
    laws = [LAW, Gaussian(f64([0.4, 0.2]), LAW.cov)]
    w = 3.0
    guided = Gaussian(laws[1].mean + w * (laws[0].mean - laws[1].mean), LAW.cov)
    student = WindowNetwork(guided, 4, 5, SD, "epsilon")
    denoiser = denoiser_of(LabelledGaussians(laws), student=student)
    batch = batch_of(ROWS, 2, spatial(noise(ROWS)))
    found = method(guidance_scale=w).student_loss(batch, context(denoiser, ROWS, everywhere()))["perflow"]
    assert found < 1e-17
    synced = method(cfg_sync=True)
    plain = denoiser_of(LabelledGaussians(laws), student=WindowNetwork(LAW, 4, 5, SD, "epsilon"))
    assert synced.student_loss(batch, context(plain, ROWS, everywhere()))["perflow"] < 1e-17


@pytest.mark.parametrize("synced", [False, True])
def test_dropped_prompts_reach_the_student_and_a_synced_teacher(synced):
    asked = []

    class Spy(LabelledGaussians):
        def forward(self, x_t, time, labels):
            asked.append(("teacher", labels.tolist()))
            return super().forward(x_t, time, labels)

    class Student(Free):
        def forward(self, x_t, time, labels):
            asked.append(("student", labels.tolist()))
            return super().forward(x_t, time, labels)

    denoiser = denoiser_of(Spy([LAW, LAW]), student=Student(torch.eye(2), torch.zeros(2)))
    draws = {"drop": torch.tensor([True, False])}
    perflow = method(cfg_sync=synced, prompt_dropout=0.5, solver_steps=1)
    perflow.student_loss(batch_of(2, 2, spatial(noise(2))), context(denoiser, 2, draws))
    assert asked == [("teacher", [-1, 0] if synced else [0, 0]), ("student", [-1, 0])]


@pytest.mark.parametrize(("gap", "lowest"), [(0.0, 0), (0.5, 125), (0.9, 225)])
def test_a_gap_at_the_clean_end_of_windows_is_not_trained(gap, lowest):
    """Lowest and highest index trained in each window; the weights of squares are those of the indices trained."""
    asked = []

    class Recorder(AffinePerBin):
        def forward(self, x, time, labels):
            asked.append(time)
            return super().forward(x, time, labels)

    denoiser = gaussian_denoiser(student=Recorder(1, [0.0]).double())
    student_loss(method(edge_gap=gap), denoiser, 1000, {"t": torch.arange(1000)})
    windows = torch.cat(asked[-1:]).reshape(4, 250)
    assert windows.min(1).values.tolist() == pytest.approx([lowest + 250 * i for i in range(4)], abs=1)
    assert windows.max(1).values.tolist() == [249, 499, 749, 999]


def test_windows_start_in_noised_data_and_the_first_in_plain_noise():
    fed = []

    class Spy(ExactNetwork):
        def forward(self, x_t, time, labels):
            fed.append((x_t.clone(), time.clone()))
            return super().forward(x_t, time, labels)

    denoiser = denoiser_of(Spy(LAW, SD, "epsilon"), student=Free(torch.eye(2), torch.zeros(2)))
    x0 = noise(4)
    ctx = context(denoiser, 4, {"t": torch.tensor([0, 249, 250, 750])})
    method(solver_steps=2).student_loss(batch_of(4, 2, spatial(x0)), ctx)
    eps = ctx.random.normal("eps", (2, 1, 1)).double()
    (first, times), (_, middle) = fed
    assert times.tolist() == [249.0, 249.0, 499.0, 999.0]
    assert middle.tolist() == [124.0, 124.0, 374.0, 874.0]
    torch.testing.assert_close(first[:3], SD.add_noise(spatial(x0), eps, times)[:3], rtol=0, atol=1e-12)
    torch.testing.assert_close(first[3], eps[3], rtol=0, atol=0)


def test_the_last_window_ends_in_clean_samples():
    assert SD.levels(SD.time_of_index(-1.0), noise(1)) == SD.levels(Terminal.CLEAN, noise(1))
    assert FLOW.time_of_index(-1.0) == 0


# Training


def test_a_few_steps_train(tmp_path):
    from test_lcm import Latents

    teacher = AnalyticTeacher.gaussian(LAW.mean, LAW.cov)
    settings = Settings(
        output_dir=str(tmp_path), student="full", train_batch_size=16, max_train_steps=30, learning_rate=3e-3,
        report_to="none", log_every=1, validation_samples=0,
    )  # fmt: skip
    perflow = method(solver_steps=2)
    trainer = Trainer(perflow, teacher, Latents(spatial(noise(64)).float()), settings)
    (batch,) = next(trainer.batches.steps(0))

    def value() -> float:
        return perflow.student_loss(batch, context(trainer.networks.denoiser, len(batch)))["perflow"].item()

    before = value()
    trainer.train()
    assert value() < 0.8 * before


def test_the_teacher_of_an_adapter_gets_no_gradient(tiny_sd, tmp_path):
    from straight_helpers import PairData

    z = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = Settings(
        output_dir=str(tmp_path),
        train_batch_size=2,
        lora_rank=2,
        report_to="none",
        resolution=32,
        validation_samples=0,
    )
    perflow = method(guidance_scale=3.0, solver_steps=1, loss_type="huber", prompt_dropout=0.1)
    trainer = Trainer(perflow, Teacher(tiny_sd, "tiny"), PairData(z, z, ("a dog", "blue cat")), settings)
    (batch,) = next(trainer.batches.steps(0))
    perflow.student_loss(batch, context(trainer.networks.denoiser, 2))["perflow"].backward()
    own = {id(p) for p in trainer.networks.parameters("student")}
    assert any(p.grad.abs().max() > 0 for p in trainer.networks.parameters("student"))
    assert all(p.grad is None for p in trainer.networks.roles.base.parameters() if id(p) not in own)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"windows": 4, "num_inference_steps": 6}, "num_inference_steps"),
        ({"windows": 3, "num_inference_steps": 3}, "num_inference_steps"),
        ({"prompt_dropout": 1.5}, "prompt_dropout"),
        ({"solver_steps": 0}, "solver_steps"),
        ({"solver_steps": 251}, "solver steps"),
        ({"edge_gap": 1.0}, "edge_gap"),
        ({"edge_gap": 0.6, "num_inference_steps": 8}, "edge_gap"),
        ({"reweighting": True, "loss_type": "huber"}, "loss_type: l2"),
    ],
)
def test_bad_settings_are_named(config, named):
    with pytest.raises(ValueError, match=named):
        PeRFlowConfig(**config)
