"""CTM (arXiv 2310.02279) and TCD (2402.19159): maps to a told end, both comparisons, solvers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from method_helpers import SD, batch_of, context, denoiser_of, f64, settle
from torch import nn
from trajectory_helpers import (
    FLOW,
    KINDS,
    LAW,
    PROCESSES,
    JumpNet,
    ToldAffine,
    data,
    exact_map,
    gaussian_denoiser,
    images,
    levels,
    mapped,
    orders,
    product_map,
    settings,
    student_loss,
    told,
)

from fastdiff.engine import Trainer
from fastdiff.engine.networks import build_networks
from fastdiff.methods import CTM, LCM, PCM, TCD, CTMConfig, LCMConfig, PCMConfig
from fastdiff.methods._trajectory import grid_points
from fastdiff.models.analytic import ExactNetwork
from fastdiff.models.analytic_networks import PointNet
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.embeddings import time_features, with_extra_times
from fastdiff.models.teacher import Teacher

SCHEDULES = pytest.mark.parametrize("schedule", [SD, FLOW], ids=["vp", "flow"])
PLAIN = {"guidance_scale": 1.0, "loss_type": "l2", "target_decay": 0.0, "num_ddim_timesteps": 40}


def method(cls=CTM, **config):
    return cls(cls.Config(**PLAIN | config))


def end_draw(points: int, number: int, end: int) -> float:
    """The uniform draw that ends the map of pair `number` at `end`."""
    following = 1000 // points * number - 1
    return (end + 1 + 0.5) / (following + 2)


def wide_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    network = with_extra_times(PointNet(1, 1)).double()
    nn.init.normal_(network.slot.weight, std=0.1)
    return network


# What the network is told


@SCHEDULES
def test_the_network_is_told_where_its_map_ends(schedule):
    seen = []

    class Spy(JumpNet):
        def forward(self, x_t, time, labels, timestep_cond=None):
            seen.append((self.index(time).tolist(), self.index(told(timestep_cond)).tolist()))
            return super().forward(x_t, time, labels, timestep_cond)

    denoiser = gaussian_denoiser(schedule, student=Spy(exact_map(schedule), None, schedule))
    number = torch.tensor([0, 19, 39, 39])
    u = torch.tensor([0.3, 0.0, end_draw(40, 39, 249), 0.99999])
    student_loss(method(), denoiser, 4, {"pair": number, "end": u})
    ends = [-1.0, -1.0, 249.0, 974.0]
    assert seen[0] == ([24.0, 499.0, 999.0, 999.0], ends)
    # The first pair's target has arrived: whatever is asked of the network there is not used.
    assert seen[1] == ([0.0 if schedule is SD else -1.0, 474.0, 974.0, 974.0], ends)


def test_a_student_at_step_zero_is_the_teacher_whatever_it_is_told(tiny_sd):
    wide = method().student_network(tiny_sd.unet)
    x, t, embeds = torch.randn(2, 4, 16, 16), torch.tensor([10.0, 900.0]), torch.randn(2, 16, 16)
    with torch.no_grad():
        plain = tiny_sd.unet(x, t, embeds).sample
        for end in (-1.0, 500.0):
            inputs = time_features([torch.full((2,), end)])
            assert torch.equal(wide(x, t, embeds, timestep_cond=inputs).sample, plain)
    assert method(TCD).student_network(tiny_sd.unet) is None


@SCHEDULES
@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_a_map_to_where_it_starts_is_its_input(schedule, kind):
    denoiser = denoiser_of(PointNet(1, 1), schedule, kind, student=wide_network())
    ctm, x, t = method(), data(3), schedule.time_of_index(torch.tensor([24, 249, 749]))
    prediction = denoiser(x, t, batch_of(3, 1).cond, "student", **ctm.inputs(1.0, t, denoiser))
    torch.testing.assert_close(ctm.reach(prediction, t), x, rtol=0, atol=1e-12)


# Limits


def loss_and_gradients(one, schedule, network, draws=None, kind=None, **roles):
    kind = kind or KINDS[schedule]
    denoiser = denoiser_of(ExactNetwork(LAW, schedule, kind), schedule, kind, student=network, **roles)
    loss = student_loss(one, denoiser, 16, draws)["consistency"]
    grads = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    return [loss.detach(), *(g for g in grads if g is not None)]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class AlwaysToldClean(nn.Module):
    """A widened network as one that is not told: the clean end, always."""

    def __init__(self, network: nn.Module, schedule=FLOW) -> None:
        super().__init__()
        self.network, self.clean = network, float(schedule.network_time(schedule.t_clean))

    def forward(self, x_t, time, labels):
        return self.network(x_t, time, labels, timestep_cond=time_features([torch.full_like(time, self.clean)]))


@pytest.mark.parametrize("loss_type", ["huber", "l2"])
def test_ends_at_the_clean_end_make_it_consistency_distillation(loss_type):
    """On a flow, where LCM is plain consistency distillation to the clean end."""
    ends, common = {"end": torch.zeros(16)}, {"loss_type": loss_type}
    ctm = loss_and_gradients(method(**common), FLOW, wide_network(), ends)
    lcm = loss_and_gradients(LCM(LCMConfig(**PLAIN | common)), FLOW, AlwaysToldClean(wide_network()), ends)
    assert same(ctm, lcm)
    assert not same(loss_and_gradients(method(**common), FLOW, wide_network()), lcm)


@pytest.mark.parametrize(("schedule", "kind"), PROCESSES.values(), ids=PROCESSES)
def test_ends_at_the_clean_end_make_it_one_phase(schedule, kind):
    ends = {"end": torch.zeros(16)}
    one = PCM(PCMConfig(**PLAIN, num_phases=1, adversarial_weight=0.0))
    ctm = loss_and_gradients(method(), schedule, wide_network(), ends, kind)
    pcm = loss_and_gradients(one, schedule, AlwaysToldClean(wide_network(), schedule), ends, kind)
    assert same(ctm, pcm)
    assert not same(loss_and_gradients(method(), schedule, wide_network(), None, kind), pcm)


def test_to_compare_at_the_clean_end_changes_nothing_for_maps_that_end_there():
    """Nothing is left to map on: the target is the live student's map."""
    average, ends = wide_network(3), {"end": torch.zeros(16)}
    clean, there = method(compare_at="clean", target_decay=0.9), method(compare_at="end")
    for draws, equal in ((ends, True), (None, False)):
        found = loss_and_gradients(clean, FLOW, wide_network(), draws, target=average)
        assert same(found, loss_and_gradients(there, FLOW, wide_network(), draws)) is equal


