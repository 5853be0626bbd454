"""Directional derivatives of predictions: closed forms, and forward mode against differences on diffusers' UNets."""

from __future__ import annotations

import copy
import itertools
import math
import warnings

import pytest
import torch
from tiny_transformers import build
from torch import nn

from fastdiff.diffusion import FlowSchedule, Gaussian, VPSchedule, pf_velocity
from fastdiff.methods._flow_map import end_input
from fastdiff.methods.freeflow import FreeFlow
from fastdiff.methods.meanflow import MeanFlow
from fastdiff.methods.rcm import RCM
from fastdiff.methods.scm import SCM
from fastdiff.models.analytic import AnalyticFamily, ExactNetwork
from fastdiff.models.analytic_networks import PointNet
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.embeddings import time_features, with_extra_times
from fastdiff.models.families import StableDiffusion
from fastdiff.models.roles import AdapterSpec, FullSpec, Roles
from fastdiff.models.tangents import Point, Tangents
from fastdiff.models.teacher import Teacher

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD = VPSchedule.from_scheduler_config(BETAS)
LAW = Gaussian(torch.tensor([0.5, -1.0]), torch.tensor([[1.0, 0.3], [0.3, 0.6]], dtype=torch.float64))
LABELS = Conditioning({"labels": torch.zeros(4, dtype=torch.int64)})


def analytic(network: nn.Module, schedule, kind: str) -> Denoiser:
    return Denoiser(Roles(network.double(), {}), AnalyticFamily(""), schedule, kind, torch.float64)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest relative error of a sample."""
    return ((a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).max().item()


@pytest.mark.parametrize(("schedule", "kind", "times"), [
    (SD, "epsilon", [3.3, 120.5, 650.25, 980.75]),
    (SD, "v_prediction", [3.3, 120.5, 650.25, 980.75]),
    (FlowSchedule(), "flow", [0.1, 0.4, 0.75, 0.97]),
])  # fmt: skip
def test_along_the_trajectory_the_velocity_changes_as_the_exact_flow_says(schedule, kind, times):
    """d/dt of dx/dt on exact trajectories, against a difference of the closed-form flow map."""
    denoiser = analytic(ExactNetwork(LAW, schedule, kind), schedule, kind)
    x, t = normal(4, 2, 1, 1), torch.tensor(times, dtype=torch.float64)
    speed = pf_velocity(denoiser(x, t, LABELS, "teacher"))
    found = Tangents("forward")(
        denoiser, LABELS, "teacher", Point(x, t), Point(speed, torch.ones_like(t)), lambda p: p.v
    )
    h = 1e-5 * (schedule.t_max - schedule.t_min)

    def v(s):
        return denoiser(LAW.flow_map(x, t, s, schedule), s, LABELS, "teacher").v

    assert distance(found.derivative, (v(t + h) - v(t - h)) / (2 * h)) < 2e-6
    torch.testing.assert_close(found.value, v(t), rtol=1e-12, atol=1e-12)
    difference = Tangents("difference")(
        denoiser, LABELS, "teacher", Point(x, t), Point(speed, torch.ones_like(t)), lambda p: p.v
    )
    assert distance(difference.derivative, found.derivative) < 1e-3


def test_differences_err_with_the_square_of_their_step(monkeypatch):
    schedule = FlowSchedule()
    denoiser = analytic(ExactNetwork(LAW, schedule, "flow"), schedule, "flow")
    x, t = normal(4, 2, 1, 1), torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    at, along = Point(x, t), Point(normal(4, 2, 1, 1, seed=1), torch.ones_like(t))
    forward, errors = Tangents("forward")(denoiser, LABELS, "teacher", at, along), []
    for halvings in range(4):
        monkeypatch.setattr("fastdiff.models.tangents.TIME_STEP", 8 / 2**halvings)
        monkeypatch.setattr("fastdiff.models.tangents.SAMPLE_STEP", 0.03 / 2**halvings)
        found = Tangents("difference")(denoiser, LABELS, "teacher", at, along)
        errors.append((found.derivative - forward.derivative).norm().item())
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert slopes == pytest.approx([2] * 3, abs=0.15)


class Rippled(nn.Module):
    """A network whose prediction ripples as its time input does, and that notes what times it is asked at."""

    def __init__(self, network: nn.Module, size: float) -> None:
        super().__init__()
        self.network, self.size, self.asked = network, size, []
        self.register_buffer("anchor", torch.zeros(()))

    def forward(self, x, time, labels):
        self.asked.append(time)
        return self.network(x, time, labels) + self.size * time.sin()[:, None, None, None]


def trajectory(denoiser: Denoiser, times) -> tuple[Point, Point]:
    x, t = normal(4, 2, 1, 1), torch.tensor(times, dtype=torch.float64)
    return Point(x, t), Point(pf_velocity(denoiser(x, t, LABELS, "teacher")), torch.ones_like(t))


@pytest.mark.parametrize("schedule", [SD, FlowSchedule()])
def test_a_chord_of_whole_periods_does_not_see_ripples_of_the_time_embedding(schedule):
    """Ripples of a hundredth are nearly all of the derivative in time; a chord errs with the square of its width."""
    kind = "epsilon" if schedule is SD else "flow"
    smooth = analytic(ExactNetwork(LAW, schedule, kind), schedule, kind)
    rippled = analytic(Rippled(ExactNetwork(LAW, schedule, kind), 0.01), schedule, kind)
    indices = torch.tensor([150.0, 400.0, 650.0, 900.0], dtype=torch.float64)
    at, along = trajectory(smooth, schedule.time_of_index(indices).tolist())

    def found(denoiser, **how):
        return Tangents(**how)(denoiser, LABELS, "teacher", at, along).derivative

    true = found(smooth, route="forward")
    assert distance(found(rippled, route="forward"), true) > 1
    errors = [distance(found(smooth, chord=width * math.pi), true) for width in (4, 2)]
    assert errors[1] < 0.01 and (schedule is SD or errors[0] / errors[1] == pytest.approx(4, rel=0.1)), errors
    for width in (2, 4):
        wide = {"chord": width * math.pi}
        torch.testing.assert_close(found(rippled, **wide), found(smooth, **wide), rtol=0, atol=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_chord_stays_in_the_times_the_network_knows(sign):
    network = Rippled(ExactNetwork(LAW, SD, "epsilon"), 0.0)
    at, along = trajectory(analytic(network, SD, "epsilon"), [0.0, 3.0, 997.0, 999.0])
    network.asked.clear()
    turned = Point(sign * along.x, sign * along.t)
    found = Tangents(chord=10.0)(analytic(network, SD, "epsilon"), LABELS, "teacher", at, turned)
    ends = torch.stack(network.asked).sort(0).values
    torch.testing.assert_close(ends[0], torch.tensor([0.0, 0.0, 989.0, 989.0], dtype=ends.dtype), rtol=0, atol=1e-6)
    torch.testing.assert_close(ends[-1] - ends[0], torch.full_like(ends[0], 10.0), rtol=0, atol=1e-6)
    value = analytic(network, SD, "epsilon")(at.x, at.t, LABELS, "teacher").native
    torch.testing.assert_close(found.value, value, rtol=0, atol=0)  # of the point itself, wherever the chord lies


class Told(nn.Module):
    """A network whose prediction is a parabola of the further time that it is told, with ripples."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("anchor", torch.zeros(()))

    def forward(self, x, time, labels, end):
        return x + (1e-6 * end**2 + 0.01 * end.sin())[:, None, None, None]


