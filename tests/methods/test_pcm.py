"""PCM (arXiv 2405.18407): phase edges, boundary, the optimum in closed form, one phase is LCM, stock DDIM, the GAN."""

from __future__ import annotations

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
    data,
    every_pair,
    exact_map,
    gaussian_denoiser,
    images,
    jumps,
    mapped,
    orders,
    product_map,
    settings,
    student_loss,
)

from fastdiff.diffusion import jump
from fastdiff.engine import Trainer
from fastdiff.methods import LCM, PCM, LCMConfig, PCMConfig
from fastdiff.methods._trajectory import grid_points
from fastdiff.models.analytic import ExactNetwork
from fastdiff.models.analytic_networks import AffinePerBin, PointNet
from fastdiff.models.sampler import SamplerSpec
from fastdiff.models.teacher import Teacher

GRID = grid_points(40).tolist()
SCHEDULES = pytest.mark.parametrize("schedule", [SD, FLOW], ids=["vp", "flow"])


def method(**config) -> PCM:
    return PCM(PCMConfig(**{"guidance_scale": 1.0, "loss_type": "l2", "adversarial_weight": 0.0} | config))


def edges(phases: int):
    """The greatest multiple of 1000 / phases below or at the pair, as an index; on the whole grid of 25s."""
    return lambda index: torch.ceil((index + 1) / (1000 / phases) - 1) * (1000 / phases) - 1


# Grid and boundary


@pytest.mark.parametrize("phases", [1, 2, 4, 5, 8, 40])
def test_phases_end_where_the_trailing_sampler_lands(phases):
    points = grid_points(40)
    number = torch.arange(40)
    end = method(num_phases=phases).end(number, points, None)
    assert torch.equal(end.double(), edges(phases)(points[number + 1].double()))
    lands = [*SamplerSpec.trailing("ddim", phases).timesteps[1:], -1]
    assert sorted(set(end.tolist())) == sorted(lands)
    assert (end <= points[number]).all()


def test_grid_of_the_paper_that_does_not_fit_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"num_phases 4 .* 50, .* 40"):
        method(num_ddim_timesteps=50)
    assert method(num_ddim_timesteps=50, num_phases=2).sampler().timesteps == (999, 499)
    with pytest.raises(ValueError, match="prompt_dropout"):
        method(prompt_dropout=1.5)


@SCHEDULES
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_at_the_edge_the_map_is_its_input_whatever_the_network(schedule, kind):
    torch.manual_seed(0)
    network = PointNet(3, 1).double()
    denoiser = denoiser_of(network, schedule, kind)
    x, index = torch.randn(3, 3, 1, 1, dtype=torch.float64), torch.tensor([24, 249, 749])
    t = schedule.time_of_index(index)
    prediction = denoiser(x, t, batch_of(3, 3).cond, "teacher")
    torch.testing.assert_close(method().reach(prediction, t), x, rtol=0, atol=1e-12)
    assert not torch.allclose(method().reach(prediction, schedule.time_of_index(index - 20)), x, atol=1e-4)


# Optimum


@SCHEDULES
@pytest.mark.parametrize("phases", [1, 4])
def test_loss_vanishes_at_the_product_map_of_each_phase_and_only_there(schedule, phases):
    pcm = method(num_phases=phases)
    optimum = JumpNet(product_map(GRID, schedule), edges(phases), schedule)
    # Times on the flow are rounded to float32, which moves the grid by 1e-8.
    assert every_pair(pcm, gaussian_denoiser(schedule, student=optimum)) < (1e-20 if schedule is SD else 1e-13)
    exact = JumpNet(exact_map(schedule), edges(phases), schedule)
    assert every_pair(pcm, gaussian_denoiser(schedule, student=exact)) > 1e-9