# The exact map


@pytest.mark.parametrize(("solver", "order"), [("ddim", 2), ("heun", 3)])
@pytest.mark.parametrize("compare_at", ["end", "clean"])
def test_order_of_the_residual_of_the_exact_map(solver, order, compare_at):
    found = []
    for points in (5, 10, 20, 40):
        number = 8 * points // 10 - 1
        draws = {
            "pair": torch.full((64,), number),
            "end": torch.full((64,), end_draw(points, number, 299)),
        }
        net = JumpNet(exact_map(FLOW), None, FLOW)
        denoiser = gaussian_denoiser(FLOW, student=net, target=net)
        one = method(num_ddim_timesteps=points, solver=solver, compare_at=compare_at, target_decay=0.9)
        found.append(student_loss(one, denoiser, 64, draws)["consistency"].item())
    assert orders(found) == pytest.approx([order] * 3, abs=0.35)
    assert orders(found)[-1] == pytest.approx(order, abs=0.1)


def test_an_affine_student_per_grid_time_learns_the_jumps_to_a_told_end():
    """g(x, t, s) = (x_s - sigma_s / sigma_t x) / (alpha_s - alpha_t sigma_s / sigma_t), x_s by the teacher's steps."""
    end, x, errors = 249, f64([-1.0, 2.0]), []
    (at, st), (as_, ss) = levels(999), levels(end)

    def g(there):
        return (there - ss / st * x) / (as_ - at * ss / st)

    for points in (20, 40):
        grid = grid_points(points).tolist()
        above = [number for number in range(points) if grid[number] >= end]
        draws = {"pair": torch.tensor(above * 4), "end": torch.tensor([end_draw(points, n, end) for n in above] * 4)}
        denoiser = gaussian_denoiser(student=ToldAffine([grid[n + 1] for n in above]).double())
        one, rows = method(num_ddim_timesteps=points), len(draws["pair"])
        learn = partial(student_loss, one, denoiser, rows, draws)
        settle(lambda learn=learn: learn()["consistency"], denoiser.roles.parameters("student"), len(above))
        inputs = one.inputs(1.0, torch.full((2,), float(end)), denoiser)
        with torch.no_grad():
            t, cond = torch.full((2,), 999.0), batch_of(2, 1).cond
            found = denoiser(x[:, None, None, None], t, cond, "student", **inputs).x0.flatten()
        torch.testing.assert_close(found, g(mapped(product_map(grid), x, 999, end)), rtol=0, atol=1e-8)
        errors.append((found - g(mapped(exact_map(), x, 999, end))).norm().item())
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.2)  # the teacher's steps are of first order