def test_where_only_the_further_time_moves_the_chord_lies_there():
    denoiser = analytic(Told(), SD, "epsilon")
    x, end = normal(4, 2, 1, 1), torch.tensor([100.0, 200.0, 300.0, 999.0], dtype=torch.float64)
    at, along = Point(x, torch.full_like(end, 999.0), end), Point(None, None, torch.full_like(end, 3.0))
    width = 4 * math.pi
    found = Tangents(chord=width)(denoiser, LABELS, "teacher", at, along, inputs=lambda end: {"end": end})
    middle = torch.tensor([100.0, 200.0, 300.0, 999.0 - width / 2], dtype=torch.float64)
    expected = (2e-6 * middle * 3.0)[:, None, None, None].expand_as(x)
    torch.testing.assert_close(found.derivative, expected, rtol=0, atol=1e-12)


def test_a_chord_needs_a_direction_in_time():
    denoiser = analytic(ExactNetwork(LAW, SD, "epsilon"), SD, "epsilon")
    at, along = trajectory(denoiser, [100.0, 200.0, 300.0, 400.0])
    with pytest.raises(ValueError, match="chord"):
        Tangents(chord=4.0)(denoiser, LABELS, "teacher", at, Point(along.x, None))


@pytest.mark.parametrize("method", [SCM, RCM, MeanFlow, FreeFlow])
def test_methods_hand_their_chord_on(method):
    assert method(method.Config(tangent_chord=8.0)).tangents.chord == 8.0
    with pytest.raises(ValueError, match="tangent_chord"):
        method.Config(tangent_chord=-1.0)


