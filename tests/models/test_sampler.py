"""A student's sampler equals the stock scheduler it is saved as; the saved config alone gives the trained times."""

import json

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.schedules import FlowSchedule, schedule_from_config
from fastdiff.models.sampler import SamplerSpec, sample

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TEACHER = dict(EulerDiscreteScheduler(**BETAS).config)
FLOW = dict(FlowMatchEulerDiscreteScheduler().config) | {"_class_name": "FlowMatchEulerDiscreteScheduler"}

# What LCMScheduler(original_inference_steps=1000), the 50-step LCM grid and trailing DDIM print in diffusers 0.42.1.
GRIDS = [
    (SamplerSpec("lcm", (999, 749, 499, 249)), LCMScheduler, {"original_inference_steps": 1000}),
    (SamplerSpec("lcm", (999, 759, 499, 259)), LCMScheduler, {"original_inference_steps": 50}),
    (SamplerSpec.lcm_grid(2), LCMScheduler, {"original_inference_steps": 50}),
    (SamplerSpec("lcm", (399,)), LCMScheduler, {"num_train_timesteps": 400}),
    (SamplerSpec("lcm", (999, 874, 749, 624, 499, 374, 249, 124)), LCMScheduler, {"original_inference_steps": 1000}),
    (SamplerSpec("ddim", (999, 749, 499, 249)), DDIMScheduler, {"timestep_spacing": "trailing"}),
    (SamplerSpec("ddim", (399,)), DDIMScheduler, {"num_train_timesteps": 400}),
    (SamplerSpec("ddim", (998, 665, 332)), DDIMScheduler, {"num_train_timesteps": 999}),
    (SamplerSpec("ddim", (625, 312)), DDIMScheduler, {"num_train_timesteps": 626}),
    (SamplerSpec("tcd", (999, 749, 499, 249)), TCDScheduler, {"original_inference_steps": 1000}),
    (SamplerSpec("tcd", (999, 759, 499, 259), eta=0.3), TCDScheduler, {"original_inference_steps": 50}),
    (SamplerSpec("tcd", (999, 499), eta=1.0), TCDScheduler, {"original_inference_steps": 1000}),
    (SamplerSpec("tcd", (999,), eta=0.5), TCDScheduler, {"original_inference_steps": 1000}),
]


def reload(scheduler, folder):
    scheduler.save_pretrained(folder)
    return type(scheduler).from_pretrained(folder)


@pytest.mark.parametrize(("spec", "stock", "settings"), GRIDS, ids=lambda value: str(getattr(value, "timesteps", "")))
def test_saved_config_gives_trained_times(spec, stock, settings, tmp_path):
    scheduler = reload(spec.build_scheduler(TEACHER, "epsilon"), tmp_path)
    scheduler.set_timesteps(len(spec))
    assert type(scheduler) is stock
    assert scheduler.timesteps.tolist() == list(spec.timesteps)
    assert {key: scheduler.config[key] for key in settings} == settings
    expected = DDIMScheduler(**BETAS).alphas_cumprod[: len(scheduler.alphas_cumprod)]
    assert torch.equal(scheduler.alphas_cumprod, expected)


def test_named_grids_are_the_published_ones():
    assert SamplerSpec.trailing("lcm", 4).timesteps == (999, 749, 499, 249)
    assert SamplerSpec.trailing("lcm", 1, start=399).timesteps == (399,)
    assert SamplerSpec.trailing("ddim", 8).timesteps == (999, 874, 749, 624, 499, 374, 249, 124)
    assert SamplerSpec.trailing("flow", 4).timesteps == (1000, 750, 500, 250)
    assert SamplerSpec.lcm_grid(4).timesteps == (999, 759, 499, 259)


@pytest.mark.parametrize("kind", ["lcm", "ddim", "flow", "tcd"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 7, 8])
def test_every_trailing_grid_can_be_saved(kind, steps):
    spec = SamplerSpec.trailing(kind, steps)
    scheduler = spec.build_scheduler(TEACHER, "flow" if kind == "flow" else "epsilon")
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == pytest.approx(spec.timesteps, abs=1e-3)


