"""Transformer families: a sample of the stock pipeline, from prompts to latents, is ours by encode, call and guide."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_transformers import BUILDERS, build

from fastdiff.diffusion.schedules import FlowSchedule
from fastdiff.models.denoiser import Ask, Denoiser
from fastdiff.models.families import family_of
from fastdiff.models.families.transformer import pack, unpack
from fastdiff.models.roles import AdapterSpec, Roles
from fastdiff.models.sampler import SamplerSpec, sample
from fastdiff.models.teacher import Teacher

NAMES = [builder.__name__ for builder in BUILDERS]
PROMPTS = ("a red apple", "b")
PIXELS = 32


@pytest.fixture(scope="module")
def originals():
    return {}


@pytest.fixture
def pipeline(request, originals):
    name = request.param
    if name not in originals:
        originals[name] = build(name)
    return copy.deepcopy(originals[name])


every = pytest.mark.parametrize("pipeline", NAMES, indirect=True)


def denoiser_of(teacher: Teacher, specs=None, checkpointing: bool = False) -> Denoiser:
    roles = Roles(teacher.network, specs or {}, checkpointing)
    return Denoiser(roles, teacher.family, teacher.schedule_at(PIXELS), teacher.prediction_type)


def noise(rows: int = 2, side: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 4, side, side, generator=torch.Generator().manual_seed(seed))


def stock_sample(pipeline, steps: int, z: torch.Tensor, **call):
    family = family_of(type(pipeline).__name__)
    layout = family.sampling_arguments(family.encode_prompts(pipeline, PROMPTS, PIXELS), z, PIXELS)
    kept = {name: layout[name] for name in ("latents", "height", "width", "use_resolution_binning") if name in layout}
    made = pipeline(list(PROMPTS), num_inference_steps=steps, output_type="latent", **kept, **call).images
    return family.sampled(made, z)


def our_sample(teacher: Teacher, steps: int, z: torch.Tensor, w: float | None) -> torch.Tensor:
    """Euler along the times that the stock run has just used."""
    spec = SamplerSpec.trailing("ddim", steps)
    if teacher.prediction_type == "flow":
        spec = SamplerSpec("flow", tuple(teacher.pipeline.scheduler.timesteps.tolist()))
    denoiser, cond, null = denoiser_of(teacher), teacher.encode(PROMPTS, PIXELS), teacher.null(PIXELS)
    with torch.no_grad():
        return sample(
            spec, lambda x, t, s: denoiser(x, t, cond, "teacher", null, w), z, lambda step: z, denoiser.schedule
        )


GUIDED = {
    "stable_diffusion_3": {"guidance_scale": 4.0},
    "pixart_sigma": {"guidance_scale": 4.0},
    "flux": {"guidance_scale": 4.0},
    "flux_schnell": {"true_cfg_scale": 4.0, "negative_prompt": ["", ""]},
    "sana": {"guidance_scale": 4.0},
    "z_image": {"guidance_scale": 3.0},
}
PLAIN = {key: {"guidance_scale": 0.0} for key in NAMES} | {"flux": {}, "qwen_image": {}}


@every
def test_a_sample_is_the_stock_pipelines(pipeline, request):
    name = request.node.callspec.params["pipeline"]
    teacher, z = Teacher(pipeline), noise()
    expected = stock_sample(pipeline, 2, z, **PLAIN[name])
    torch.testing.assert_close(our_sample(teacher, 2, z, None), expected, rtol=1e-4, atol=1e-4)
    if name in GUIDED:
        guided = stock_sample(pipeline, 2, z, **GUIDED[name])
        assert (guided - expected).abs().max() > 1e-2
        torch.testing.assert_close(our_sample(teacher, 2, z, 4.0), guided, rtol=1e-4, atol=1e-4)


def test_qwen_guidance_is_the_stock_one_but_for_its_norm():
    pipeline, z = build("qwen_image"), noise()
    teacher = Teacher(pipeline)
    stock = stock_sample(pipeline, 1, z, true_cfg_scale=4.0, negative_prompt=[" ", " "])
    denoiser, cond, null = denoiser_of(teacher), teacher.encode(PROMPTS, PIXELS), teacher.null(PIXELS)
    plain, guided = (pack(denoiser(z, torch.ones(2), cond, "teacher", null, w).native.detach()) for w in (None, 4.0))
    rescaled = guided * plain.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(z - unpack(rescaled, z), stock, rtol=1e-4, atol=1e-4)


@every
def test_prompts_of_different_lengths_do_not_change_each_other(pipeline):
    teacher, x, t = Teacher(pipeline), noise(), torch.tensor([0.3, 0.7])
    t = t if teacher.prediction_type == "flow" else (999 * t).round()
    denoiser, both = denoiser_of(teacher), teacher.encode(PROMPTS, PIXELS)
    assert {key: value.shape[1:] for key, value in both.tensors.items()} == {
        key: value.shape[1:] for key, value in teacher.null(PIXELS).tensors.items()
    }
    with torch.no_grad():
        together = denoiser(x, t, both, "teacher").native
        for row in (0, 1):
            alone = denoiser(
                x[row : row + 1], t[row : row + 1], teacher.encode(PROMPTS[row : row + 1], PIXELS), "teacher"
            )
            torch.testing.assert_close(together[row : row + 1], alone.native, rtol=1e-4, atol=1e-4)
    assert together.shape == x.shape


@pytest.mark.parametrize("pixels", [32, 48])
@pytest.mark.parametrize("pipeline", ["flux", "qwen_image", "z_image", "stable_diffusion_3"], indirect=True)
def test_the_shift_is_the_pipelines_at_that_resolution(pipeline, pixels):
    if "StableDiffusion3" in type(pipeline).__name__:
        pipeline.scheduler = type(pipeline.scheduler)(use_dynamic_shifting=True, max_shift=1.16)
    given = type(pipeline).__name__ != "StableDiffusion3Pipeline"
    pipeline("b", num_inference_steps=3, height=pixels, width=pixels, output_type="latent")
    schedule = Teacher(pipeline).schedule_at(pixels)
    assert isinstance(schedule, FlowSchedule)
    grid = torch.linspace(1, 1 / 3 if given else pipeline.scheduler.sigma_min, 3)
    torch.testing.assert_close(schedule.shifted(grid), pipeline.scheduler.sigmas[:-1], rtol=1e-5, atol=1e-6)
    if "Flux" in type(pipeline).__name__:
        assert schedule.shift != Teacher(pipeline).schedule_at(64).shift


def test_sana_is_read_from_a_solver_of_flows():
    from diffusers import DPMSolverMultistepScheduler

    pipeline = build("sana")
    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    pipeline.scheduler = DPMSolverMultistepScheduler(**settings)
    teacher = Teacher(pipeline)
    assert (teacher.prediction_type, teacher.schedule.shift) == ("flow", 3.0)


@every
def test_images_become_latents_and_back_as_in_the_pipeline(pipeline):
    teacher = Teacher(pipeline)
    images = 2 * torch.rand(2, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(1)) - 1
    latents = teacher.encode_images(images)
    assert latents.shape == (2, *teacher.latent_shape(PIXELS))
    layout = teacher.family.sampling_arguments(teacher.encode(PROMPTS, PIXELS), latents, PIXELS)
    z = layout["latents"]
    pipeline.scheduler.step = lambda output, t, x, **_: (z,)  # ends where it began, so that the pipeline decodes z
    stock = pipeline(
        list(PROMPTS), num_inference_steps=1, output_type="pt",
        **{name: value for name, value in layout.items() if "prompt" not in name},
    ).images  # fmt: skip
    torch.testing.assert_close(teacher.decode(latents), 2 * stock - 1, rtol=1e-4, atol=1e-4)
    token = PIXELS // 16 * teacher.family.patch(teacher.network)
    with pytest.raises(ValueError, match=f"multiple of {token} "):
        teacher.latent_shape(PIXELS + 1)


@every
def test_taps_are_maps_of_image_tokens(pipeline):
    teacher = Teacher(pipeline)
    denoiser = denoiser_of(teacher, {"student": AdapterSpec(2, 2, teacher.family.lora_targets)}, True)
    cond = teacher.encode(PROMPTS, PIXELS)
    taps = teacher.family.feature_taps(teacher.network)
    assert set(teacher.family.middle_taps(teacher.network)) <= set(taps) and len(taps) == 2
    x = noise().requires_grad_(True)
    t = torch.full((2,), 0.5 if teacher.prediction_type == "flow" else 499.0)
    maps = denoiser.features(x, t, cond, "student", tuple(taps))
    side = 16 // teacher.family.patch(teacher.network)
    assert [tuple(one.shape) for one in maps] == [(2, width, side, side) for width in taps.values()]
    # A change of one corner of the input is largest at that corner of the map.
    moved = x.detach().clone()
    moved[:, :, :2, :2] += 1
    with torch.no_grad():
        change = (denoiser.features(moved, t, cond, "student", tuple(taps))[0] - maps[0]).abs().sum(1)
    place = change.flatten(1).argmax(1)
    assert (place // side < 3).all() and (place % side < 3).all()
    # Gradients are those of a network that keeps its activations, also where the forward was left early.
    checkpointed = torch.autograd.grad(sum(one.square().mean() for one in maps), x)[0]
    teacher.network.disable_gradient_checkpointing()
    kept = denoiser.features(x, t, cond, "student", tuple(taps))
    torch.testing.assert_close(
        checkpointed, torch.autograd.grad(sum(one.square().mean() for one in kept), x)[0], rtol=1e-4, atol=1e-6
    )
    assert checkpointed.abs().max() > 0


@every
def test_a_checkpointed_block_is_recomputed_under_its_role(pipeline):
    """Gradients of adapters with and without checkpointing, while another role runs before backward."""
    teacher = Teacher(pipeline)
    spec = AdapterSpec(2, 2, teacher.family.lora_targets)
    denoiser = denoiser_of(teacher, {"student": spec, "fake_score": spec}, True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for role in ("student", "fake_score"):
            for parameter in denoiser.roles.parameters(role):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    cond, x = teacher.encode(PROMPTS, PIXELS), noise()
    t = torch.full((2,), 0.5 if teacher.prediction_type == "flow" else 499.0)

    def gradients():
        output = denoiser(x, t, cond, "student").native
        denoiser.together(x, t, [Ask("fake_score", cond), Ask("teacher", cond)])
        return torch.autograd.grad(output.square().mean(), denoiser.roles.parameters("student"), allow_unused=True)

    checkpointed = gradients()
    teacher.network.disable_gradient_checkpointing()
    for (name, _), a, b in zip(denoiser.roles.named_parameters("student"), checkpointed, gradients()):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_roles_share_one_call_with_embedded_guidance():
    """Rows of a batched call are told their own guidance; nothing is asked twice."""
    teacher = Teacher(build("flux"))
    spec = AdapterSpec(2, 2, teacher.family.lora_targets)
    denoiser = denoiser_of(teacher, {"fake_score": spec})
    cond, null, x, t = teacher.encode(PROMPTS, PIXELS), teacher.null(PIXELS), noise(), torch.full((2,), 0.5)
    w = torch.tensor([2.0, 7.0])
    guided, unguided = denoiser.together(x, t, [Ask("teacher", cond, null, w), Ask("fake_score", cond)])
    assert denoiser.calls == 4
    direct = teacher.family.call
    with torch.no_grad():
        torch.testing.assert_close(guided.native, direct(teacher.network, x, 1000 * t, cond, guidance=w))
        told = torch.full((2,), 3.5)
        torch.testing.assert_close(unguided.native, direct(teacher.network, x, 1000 * t, cond, guidance=told))


def test_packing_is_undone():
    x = noise(side=6)
    from diffusers import FluxPipeline

    assert torch.equal(pack(x), FluxPipeline._pack_latents(x, 2, 4, 6, 6))
    assert torch.equal(unpack(pack(x), x), x)
    assert F.mse_loss(unpack(pack(x)[:, :, torch.randperm(16)], x), x) > 0