def unet(pipeline_unet: nn.Module, student: str) -> Denoiser:
    spec = AdapterSpec(4, 4.0, ("to_q", "conv1", "time_emb_proj")) if student == "lora" else FullSpec()
    roles = Roles(pipeline_unet, {"student": spec})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in roles.parameters("student"):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.1 if student == "lora" else 0.1 * parameter.std()))
    return Denoiser(roles, StableDiffusion(), SD, "epsilon")


def both_routes(denoiser: Denoiser, cond: Conditioning, shape, times):
    generator = torch.Generator().manual_seed(1)
    x, dx = torch.randn(2, len(times), *shape, generator=generator)
    at, along = Point(x, torch.tensor(times)), Point(dx, torch.full((len(times),), 160.0))
    return [Tangents(route)(denoiser, cond, "student", at, along) for route in ("forward", "difference")]


@pytest.mark.parametrize("student", ["lora", "full"])
def test_both_routes_agree_on_a_unet(tiny_sd, student):
    denoiser = unet(tiny_sd.unet, student)
    cond = Conditioning({"prompt_embeds": torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(2))})
    forward, difference = both_routes(denoiser, cond, (4, 16, 16), [20.0, 300.0, 700.0, 950.3])
    assert distance(difference.derivative, forward.derivative) < 0.01
    assert distance(difference.value, forward.value) < 1e-3
    assert denoiser.calls == 4 + 8
    torch.testing.assert_close(
        forward.value,
        denoiser(*_at(denoiser, cond), cond, "student").native.detach(),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def _at(denoiser, cond):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 4, 16, 16, generator=generator)[0], torch.tensor([20.0, 300.0, 700.0, 950.3])


@pytest.mark.parametrize("alone", [False, True], ids=["along the trajectory", "the end alone"])
@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl"])
def test_both_routes_agree_on_a_unet_that_is_told_an_end(name, alone, request):
    """MeanFlow's direction, which holds the end, and FreeFlow's, which moves nothing else."""
    teacher = Teacher(request.getfixturevalue(name), "tiny")
    network, generator = with_extra_times(teacher.network), torch.Generator().manual_seed(1)
    nn.init.normal_(network.time_embedding.cond_proj.weight, std=0.1, generator=generator)
    denoiser, cond = Denoiser(Roles(network, {}), teacher.family, SD, "epsilon"), teacher.encode(["a", "b"] * 2, 32)
    x, dx = torch.randn(2, 4, 4, 16, 16, generator=generator)
    at = Point(x, torch.tensor([20.0, 300.0, 700.0, 950.3]), torch.tensor([-1.0, 100.5, 0.0, 900.0]))
    along = Point(None, None, torch.ones(4)) if alone else Point(dx, torch.full((4,), 160.0))
    forward, difference = (
        Tangents(route)(denoiser, cond, "teacher", at, along, inputs=lambda end: end_input(SD, end))
        for route in ("forward", "difference")
    )
    assert distance(difference.derivative, forward.derivative) < 0.01


def test_both_routes_agree_on_the_shipped_teacher_also_when_training_in_half_precision():
    """Float32 activations and weights wherever the run itself computes in bf16."""
    teacher = Teacher.from_pretrained("embedded")
    denoiser = unet(teacher.network, "lora")
    cond = teacher.encode(["a red heart"] * 2, 32)
    shape, times = teacher.latent_shape(32), [100.0, 950.0]
    forward, difference = both_routes(denoiser, cond, shape, times)
    assert distance(difference.derivative, forward.derivative) < 0.01
    denoiser.compute_dtype = torch.bfloat16
    for found in both_routes(denoiser, cond, shape, times):
        assert distance(found.derivative, forward.derivative) < 0.01
    adapter = [p.detach().clone() for p in denoiser.roles.parameters("student")]
    denoiser.roles.base.bfloat16()
    for parameter, kept in zip(denoiser.roles.parameters("student"), adapter):
        parameter.data = kept
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # autocast warns of float32, which it does not make
        rounded = both_routes(denoiser, cond, shape, times)
    assert rounded[0].derivative.dtype == torch.float32
    assert distance(rounded[1].derivative, rounded[0].derivative) < 0.01
    assert denoiser.compute_dtype == torch.bfloat16


