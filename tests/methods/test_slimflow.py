"""SlimFlow (arXiv 2407.12718): both ends of the annealing, the closed form between them, the guide's two steps."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from method_helpers import SD, context, denoiser_of, f64, signs, spatial
from straight_helpers import FLOW, KINDS, LAW, A, Free, StraightNetwork, noise, pairs

from fastdiff.diffusion import jump
from fastdiff.engine import Settings
from fastdiff.engine.networks import build_networks
from fastdiff.methods._flow_map import noise_share, time_of_share
from fastdiff.methods.rectified_flow import RectifiedFlow, RectifiedFlowConfig
from fastdiff.methods.slimflow import GUIDE, SlimFlow, SlimFlowConfig
from fastdiff.models.analytic import ExactNetwork
from fastdiff.models.teacher import Teacher

ROWS = 32
STUDENT = {"slope": f64([[0.3, 0.1], [0.0, 0.5]]), "offset": f64([0.2, -0.1])}


def method(**config) -> SlimFlow:
    own = {"flip_pairs": False} if config.get("objective") == "distill" else {"flip_pairs": False, "anneal_steps": 100}
    return SlimFlow(SlimFlowConfig(**own | config))


def coupled(z: torch.Tensor) -> torch.Tensor:
    return LAW.mean + z @ A.T


def loss(slim, student, z, x0, case="vp", draws=None, step=0, guide=None):
    schedule, kind = KINDS[case]
    roles = {"student": student} | ({GUIDE: guide} if guide else {})
    denoiser = denoiser_of(ExactNetwork(LAW, schedule, kind), schedule, kind, **roles)
    return dict(slim.student_loss(pairs(z, x0), context(denoiser, len(z), draws, step)))


# Annealing


@pytest.mark.parametrize("case", KINDS)
def test_after_the_annealing_it_is_reflow(case):
    z, student = noise(ROWS), Free(**STUDENT, schedule=KINDS[case][0], kind=KINDS[case][1])
    schedule, kind = KINDS[case]
    denoiser = denoiser_of(ExactNetwork(LAW, schedule, kind), schedule, kind, student=student)
    reflow = RectifiedFlow(RectifiedFlowConfig()).student_loss(pairs(z, coupled(z)), context(denoiser, ROWS, step=100))
    found = loss(method(), student, z, coupled(z), case, step=100)
    torch.testing.assert_close(found["reflow"], reflow["reflow"], rtol=1e-13, atol=0)
    assert loss(method(), student, z, coupled(z), case, step=99)["reflow"] != reflow["reflow"]


@pytest.mark.parametrize("case", KINDS)
def test_at_its_start_it_is_flow_matching_on_unpaired_noise(case):
    """The pair's own noise has no influence; another noise takes its place on the line."""
    z, fresh = noise(ROWS), noise(ROWS, seed=1).float().double()
    schedule, kind = KINDS[case]
    student = Free(**STUDENT, schedule=schedule, kind=kind)
    denoiser = denoiser_of(ExactNetwork(LAW, schedule, kind), schedule, kind, student=student)
    plain = RectifiedFlow(RectifiedFlowConfig()).student_loss(pairs(fresh, coupled(z)), context(denoiser, ROWS))
    draws = {"anneal/noise": spatial(fresh)}
    found = loss(method(), student, z, coupled(z), case, draws)
    torch.testing.assert_close(found["reflow"], plain["reflow"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_annealing_falls_from_one_to_zero(shape):
    slim = method(anneal=shape)
    betas = [slim.beta(step) for step in (0, 25, 50, 100, 1000)]
    expected = {"linear": [1, 0.75, 0.5, 0, 0], "cosine": [1, math.cos(math.pi / 8), math.sqrt(0.5), 0, 0]}[shape]
    assert betas == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("step", [0, 30, 70, 100])
@pytest.mark.parametrize("level", [0.3, 0.5, 0.9])
def test_the_closed_form_between_the_ends_minimises_the_loss(step, level):
    """v = -mu + [t I - (1-t) S + (1-2t) c A] [(1-t)^2 S + t^2 I + 2 t (1-t) c A]^-1 (x - (1-t) mu), c^2 = 1 - beta^2.

    All sign patterns of both noises have exact second moments, so the gradient of a linear velocity vanishes there.
    """
    patterns = signs(4).double()
    z, fresh, t = patterns[:, :2], patterns[:, 2:], level
    c, eye = math.sqrt(1 - method().beta(step) ** 2), torch.eye(2).double()
    S = A @ A
    inverse = torch.linalg.inv((1 - t) ** 2 * S + t**2 * eye + 2 * t * (1 - t) * c * A)
    slope = (t * eye - (1 - t) * S + (1 - 2 * t) * c * A) @ inverse
    # The clean prediction x - t v of v = -mu + slope (x - (1 - t) mu).
    student = Free(eye - t * slope, t * (LAW.mean + (1 - t) * slope @ LAW.mean), FLOW, "flow")
    draws = {"anneal/noise": spatial(fresh), "t": torch.full((16,), t, dtype=torch.float64)}
    value = loss(method(), student, z, coupled(z), "flow", draws, step)["reflow"]
    gradients = torch.autograd.grad(value, list(student.parameters()))
    assert max(g.abs().max().item() for g in gradients) < 1e-7  # the draw of noise is float32
    assert (value.item() < 1e-13) == (step == 100)
    moved = Free(student.slope.detach() + 0.01, student.offset.detach(), FLOW, "flow")
    assert loss(method(), moved, z, coupled(z), "flow", draws, step)["reflow"] > value


def test_noise_and_sample_are_mirrored_together():
    z = torch.arange(4.0).double().reshape(2, 1, 1, 2)
    batch = replace(pairs(noise(2), noise(2)), latents=10 * z, extra={"noise": z}, latent_shape=(1, 1, 2))
    denoiser = denoiser_of(ExactNetwork(LAW, SD, "epsilon"))
    ctx = context(denoiser, 2, {"flip": torch.tensor([True, False])}, step=100)
    found, x0 = method(flip_pairs=True).coupled(batch, ctx)
    assert found.flatten(1).tolist() == [[1, 0], [2, 3]]
    assert torch.equal(x0, 10 * found)


# Distillation


@pytest.mark.parametrize("case", KINDS)
@pytest.mark.parametrize("first_step", ["student", "guide"])
def test_a_straight_guide_has_nothing_to_say_to_its_equal(case, first_step):
    schedule, kind = KINDS[case]
    z, straight = noise(ROWS), StraightNetwork(LAW.mean, A, schedule, kind)
    terms = loss(method(objective="distill", first_step=first_step), straight, z, coupled(z), case, guide=straight)
    assert terms.keys() == {"regression", "flow_guided"}
    assert max(term.item() for term in terms.values()) < (1e-11 if kind == "flow" else 1e-20)


@pytest.mark.parametrize("elapsed", [0.2, 0.5, 0.8])
def test_the_guided_term_is_the_public_codes_velocity_target(elapsed):
    """In a flow: v* = tau v_S + (1 - tau) v_T(z - tau v_S, 1 - tau), compared at t = 1."""
    z, fresh = noise(4), noise(4, seed=1).float().double()
    student, guide = Free(**STUDENT, schedule=FLOW, kind="flow"), ExactNetwork(LAW, FLOW, "flow")
    slim = method(objective="distill", min_elapsed=elapsed, max_elapsed=elapsed)
    found = loss(slim, student, z, coupled(z), "flow", {"guided/noise": spatial(fresh)}, guide=guide)["flow_guided"]
    labels = torch.zeros(4, dtype=torch.int64)
    v_s = student(spatial(fresh), torch.full((4,), 1000.0), labels)
    x = spatial(fresh) - elapsed * v_s
    v_t = guide(x, torch.full((4,), 1000 * (1 - elapsed), dtype=torch.float64), labels)
    target = elapsed * v_s + (1 - elapsed) * v_t
    torch.testing.assert_close(found, (v_s - target).square().mean(), rtol=1e-5, atol=0)


def test_the_papers_first_step_is_the_guides():
    z, fresh = noise(4), noise(4, seed=1).float().double()
    student, guide = Free(**STUDENT, schedule=FLOW, kind="flow"), ExactNetwork(LAW, FLOW, "flow")
    slim = method(objective="distill", min_elapsed=0.5, max_elapsed=0.5, first_step="guide")
    found = loss(slim, student, z, coupled(z), "flow", {"guided/noise": spatial(fresh)}, guide=guide)["flow_guided"]
    labels, ones = torch.zeros(4, dtype=torch.int64), torch.full((4,), 1000.0)
    v_1 = guide(spatial(fresh), ones, labels)
    v_2 = guide(spatial(fresh) - 0.5 * v_1, ones / 2, labels)
    v_s = student(spatial(fresh), ones, labels)
    torch.testing.assert_close(found, (v_s - (v_1 + v_2) / 2).square().mean(), rtol=1e-5, atol=0)


def test_limits_of_the_first_parts_length():
    z, fresh = noise(4), noise(4, seed=1).float().double()
    student, guide = Free(**STUDENT, schedule=FLOW, kind="flow"), ExactNetwork(LAW, FLOW, "flow")
    draws = {"guided/noise": spatial(fresh)}
    whole = method(objective="distill", min_elapsed=1.0, max_elapsed=1.0)
    assert loss(whole, student, z, coupled(z), "flow", draws, guide=guide)["flow_guided"] < 1e-9  # no signal
    none = method(objective="distill", min_elapsed=0.0, max_elapsed=0.0)
    found = loss(none, student, z, coupled(z), "flow", draws, guide=guide)["flow_guided"]
    labels, ones = torch.zeros(4, dtype=torch.int64), torch.full((4,), 1000.0)
    direct = student(spatial(fresh), ones, labels) - guide(spatial(fresh), ones, labels)
    torch.testing.assert_close(found, direct.square().mean(), rtol=1e-6, atol=0)


def test_only_the_student_gets_a_gradient_and_its_first_step_none():
    z, fresh = noise(4), noise(4, seed=1)
    student, guide = Free(**STUDENT), Free(A, LAW.mean)
    terms = loss(method(objective="distill"), student, z, coupled(z), guide=guide)
    terms["flow_guided"].backward()
    assert student.slope.grad.abs().max() > 0
    assert guide.slope.grad is None
    # The gradient is that of the distance to a constant target.
    denoiser = denoiser_of(ExactNetwork(LAW, SD, "epsilon"), student=student, guide=guide)
    del fresh
    ctx = context(denoiser, 4)
    start = method().start(spatial(z), ctx)
    fed = ctx.random.normal("guided/noise", (2, 1, 1)).double()
    prediction = denoiser(fed, start, pairs(z, z).cond, "student")
    elapsed = 0.2 + 0.6 * ctx.random.uniform("guided/elapsed")
    u = time_of_share(SD, (1 - elapsed) * noise_share(SD, start))
    with torch.no_grad():
        target = denoiser(jump(denoiser(fed, start, pairs(z, z).cond, "student"), u), u, pairs(z, z).cond, GUIDE).x0
    (expected,) = torch.autograd.grad((prediction.x0 - target).square().mean(), [student.slope])
    torch.testing.assert_close(student.slope.grad, expected, rtol=1e-4, atol=1e-9)


def test_the_guide_is_the_earlier_run(tiny_sd):
    slim = method(objective="distill")
    assert slim.frozen() == {GUIDE: "student"}
    assert slim.inherits() == {"student": ("student",), GUIDE: ("student",)}
    assert method().frozen() == {} and method().inherits() is None
    assert method(objective="distill", guided_weight=0.0).frozen() == {}
    networks = build_networks(slim, Teacher(tiny_sd, "tiny"), Settings(student="lora", lora_rank=2))
    assert GUIDE in networks.roles


def test_both_terms_of_the_distillation_have_the_same_distance():
    """A scorer that says the mean square makes the perceptual term once more what the plain one is."""
    z, student, guide = noise(4), Free(**STUDENT), ExactNetwork(LAW, SD, "epsilon")
    found = {}
    for weight in (0.0, 1.0):
        slim = method(objective="distill", perceptual_weight=weight)
        denoiser = denoiser_of(guide, student=student, guide=guide)
        ctx = context(denoiser, 4)
        ctx.decode = lambda latents: latents
        ctx.scorer = SimpleNamespace(distance=lambda a, b: (a - b).square().flatten(1).mean(1))
        found[weight] = slim.student_loss(pairs(z, coupled(z)), ctx)
    torch.testing.assert_close(found[1.0]["flow_guided"], 2 * found[0.0]["flow_guided"], rtol=1e-9, atol=0)
    torch.testing.assert_close(found[1.0]["perceptual"], found[1.0]["regression"], rtol=1e-9, atol=0)


SMALL = {"student_layers_per_block": 1, "student_removed_levels": (1,)}


def test_a_smaller_student_and_its_guide_have_one_size(tiny_sd):
    slim = method(objective="distill", **SMALL)
    teacher = Teacher(tiny_sd, "tiny")
    roles = build_networks(slim, teacher, Settings(student="full")).roles
    sizes = {role: sum(p.numel() for p in roles.parameters(role)) for role in ("student", GUIDE)}
    assert sizes["student"] == sizes[GUIDE] < 0.8 * sum(p.numel() for p in teacher.network.parameters())
    assert slim.inherits() == {"student": ("student",), GUIDE: ("student",)}
    with pytest.raises(ValueError, match="which a LoRA cannot carry"):
        build_networks(slim, teacher, Settings(student="lora", lora_rank=2))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"student_width": 2.0}, "width"),
        ({"anneal_steps": 0}, "anneal_steps"),
        ({"min_elapsed": 0.9}, "min_elapsed"),
        ({"guided_weight": -1.0}, "guided_weight"),
        ({"objective": "distill", "num_inference_steps": 2}, "num_inference_steps"),
    ],
)
def test_bad_settings_are_named(config, named):
    with pytest.raises(ValueError, match=named):
        SlimFlowConfig(**config)