def test_error_falls_with_the_teachers_sub_steps():
    found = []
    for steps in (1, 2, 4):
        number = torch.full((64,), 7)
        draws = {"pair": number, "end": torch.full((64,), end_draw(10, 7, 299))}
        denoiser = gaussian_denoiser(FLOW, student=JumpNet(exact_map(FLOW), None, FLOW))
        one = method(num_ddim_timesteps=10, solver_steps=steps)
        found.append(student_loss(one, denoiser, 64, draws)["consistency"].item())
    assert orders(found)[-1] == pytest.approx(1, abs=0.1), orders(found)


@SCHEDULES
def test_a_longer_skip_is_as_many_of_the_teachers_steps(schedule):
    """Four of ten grid points of a teacher in closed form; pairs with fewer points below them go to the clean end."""
    ctm, number = method(num_ddim_timesteps=10, max_skip=4), torch.tensor([0, 2, 5, 9])
    denoiser = gaussian_denoiser(schedule, student=JumpNet(exact_map(schedule), None, schedule))
    ctx = context(denoiser, 4, {"pair": number, "skip": torch.tensor([0.99, 0.99, 0.99, 0.2])})
    place = ctm.place(ctx, "cpu")
    assert place.start.tolist() == [99, 299, 599, 999] and place.next.tolist() == [-1, -1, 199, 799]
    assert (place.end <= place.next).all()
    x = data(4)
    found = ctm.solve(x, place, batch_of(4, 1, x), ctx, 1.0)[:, :, 0, 0]
    steps = product_map(list(range(-1, 1000, 100)), schedule)
    expected = steps(x[:, :, 0, 0], place.start[:, None], place.next[:, None])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 if schedule is SD else 1e-6)


def test_skips_are_longer_more_often_and_ends_lie_below_them():
    ctm, rows = method(max_skip=4), 20_000
    ctx = context(gaussian_denoiser(), rows, {"pair": torch.full((rows,), 39)})
    place = ctm.place(ctx, "cpu")
    skip = (place.start - place.next) // 25
    shares = [(skip == k).double().mean().item() for k in (1, 2, 3, 4)]
    assert shares == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.015)
    assert (place.end <= place.next).all()
    assert (method().place(ctx, "cpu").next == 974).all()


def test_heun_jumps_to_the_clean_end_where_no_network_is_asked():
    asked = []

    class Teacher_(ExactNetwork):
        def forward(self, x_t, time, labels):
            asked.append(time.tolist())
            return super().forward(x_t, time, labels)

    denoiser = denoiser_of(Teacher_(LAW, SD, "epsilon"), student=JumpNet(exact_map()))
    batch, place = (
        batch_of(2, 1, data(2)),
        method().place(context(denoiser, 2, {"pair": torch.tensor([0, 20])}), "cpu"),
    )
    ctx = context(denoiser, 2)
    with torch.no_grad():
        heun, ddim = (
            method(solver=solver).solve(batch.latents, place, batch, ctx, 1.0) for solver in ("heun", "ddim")
        )
    assert torch.equal(heun[0], ddim[0]) and not torch.equal(heun[1], ddim[1])
    assert asked == [[24.0, 524.0], [0.0, 499.0], [24.0, 524.0]]