def test_an_affine_student_per_grid_time_learns_the_product_map_of_each_phase():
    pcm, points = method(num_ddim_timesteps=20), grid_points(20).tolist()
    student, draws = AffinePerBin(1, points[1:]).double(), {"pair": torch.arange(20).repeat(4)}
    denoiser = gaussian_denoiser(student=student)
    settle(lambda: student_loss(pcm, denoiser, 80, draws)["consistency"], denoiser.roles.parameters("student"), 5)
    x = f64([-1.0, 2.0])
    for index in points[1:]:
        edge = int(edges(4)(f64(index)))
        expected = mapped(product_map(points), x, index, edge)
        torch.testing.assert_close(jumps(denoiser, x, index, edge), expected, rtol=0, atol=1e-8)
    whole = x
    for start in (999, 749, 499, 249):
        whole = jumps(denoiser, whole, start, start - 250)
    torch.testing.assert_close(whole, mapped(product_map(points), x, 999, -1), rtol=0, atol=1e-8)


@pytest.mark.parametrize("index", [399, 799])
def test_residual_of_the_exact_map_is_of_second_order(index):
    """On a flow: Stable Diffusion's table is too coarse for an asymptote."""
    found = []
    for points in (5, 10, 20, 40):
        pcm = method(num_ddim_timesteps=points, num_phases=1, target_decay=0.0)
        number = torch.full((64,), (index + 1) * points // 1000 - 1)
        denoiser = gaussian_denoiser(FLOW, student=JumpNet(exact_map(FLOW), edges(1), FLOW))
        found.append(student_loss(pcm, denoiser, 64, {"pair": number})["consistency"].item())
    assert orders(found) == pytest.approx([2] * 3, abs=0.35)
    assert orders(found)[-1] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_exact_phase_maps_compose_to_the_whole_map_in_stock_ddim(steps, tmp_path):
    from diffusers import DDIMScheduler

    pcm = method(num_phases=steps)
    scheduler = pcm.sampler().build_scheduler(
        {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
        "epsilon",
    )
    scheduler.save_pretrained(tmp_path)
    scheduler = DDIMScheduler.from_pretrained(tmp_path)
    scheduler.set_timesteps(steps)
    network = JumpNet(exact_map(), edges(steps))
    x = start = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None, None, None]
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(9), None), t, x).prev_sample
    expected = exact_map()(start[:, 0, 0], torch.full((9, 1), 999.0), torch.full((9, 1), -1.0))
    torch.testing.assert_close(x[:, 0, 0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_exact_phase_maps_compose_in_the_stock_scheduler_of_flows(steps):
    scheduler = (
        method(num_phases=steps)
        .sampler()
        .build_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}, "flow")
    )
    scheduler.set_timesteps(steps)
    network = JumpNet(exact_map(FLOW), edges(steps), FLOW)
    x = start = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None, None, None]
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(9), None), t, x).prev_sample.double()
    expected = exact_map(FLOW)(start[:, 0, 0], torch.full((9, 1), 999.0), torch.full((9, 1), -1.0))
    torch.testing.assert_close(x[:, 0, 0], expected, rtol=0, atol=1e-5)


# Identities


def gradients(method, schedule, network, draws=None, kind=None) -> tuple[float, list[torch.Tensor]]:
    kind = kind or KINDS[schedule]
    denoiser = denoiser_of(ExactNetwork(LAW, schedule, kind), schedule, kind, student=network)
    loss = student_loss(method, denoiser, 16, draws)["consistency"]
    return loss.item(), list(torch.autograd.grad(loss, list(network.parameters()), allow_unused=True))


def small_network(seed: int = 0) -> PointNet:
    torch.manual_seed(seed)
    return PointNet(1, 1).double()


