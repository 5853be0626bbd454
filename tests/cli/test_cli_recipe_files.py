"""The recipes that ship: they parse, fit their methods, and fit the full-size networks (on the meta device)."""

import dataclasses
from pathlib import Path

import pytest
import torch

from fastdiff.engine import Settings
from fastdiff.methods import method_named
from fastdiff.models.families import StableDiffusion
from fastdiff.models.roles import AdapterSpec, FullSpec, Roles
from fastdiff.recipes import resolve

TRAINING = Path(__file__).resolve().parents[2] / "training"
RECIPES = sorted((TRAINING / "recipes").glob("*/*.yaml"))
COMMON = {"sample_size": 64, "layers_per_block": 2, "block_out_channels": (320, 640, 1280, 1280)}
SD15 = COMMON | {"cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# Published sizes: the UNets, and the rank-64 LCM-LoRAs of arXiv 2311.05556 (67.5M and 197M).
NETWORKS = {"sd15": (SD15, 859_520_964, 67.5e6), "sdxl": (SDXL, 2_567_463_684, 197e6)}


def name(path):
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipe_builds_its_method(path):
    recipe = resolve({}, path)
    settings = recipe.build(Settings)
    method = method_named(recipe.method)
    built = method(method.Config(**{k: recipe.values[k] for k in method.Config.__dataclass_fields__}))
    assert settings.student in method.info.student_kinds
    assert settings.output_dir.startswith("runs/")
    assert len(built.sampler()) in (1, 4, 25, 50)  # the last two replace guidance alone
    assert path.stem.startswith(recipe.method)


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipe_samplers_bake_into_stock_schedulers(path):
    recipe = resolve({}, path)
    method = method_named(recipe.method)
    sampler = method(recipe.build(method.Config)).sampler()
    sampler = dataclasses.replace(sampler, tells_end=False)  # which an export makes part of the weights
    betas = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = sampler.build_scheduler(betas, "epsilon")
    scheduler.set_timesteps(len(sampler))
    assert scheduler.timesteps.tolist() == list(sampler.timesteps)


@pytest.mark.parametrize("kind", NETWORKS)
def test_full_size_networks_take_the_adapters(kind):
    from diffusers import UNet2DConditionModel

    config, parameters, lora_parameters = NETWORKS[kind]
    with torch.device("meta"):
        network = UNet2DConditionModel(**config)
        assert sum(p.numel() for p in network.parameters()) == parameters
        recipe = resolve({}, TRAINING / "recipes" / kind / "lcm_lora.yaml")
        spec = AdapterSpec(recipe.values["lora_rank"], recipe.values["lora_alpha"], StableDiffusion.lora_targets)
        roles = Roles(network, {"student": spec, "fake_score": AdapterSpec(4, 4.0, StableDiffusion.lora_targets)})
    trained = sum(p.numel() for p in roles.parameters("student"))
    assert trained == pytest.approx(lora_parameters, rel=0.005)
    assert {p.device.type for p in roles.parameters("fake_score")} == {"meta"}


def test_full_student_of_sd15_has_the_guidance_input():
    from diffusers import UNet2DConditionModel

    recipe = resolve({}, TRAINING / "recipes" / "sd15" / "lcm.yaml")
    method = method_named("lcm")
    with torch.device("meta"):
        network = UNet2DConditionModel(**SD15)
        widened = method(recipe.build(method.Config)).student_network(network)
        roles = Roles(network, {"student": FullSpec(widened)})
    assert sum(p.numel() for p in roles.parameters("student")) == 859_520_964 + 256 * 320


@pytest.mark.parametrize("script", sorted(TRAINING.glob("train_*.py")), ids=lambda path: path.stem)
def test_scripts_are_thin(script):
    assert len(script.read_text().splitlines()) <= 60