def test_the_denoiser_is_the_map_from_a_time_to_itself():
    """g(x, t, t) is the denoiser: its loss is the law's own, and no other network's is lower."""
    ctm = method(denoising_weight=2.0)
    draws = {"denoising/t": torch.arange(16) * 60 + 20}
    net = JumpNet(exact_map())
    at_best = student_loss(ctm, gaussian_denoiser(student=net), 16, draws)["denoising"]
    teacher = ExactNetwork(LAW, SD, "epsilon")
    denoiser, batch = gaussian_denoiser(student=net), batch_of(16, 1, data(16))
    ctx = context(denoiser, 16, draws)
    t, eps = draws["denoising/t"].float(), ctx.random.normal("denoising/eps", (1, 1, 1))
    by_hand = (teacher(SD.add_noise(batch.latents, eps, t), t, None) - eps).square().mean()
    assert at_best.item() == pytest.approx(2 * by_hand.item(), rel=1e-9)
    assert "denoising" not in student_loss(method(), gaussian_denoiser(student=net), 16)


# Gradients


def test_gradient_passes_through_the_averaged_map_but_not_into_it():
    average, network = wide_network(3), wide_network()
    denoiser = denoiser_of(ExactNetwork(LAW, SD, "epsilon"), student=network, target=average)
    loss = student_loss(method(compare_at="clean", target_decay=0.9), denoiser, 16)["consistency"]
    loss.backward(inputs=denoiser.roles.parameters("student"))
    assert network.leave.weight.grad.abs().max() > 0 and network.slot.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in average.parameters())
    with pytest.raises(ValueError, match="compare_at end"):
        student_loss(method(TCD, compare_at="clean", target_decay=0.9), gaussian_denoiser(student=PointNet(1, 1)), 4)


@pytest.mark.parametrize(
    ("compare_at", "asked"),
    [("end", ["student", "teacher", "target"]), ("clean", ["student", "teacher", "student", "target", "target"])],
)
def test_who_maps_what(compare_at, asked, monkeypatch):
    """At the clean end the target's own jump is the live student's, and both are taken on by the average."""
    roles, call = [], Denoiser.__call__

    def spied(self, x_t, t, cond, role, *more, **named):
        roles.append(role)
        return call(self, x_t, t, cond, role, *more, **named)

    denoiser = denoiser_of(ExactNetwork(LAW, SD, "epsilon"), student=wide_network(), target=wide_network(3))
    monkeypatch.setattr(Denoiser, "__call__", spied)
    student_loss(method(compare_at=compare_at, target_decay=0.9), denoiser, 16)
    assert roles == asked


# Refusals and the engine


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"eta": -0.1}, "eta"),
        ({"solver_steps": 0}, "solver_steps"),
        ({"solver_steps": 30}, "30 steps do not fit"),
        ({"compare_at": "clean"}, "target_decay"),
        ({"denoising_weight": -1.0}, "denoising_weight"),
        ({"max_skip": 0}, "max_skip"),
        ({"max_skip": 41}, "max_skip"),
    ],
)
def test_bad_settings_are_named(config, named):
    with pytest.raises(ValueError, match=named):
        method(**config)


def test_an_adapter_cannot_be_told(tiny_sd, tmp_path):
    with pytest.raises(ValueError, match=r"only full; its student's network has inputs"):
        build_networks(method(), Teacher(tiny_sd), settings(tmp_path, student="lora"))
    assert CTM(CTMConfig()).info.student_kinds == ("full",)


def test_a_full_student_trains_and_learns_to_listen(tiny_sd, tmp_path):
    ctm = CTM(CTMConfig(guidance_scale=2.0, compare_at="clean", denoising_weight=0.1))
    trainer = Trainer(ctm, Teacher(tiny_sd), images(), settings(tmp_path, student="full"))
    for batches in trainer.batches.steps(0):
        trainer.train_step(batches)
        if trainer.step == 2:
            break
    own = dict(trainer.networks.roles.named_parameters("student"))
    assert own["time_embedding.cond_proj.weight"].abs().max() > 0
    assert all(p.grad is None for p in trainer.networks.roles.base.parameters())
    assert all(p.grad is None for p in trainer.networks.parameters("target"))


def test_told_ends_read_back_from_features():
    for dtype in (torch.float32, torch.float64):
        ends = torch.tensor([-1.0, 0.0, 249.0, 999.0], dtype=dtype)
        assert told(time_features([ends])).tolist() == pytest.approx(ends.tolist(), abs=1e-3)