@pytest.mark.parametrize(
    ("spec", "prediction_type", "match"),
    [
        (SamplerSpec("lcm", (999, 625, 249)), "epsilon", r"nearest.*\[999, 666, 333\]"),
        (SamplerSpec("ddim", (999, 666, 332)), "epsilon", r"nearest.*\[998, 665, 332\]"),
        (SamplerSpec("lcm", (1200,)), "epsilon", "table of 1000"),
        (SamplerSpec("lcm", (999, 749), original_inference_steps=50), "epsilon", "original_inference_steps=50"),
        (SamplerSpec("lcm", (999,)), "flow", "'flow' sampler"),
        (SamplerSpec("flow", (1000,)), "epsilon", "'flow' sampler"),
        (SamplerSpec("flow", (1000, 900, 100)), "flow", "shift 1"),
        (SamplerSpec("tcd", (999,)), "flow", "'lcm' or 'ddim'"),
        (SamplerSpec("ddim", (999,), tells_end=True), "epsilon", "where each step ends"),
    ],
)
def test_impossible_samplers_are_refused_with_the_reason(spec, prediction_type, match):
    with pytest.raises(ValueError, match=match):
        spec.build_scheduler(TEACHER, prediction_type)


def test_zero_terminal_snr_needs_another_prediction():
    config = TEACHER | {"rescale_betas_zero_snr": True}
    with pytest.raises(ValueError, match="zero terminal SNR"):
        SamplerSpec("lcm", (999,)).build_scheduler(config, "epsilon")
    scheduler = SamplerSpec("lcm", (999,)).build_scheduler(config, "v_prediction")
    assert scheduler.alphas_cumprod[-1] == DDIMScheduler(**BETAS, rescale_betas_zero_snr=True).alphas_cumprod[-1]


def test_config_without_betas_is_refused():
    with pytest.raises(ValueError, match="beta_start"):
        SamplerSpec("lcm", (999,)).build_scheduler({"num_train_timesteps": 1000}, "epsilon")


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "dpm", "timesteps": (999,)},
        {"kind": "lcm", "timesteps": ()},
        {"kind": "lcm", "timesteps": (249, 999)},
        {"kind": "lcm", "timesteps": (999, 0)},
        {"kind": "lcm", "timesteps": (999.5,)},
        {"kind": "lcm", "timesteps": (float("nan"),)},
        {"kind": "lcm", "timesteps": (999,), "guidance_scale": -1.0},
        {"kind": "ddim", "timesteps": (999,), "original_inference_steps": 50},
        {"kind": "ddim", "timesteps": (999,), "eta": 0.3},
        {"kind": "tcd", "timesteps": (999,), "eta": 1.5},
    ],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError):
        SamplerSpec(**settings)


@pytest.mark.parametrize("spec", [case[0] for case in GRIDS] + [SamplerSpec.trailing("flow", 4)], ids=str)
def test_dictionary_round_trip_through_json(spec):
    assert SamplerSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_unknown_dictionary_key_is_refused():
    with pytest.raises(ValueError, match="steps"):
        SamplerSpec.from_dict({"kind": "lcm", "timesteps": [999], "steps": 1})