def test_both_routes_agree_on_a_transformer():
    """Joint attention, modulation by time, root-mean-square norms; fed 1000 t."""
    pipeline = build("stable_diffusion_3")
    network = Teacher(pipeline, "tiny")
    denoiser = Denoiser(Roles(network.network, {}), network.family, network.schedule_at(32), "flow")
    cond, generator = network.encode(["a", "red apple"], 32), torch.Generator().manual_seed(1)
    x, dx = torch.randn(2, 2, 4, 16, 16, generator=generator)
    at, along = Point(x, torch.tensor([0.3, 0.9])), Point(dx, torch.full((2,), 0.16))
    forward, difference, still = (
        Tangents(route)(denoiser, cond, "teacher", at, direction)
        for route, direction in (("forward", along), ("difference", along), ("forward", Point(dx, None)))
    )
    assert distance(difference.derivative, forward.derivative) < 0.01
    assert distance(still.derivative, forward.derivative) > 0.02  # the time's part is seen


def test_a_further_time_moves_alone():
    torch.manual_seed(0)
    network = with_extra_times(PointNet(2, 1)).double()
    nn.init.normal_(network.slot.weight, std=0.03)
    denoiser = analytic(network, SD, "epsilon")
    x, t, s = normal(4, 2, 1, 1), torch.full((4,), 999.0).double(), torch.tensor([-1.0, 30.0, 400.0, 900.0]).double()

    def inputs(s):
        return {"timestep_cond": time_features([SD.network_time(s)])}

    at, along = Point(x, t, s), Point(None, None, torch.full_like(s, 2.0))
    forward, difference = (
        Tangents(route)(denoiser, LABELS, "teacher", at, along, lambda p: p.x0, inputs)
        for route in ("forward", "difference")
    )
    h = 1e-3
    ahead, behind = (denoiser(x, t, LABELS, "teacher", **inputs(s + sign * h)).x0 for sign in (1, -1))
    assert distance(forward.derivative, (ahead - behind) / h) < 1e-5
    assert distance(difference.derivative, forward.derivative) < 0.05  # nearly cancels in one sample


class Opaque(torch.autograd.Function):
    """An operation whose author gave no forward derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.tanh()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class OpaqueNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x_t, time, labels):
        return Opaque.apply(x_t) * self.weight

    def enable_gradient_checkpointing(self, _function):
        pass


def test_without_a_forward_derivative_differences_take_over_once_and_for_all():
    denoiser, tangents = analytic(OpaqueNetwork(), SD, "epsilon"), Tangents()
    at, along = Point(normal(4, 2, 1, 1), torch.full((4,), 500.0)), Point(normal(4, 2, 1, 1, seed=1), None)
    with pytest.warns(UserWarning, match="OpaqueNetwork has no forward-mode derivative"):
        found = tangents(denoiser, LABELS, "teacher", at, along)
    assert distance(found.derivative, (1 - at.x.tanh() ** 2) * along.x) < 1e-3
    calls = denoiser.calls
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tangents(denoiser, LABELS, "teacher", at, along)
    assert denoiser.calls == calls + 2 * 4


def test_broken_samples_are_zero_and_named():
    network = ExactNetwork(LAW, SD, "epsilon")
    denoiser = analytic(network, SD, "epsilon")
    x = normal(4, 2, 1, 1)
    x[2] = torch.nan
    found = Tangents()(denoiser, LABELS, "teacher", Point(x, torch.full((4,), 500.0)), Point(torch.ones_like(x), None))
    assert found.finite.tolist() == [True, True, False, True]
    assert found.derivative[2].abs().sum() == 0 and found.value[2].abs().sum() == 0
    assert found.derivative[[0, 1, 3]].abs().min() > 0


def test_nothing_is_left_behind(tiny_sd):
    """No graph, no gradient, no dual numbers, and the teacher as it was."""
    before = copy.deepcopy(tiny_sd.unet.state_dict())
    denoiser = unet(tiny_sd.unet, "full")
    cond = Conditioning({"prompt_embeds": torch.zeros(1, 16, 16)})
    x = torch.randn(1, 4, 16, 16)
    found = Tangents()(denoiser, cond, "student", Point(x, torch.tensor([500.0])), Point(x, torch.tensor([1.0])))
    assert not found.value.requires_grad and not found.derivative.requires_grad
    assert all(p.grad is None for p in denoiser.roles.parameters("student"))
    assert all(torch.equal(before[name], value) for name, value in denoiser.roles.base.state_dict().items())
    assert torch.autograd.forward_ad._current_level == -1
