"""Guidance distillation (arXiv 2210.03142): the guided law in closed form, fixed and told guidance, states."""

from __future__ import annotations

import pytest
import torch
from method_helpers import SD, LabelledGaussians, batch_of, context, denoiser_of, f64
from torch import nn
from trajectory_helpers import FLOW, KINDS, MU, S, data, images, levels, settings, told

from fastdiff.data import PromptData
from fastdiff.diffusion import Gaussian, jump
from fastdiff.engine import Trainer
from fastdiff.engine.networks import build_networks
from fastdiff.methods import GuidanceDistillation, GuidanceDistillationConfig
from fastdiff.models.analytic import ExactNetwork
from fastdiff.models.embeddings import guidance_embedding
from fastdiff.models.sampler import SamplerSpec
from fastdiff.models.teacher import Teacher

SCHEDULES = pytest.mark.parametrize("schedule", [SD, FLOW], ids=["vp", "flow"])
NULL = 0.4


def method(**config) -> GuidanceDistillation:
    return GuidanceDistillation(GuidanceDistillationConfig(**config))


def law(mean: float, variance: float = S) -> Gaussian:
    return Gaussian(f64([mean]), f64([[variance]]))


def setting(schedule, student, null_variance: float = S, rows: int = 64, kind: str | None = None):
    kind = kind or KINDS[schedule]
    laws = [law(MU), law(NULL, null_variance)]
    denoiser = denoiser_of(LabelledGaussians(laws, schedule, kind), schedule, kind, student=student)
    return denoiser, batch_of(rows, 1, data(rows))