def stock_sample(scheduler, steps, native, noise, seed, **call):
    """The loop of a diffusers pipeline without guidance; these schedulers scale neither the noise nor the input."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    x = noise
    for t in scheduler.timesteps:
        noisy = isinstance(scheduler, LCMScheduler | TCDScheduler | FlowMatchEulerDiscreteScheduler)
        extra = {"generator": generator} if noisy else {}
        x = scheduler.step(native(x, t.expand(len(x))), t, x, **extra, **call).prev_sample
    return x


def in_process_sample(spec, kind, native, noise, schedule, seed):
    generator = torch.Generator().manual_seed(seed)
    return sample(
        spec,
        lambda x, t, s: Prediction(native(x, schedule.network_time(t)), kind, x, t, schedule),
        noise,
        lambda step: torch.randn(noise.shape, generator=generator, dtype=noise.dtype),
        schedule,
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spec", [case[0] for case in GRIDS] + [SamplerSpec("lcm", (39, 19))], ids=str)
def test_equals_the_stock_scheduler_on_a_network(spec, kind, tiny_sd):
    schedule = schedule_from_config(TEACHER)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    context = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(4))

    @torch.no_grad()
    def native(x, t):
        return tiny_sd.unet(x, t, encoder_hidden_states=context, return_dict=False)[0]

    eta = {"eta": spec.eta} if spec.kind == "tcd" else {}
    expected = stock_sample(spec.build_scheduler(TEACHER, kind), len(spec), native, noise, seed=5, **eta)
    actual = in_process_sample(spec, kind, native, noise, schedule, seed=5)
    assert (actual - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("spec", [SamplerSpec.trailing("lcm", 4), SamplerSpec.trailing("ddim", 4)], ids=str)
def test_equals_the_stock_scheduler_on_a_gaussian(spec):
    """Data N(m, s^2): E[x0 | x_t] = m + a s^2 (x_t - a m) / (a^2 s^2 + b^2), so that eps is known in closed form."""
    schedule = schedule_from_config(TEACHER)
    mean, variance = 0.7, 0.25

    def native(x, t):
        alpha, sigma = schedule.levels(t, x)
        x0 = mean + alpha * variance * (x - alpha * mean) / (alpha**2 * variance + sigma**2)
        return (x - alpha * x0) / sigma

    noise = torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = stock_sample(spec.build_scheduler(TEACHER, "epsilon"), len(spec), native, noise, seed=1)
    actual = in_process_sample(spec, "epsilon", native, noise, schedule, seed=1)
    assert (actual - expected).abs().max() < 1e-5
    assert actual.dtype == torch.float64


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_flow_equals_the_stock_scheduler(steps):
    spec = SamplerSpec.trailing("flow", steps)
    schedule = FlowSchedule()

    def native(x, t):
        return torch.tanh(x) * (t.view(-1, 1) / 1000)

    noise = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    scheduler = spec.build_scheduler({}, "flow")
    assert type(scheduler) is FlowMatchEulerDiscreteScheduler
    expected = stock_sample(scheduler, steps, native, noise, seed=0)
    assert torch.allclose(in_process_sample(spec, "flow", native, noise, schedule, seed=0), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["lcm", "ddim"])
@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (2, 1.0), (4, 1.0), (8, 1.0), (1, 3.0), (2, 3.0)])
def test_indices_on_a_flow_equal_the_stock_scheduler(kind, steps, shift, tmp_path):
    spec, schedule = SamplerSpec.trailing(kind, steps), FlowSchedule(shift)
    fed = []

    def native(x, t):
        fed.append(float(t[0]))
        return torch.tanh(x) * (t.view(-1, 1) / 1000)

    noise = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    scheduler = reload(spec.build_scheduler(FLOW | {"shift": shift}, "flow"), tmp_path)
    assert type(scheduler) is FlowMatchEulerDiscreteScheduler
    assert scheduler.config.stochastic_sampling == (kind == "lcm")
    expected = stock_sample(scheduler, steps, native, noise, seed=0)
    assert torch.allclose(in_process_sample(spec, "flow", native, noise, schedule, seed=0), expected, atol=1e-5)
    unshifted = [(steps - i) / steps for i in range(steps)]
    assert fed == pytest.approx([1000 * shift * u / (1 + (shift - 1) * u) for u in unshifted] * 2, abs=1e-2)


def test_a_shifted_flow_of_four_steps_has_no_stock_config():
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler"):
        SamplerSpec.trailing("ddim", 4).build_scheduler(FLOW | {"shift": 3.0}, "flow")


@pytest.mark.parametrize("kind", ["lcm", "ddim"])
def test_levels_that_no_config_holds_are_passed_to_the_pipeline(kind, tmp_path):
    config, schedule = FLOW | {"shift": 3.0}, FlowSchedule(3.0)
    spec = SamplerSpec.trailing(kind, 4).storable(config, schedule)
    assert spec.sigmas == pytest.approx((1.0, 0.9, 0.75, 0.5))
    assert SamplerSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    scheduler = reload(spec.build_scheduler(config, "flow", schedule), tmp_path)
    scheduler.set_timesteps(sigmas=spec.call_arguments()["sigmas"])
    assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])


@pytest.mark.parametrize("spec", [SamplerSpec.trailing("lcm", 4), SamplerSpec.trailing("flow", 4)], ids=str)
def test_pipelines_that_give_evenly_spaced_levels_need_no_more(spec, tmp_path):
    """Whatever the resolution made of the shift, the saved one is static."""
    config, schedule = FLOW | {"use_dynamic_shifting": True}, FlowSchedule(1.9)
    assert spec.storable(config, schedule, gives_levels=True) == spec
    scheduler = reload(spec.build_scheduler(config, "flow", schedule, gives_levels=True), tmp_path)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.7)
    shift = 1.9 if spec.kind == "lcm" else 1.0
    expected = [shift * u / (1 + (shift - 1) * u) for u in (1.0, 0.75, 0.5, 0.25)]
    assert scheduler.sigmas.tolist()[:-1] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("spec", "ends"),
    [
        (SamplerSpec("ddim", (999, 499)), [499.0, -1.0]),
        (SamplerSpec("lcm", (999, 499)), [-1.0, -1.0]),
        (SamplerSpec("tcd", (999, 499)), [499.0, 0.0]),
        (SamplerSpec("tcd", (999, 499), eta=0.3), [349.0, 0.0]),
        (SamplerSpec("tcd", (999, 499), eta=1.0), [0.0, 0.0]),
    ],
    ids=str,
)
def test_students_are_told_where_their_own_step_ends(spec, ends):
    schedule, told = schedule_from_config(TEACHER), []

    def predict(x, t, s):
        told.append(s.tolist())
        return Prediction.from_x0(torch.ones_like(x), x, t, schedule)

    sample(spec, predict, torch.zeros(2, 2), lambda step: torch.zeros(2, 2), schedule)
    assert told == [[end, end] for end in ends]


def test_pipelines_are_called_with_eta_where_it_counts():
    assert SamplerSpec.trailing("tcd", 4).call_arguments() == {"num_inference_steps": 4}
    assert SamplerSpec("tcd", (999, 499), eta=0.3).call_arguments() == {"num_inference_steps": 2, "eta": 0.3}


def test_one_step_at_399_equals_explicit_times(tiny_sd):
    """The shortened beta table is exactly LCMScheduler with timesteps=[399]."""
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    call = {"prompt": "ab", "latents": noise, "guidance_scale": 0.0, "output_type": "latent"}
    tiny_sd.scheduler = LCMScheduler(**BETAS)
    explicit = tiny_sd(timesteps=[399], **call).images
    tiny_sd.scheduler = SamplerSpec("lcm", (399,)).build_scheduler(TEACHER, "epsilon")
    assert torch.equal(tiny_sd(num_inference_steps=1, **call).images, explicit)


def test_fresh_noise_is_needed_between_steps_only():
    schedule = schedule_from_config(TEACHER)
    drawn = []

    def step_noise(step):
        drawn.append(step)
        return torch.zeros(1, 2)

    predict = lambda x, t, s: Prediction.from_x0(torch.ones_like(x), x, t, schedule)  # noqa: E731
    out = sample(SamplerSpec.trailing("lcm", 4), predict, torch.zeros(1, 2), step_noise, schedule)
    assert drawn == [0, 1, 2]
    assert torch.allclose(out, torch.ones(1, 2), atol=1e-6)