def same(a, b) -> bool:
    return a[0] == b[0] and all(x is y or torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


@pytest.mark.parametrize("loss_type", ["huber", "l2"])
def test_one_phase_on_a_flow_is_lcm_bit_for_bit(loss_type):
    """On a flow LCM has no boundary weights and ends at the clean end, as one phase does."""
    common = {"guidance_scale": 1.0, "loss_type": loss_type, "num_ddim_timesteps": 40, "target_decay": 0.0}
    one = gradients(PCM(PCMConfig(num_phases=1, adversarial_weight=0.0, **common)), FLOW, small_network())
    assert same(one, gradients(LCM(LCMConfig(**common)), FLOW, small_network()))
    assert not same(one, gradients(method(num_phases=2, loss_type=loss_type), FLOW, small_network()))


@pytest.mark.parametrize(("schedule", "kind"), PROCESSES.values(), ids=PROCESSES)
def test_one_phase_is_lcm_whose_boundary_is_far_below_the_grid(schedule, kind):
    """Boundary weights of (0, 1) to rounding; a table's first pair is left out, which LCM ends at index 0."""
    common = {"guidance_scale": 1.0, "num_ddim_timesteps": 40, "target_decay": 0.0}
    one = PCM(PCMConfig(num_phases=1, adversarial_weight=0.0, **common))
    far, near = (LCM(LCMConfig(timestep_scaling_factor=factor, **common)) for factor in (1e12, 0.1))

    def found(method, first):
        loss, grads = gradients(method, schedule, small_network(), {"pair": first + torch.arange(16) * 2}, kind)
        return torch.cat([f64([loss]), *(g.flatten() for g in grads if g is not None)])

    torch.testing.assert_close(found(one, 1), found(far, 1), rtol=1e-9, atol=1e-12)
    for other, first in ((far, 0), (near, 1)):
        assert torch.allclose(found(one, first), found(other, first)) is (schedule is FLOW)


def test_one_phase_on_a_table_is_lcm_without_boundary_weights_to_the_clean_end():
    network, draws = small_network(), {"pair": torch.arange(16) * 2}
    loss, grads = gradients(method(num_phases=1), SD, network, draws)
    denoiser, batch = gaussian_denoiser(student=network), batch_of(16, 1, data(16))
    points = grid_points(40)
    t, u = points[draws["pair"] + 1].float(), points[draws["pair"]].float()
    x_t = SD.add_noise(batch.latents, context(denoiser, 16).random.normal("eps", (1, 1, 1)), t)
    student = denoiser(x_t, t, batch.cond, "student").x0
    with torch.no_grad():
        x_u = jump(denoiser(x_t, t, batch.cond, "teacher"), u)
        target = torch.where(
            (u == -1)[:, None, None, None], x_u, denoiser(x_u, u.clamp_min(0), batch.cond, "student").x0
        )
    by_hand = (student - target).square().mean()
    assert loss == by_hand.item()
    expected = torch.autograd.grad(by_hand, list(network.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_as_many_phases_as_points_regress_the_teachers_own_steps():
    teacher = ExactNetwork(LAW, SD, "epsilon")
    assert every_pair(method(num_phases=40), gaussian_denoiser(student=teacher)) < 1e-24
    assert every_pair(method(num_phases=20), gaussian_denoiser(student=teacher)) > 1e-9


# Adversarial term


def adversarial(networks_seed: int = 0, **config):
    pcm = method(adversarial_weight=0.1, **config)
    base = small_network(1)
    denoiser = denoiser_of(base, student=small_network(networks_seed))
    torch.manual_seed(0)
    denoiser.family.feature_tap = "mid_block"
    modules = {name: module.double() for name, module in pcm.modules(denoiser).items()}
    return pcm, denoiser, modules


def test_the_student_is_compared_with_its_target_inside_the_phase(monkeypatch):
    pcm, denoiser, modules = adversarial()
    seen = []
    number = torch.tensor([0, 10, 20, 39])
    ctx = context(denoiser, 4, {"pair": number}, modules=modules)
    batch = batch_of(4, 1, data(4))

    def noised(self, x, ctx, site, t=None, start=None):
        seen.append((site, x, t, start))
        return original(self, x, ctx, site, t, start)

    original = type(pcm.adversary).noised
    monkeypatch.setattr(type(pcm.adversary), "noised", noised)
    terms = pcm.student_loss(batch, ctx)
    heads = pcm.discriminator_loss(batch, ctx)
    assert set(terms) == {"consistency", "gan"} and set(heads) == {"discriminator"}
    assert [site for site, *_ in seen] == ["gan/fake", "critic/gan/fake", "critic/gan/real"]
    assert seen[0][1].requires_grad and not seen[1][1].requires_grad
    assert torch.equal(seen[0][1], seen[1][1]) and not torch.equal(seen[1][1], seen[2][1])
    for _, _, t, start in seen:
        assert start.tolist() == [-1.0, 249.0, 499.0, 749.0]
        assert ((t > start) & (t <= start + 250)).all()
    assert torch.equal(seen[1][2], seen[2][2])  # one time for both sides


def test_the_generators_gradient_reaches_the_student_and_the_heads_learn():
    pcm, denoiser, modules = adversarial()
    ctx, batch = context(denoiser, 8, modules=modules), batch_of(8, 1, data(8))
    gan = pcm.student_loss(batch, ctx)["gan"]
    student = denoiser.roles.parameters("student")
    assert any(g is not None and g.abs().max() > 0 for g in torch.autograd.grad(gan, student, allow_unused=True))
    pcm.discriminator_loss(batch, ctx)["discriminator"].backward()
    assert all(p.grad is not None for p in modules["discriminator"].parameters())
    assert all(p.grad is None for p in [*student, *denoiser.roles.base.parameters()])


def test_without_weight_there_is_no_discriminator():
    pcm, denoiser, _ = adversarial()
    plain = method()
    assert plain.modules(denoiser) == {} and set(plain.groups()) == {"student"}
    assert [update.name for update in plain.updates(0)] == ["student"]
    assert [update.name for update in pcm.updates(0)] == ["student", "discriminator"]
    assert pcm.groups()["discriminator"].learning_rate == 1e-5 and pcm.groups()["discriminator"].betas == (0, 0.999)


# Guidance


def test_some_captions_are_left_out_for_student_and_teacher_alike():
    class Labels(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.scale = [], nn.Parameter(torch.ones(()).double())

        def forward(self, x, time, labels):
            self.seen.append(labels.tolist())
            return x * self.scale

    teacher, student = Labels(), Labels()
    denoiser = denoiser_of(teacher, student=student)
    batch = batch_of(4, 1, data(4))
    draws = {"empty_prompt": torch.tensor([True, False, True, False])}
    method(prompt_dropout=0.5).student_loss(batch, context(denoiser, 4, draws))
    assert student.seen == [[-1, 0, -1, 0]] * 2 and teacher.seen == [[-1, 0, -1, 0]]
    assert batch.cond.tensors["labels"].tolist() == [0] * 4


# The engine


def test_a_lora_trains_with_its_discriminator_and_leaves_the_teacher_alone(tiny_sd, tmp_path):
    pcm = PCM(PCMConfig(guidance_scale=3.0))
    trainer = Trainer(pcm, Teacher(tiny_sd), images(), settings(tmp_path, student="lora"))
    networks = trainer.networks
    before = {name: p.clone() for name, p in networks.roles.base.named_parameters() if "lora" not in name}
    heads = [p.clone() for p in networks.parameters("discriminator")]
    for batches in trainer.batches.steps(0):
        trainer.train_step(batches)
        if trainer.step == 2:
            break
    assert all(torch.equal(p, before[n]) for n, p in networks.roles.base.named_parameters() if "lora" not in n)
    assert all(p.grad is None for n, p in networks.roles.base.named_parameters() if "lora" not in n)
    assert max(p.abs().max() for n, p in networks.roles.named_parameters("student") if "lora_B" in n) > 0
    assert any(not torch.equal(a, b) for a, b in zip(heads, networks.parameters("discriminator"), strict=True))