@pytest.mark.parametrize(("schedule", "kind"), [(SD, "epsilon"), (SD, "v_prediction"), (FLOW, "flow")])
@pytest.mark.parametrize("w", [0.0, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("states", ["data", "teacher"])
def test_loss_vanishes_at_the_law_whose_mean_guidance_moved(schedule, kind, w, states):
    """Equal variances: guidance makes N(null + w (cond - null), S)."""
    moved = ExactNetwork(law(NULL + w * (MU - NULL)), schedule, kind)
    one = method(guidance_scale=w, states=states, num_inference_steps=4)
    denoiser, batch = setting(schedule, moved, kind=kind)
    for step in range(3):
        ctx = context(denoiser, 64, step=step)
        assert one.student_loss(batch, ctx)["guidance"].item() < 1e-22
    if w != 1:
        denoiser, batch = setting(schedule, ExactNetwork(law(MU), schedule, kind), kind=kind)
        assert one.student_loss(batch, context(denoiser, 64))["guidance"].item() > 1e-5


def test_the_loss_is_the_plain_error_of_the_networks_output():
    denoiser, batch = setting(SD, ExactNetwork(law(MU), SD, "epsilon"), null_variance=0.9)
    draws = {"t": torch.arange(64) * 15}
    ctx = context(denoiser, 64, draws)
    found = method(guidance_scale=3.0).student_loss(batch, ctx)["guidance"].item()
    t = draws["t"].float()
    x = SD.add_noise(batch.latents, ctx.random.normal("eps", (1, 1, 1)), t)
    cond, null = (ExactNetwork(one, SD, "epsilon")(x, t, None) for one in (law(MU), law(NULL, 0.9)))
    assert found == pytest.approx(4 * (cond - null).square().mean().item(), rel=1e-10)


@pytest.mark.parametrize("index", [0, 400, 999])
def test_the_loss_of_v_is_that_of_epsilon_over_alpha_squared(index):
    """The gaps of both predictions differ by the factor alpha, since x_t is the same."""
    found = []
    for kind in ("epsilon", "v_prediction"):
        denoiser, batch = setting(SD, ExactNetwork(law(MU), SD, kind), null_variance=0.9, rows=8, kind=kind)
        ctx = context(denoiser, 8, {"t": torch.full((8,), index)})
        found.append(method(guidance_scale=3.0).student_loss(batch, ctx)["guidance"].item())
    assert found[1] == pytest.approx(found[0] / levels(index)[0].item() ** 2, rel=1e-9)


@SCHEDULES
def test_states_of_the_teacher_are_those_of_its_own_sampling(schedule):
    seen = []

    class Spy(ExactNetwork):
        def forward(self, x_t, time, labels):
            seen.append((x_t.clone(), time.clone()))
            return super().forward(x_t, time, labels)

    denoiser, batch = setting(schedule, Spy(law(MU), schedule, KINDS[schedule]), rows=4)
    one = method(guidance_scale=3.0, states="teacher", num_inference_steps=4)
    for place, index in enumerate((999, 749, 499, 249)):
        ctx = context(denoiser, 4, {"t": place})
        one.student_loss(batch, ctx)
        x = ctx.random.normal("eps", (1, 1, 1))
        for t, s in ((999, 749), (749, 499), (499, 249))[:place]:
            t, s = (schedule.time_of_index(torch.full((4,), float(i))) for i in (t, s))
            x = jump(denoiser(x, t, batch.cond, "teacher", batch.null, 3.0), s)
        torch.testing.assert_close(seen[-1][0].double(), x.double(), rtol=1e-6, atol=1e-6)
        expected = index if schedule is SD else index + 1
        assert seen[-1][1].tolist() == pytest.approx([expected] * 4, abs=1e-3)


def test_states_of_the_teacher_need_prompts_only(tiny_sd, tmp_path):
    one = method(guidance_scale=2.0, states="teacher", num_inference_steps=2)
    assert one.needs() == "prompts" and method().needs() == "images"
    trainer = Trainer(one, Teacher(tiny_sd), PromptData(["ab", "b"]), settings(tmp_path, student="lora"))
    trainer.train_step(next(trainer.batches.steps(0)))
    assert max(p.abs().max() for n, p in trainer.networks.roles.named_parameters("student") if "lora_B" in n) > 0


def test_an_untrained_lora_without_guidance_has_no_loss_at_all(tiny_sd, tmp_path):
    trainer = Trainer(method(guidance_scale=1.0), Teacher(tiny_sd), images(), settings(tmp_path, student="lora"))
    batch = next(trainer.batches.steps(0))[0]
    ctx = context(trainer.networks.denoiser, 2)
    loss = trainer.method.student_loss(batch, ctx)["guidance"]
    grads = torch.autograd.grad(loss, trainer.networks.parameters("student"))
    assert loss == 0 and all(not g.any() for g in grads)
    guided = method(guidance_scale=2.0).student_loss(batch, ctx)["guidance"]
    guided.backward(inputs=trainer.networks.parameters("student"))
    assert guided > 0 and any(p.grad.any() for p in trainer.networks.parameters("student"))
    own = {id(p) for p in trainer.networks.parameters("student")}
    assert all(p.grad is None for p in trainer.networks.roles.base.parameters() if id(p) not in own)


def test_a_range_is_told_to_a_full_student_alone(tiny_sd, tmp_path):
    one = method(guidance_range=(3.0, 15.0))
    with pytest.raises(ValueError, match="full student"):
        build_networks(one, Teacher(tiny_sd), settings(tmp_path, student="lora"))
    trainer = Trainer(one, Teacher(tiny_sd), images(), settings(tmp_path, student="full"))
    fed, network = [], trainer.networks.roles.network("student")
    network.register_forward_pre_hook(lambda m, a, k: fed.append(k["timestep_cond"]), with_kwargs=True)
    batch = next(trainer.batches.steps(0))[0]
    draws = {"guidance": torch.tensor([0.25, 0.75]), "t": torch.tensor([20, 700])}
    loss = one.student_loss(batch, context(trainer.networks.denoiser, 2, draws))["guidance"]
    torch.testing.assert_close(fed[0], guidance_embedding(torch.tensor([5.0, 11.0]), 256), atol=1e-4, rtol=0)
    # Before the slot has learned, the student is the teacher: the loss is that of a fixed w, sample by sample.
    by_w = []
    for place, w in enumerate((6.0, 12.0)):
        fixed = method(guidance_scale=w)
        ctx = context(trainer.networks.denoiser, 2, {"t": draws["t"]})
        x, t = fixed.state(batch, ctx, w)
        gap = trainer.networks.denoiser(x, t, batch.cond, "teacher", batch.null, w).native
        gap = gap - trainer.networks.denoiser(x, t, batch.cond, "teacher").native
        by_w.append(gap[place].square().mean())
    torch.testing.assert_close(loss, torch.stack(by_w).mean(), rtol=1e-4, atol=1e-8)
    trainer.train_step([batch])
    assert network.time_embedding.cond_proj.weight.abs().max() > 0
    assert one.sampler().guidance_scale == 9.0
    inputs = one.sampling_inputs(trainer.networks.denoiser, 3, torch.device("cpu"))["timestep_cond"]
    torch.testing.assert_close(inputs, guidance_embedding(torch.full((3,), 8.0), 256))
    assert told(guidance_embedding(torch.tensor([0.5]), 256)).item() == pytest.approx(500, abs=0.1)


def test_one_call_serves_where_guidance_took_two():
    denoiser, _ = setting(SD, nn.Linear(1, 1))
    spec = method(num_inference_steps=50).sampler()
    assert spec == SamplerSpec.trailing("ddim", 50) and spec.guidance_scale == 0
    assert method().sampling_inputs(denoiser, 2, torch.device("cpu")) == {}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"guidance_range": (3.0, 2.0)}, "guidance_range"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
    ],
)
def test_bad_settings_are_named(config, named):
    with pytest.raises(ValueError, match=named):
        method(**config)
