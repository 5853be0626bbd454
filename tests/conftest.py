"""Tiny random pipelines, built offline; every test that needs a diffusers pipeline takes one from here."""

from __future__ import annotations

import copy
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tiny_parts import BETAS, clip_text_config, clip_tokenizer

torch.set_num_threads(1)


def _autoencoder():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )


def _unet(**overrides):
    from diffusers import UNet2DConditionModel

    settings = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**(settings | overrides))


def _scheduler():
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        **BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing"
    )


def build_tiny_sd(seed: int = 0, **unet_overrides):
    """A random Stable Diffusion pipeline: 32 px images, 4 x 16 x 16 latents, about 0.2 M weights."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    pipeline = StableDiffusionPipeline(
        vae=_autoencoder().eval(),
        text_encoder=CLIPTextModel(clip_text_config(len(tokenizer))).eval(),
        tokenizer=tokenizer,
        unet=_unet(**unet_overrides).eval(),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_tiny_sdxl(seed: int = 0):
    """A random SDXL pipeline with two text encoders and time ids: 32 px images, 4 x 16 x 16 latents."""
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    unet = _unet(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        transformer_layers_per_block=1,
        use_linear_projection=True,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=_autoencoder().eval(),
        text_encoder=CLIPTextModel(clip_text_config(len(tokenizer))).eval(),
        text_encoder_2=CLIPTextModelWithProjection(clip_text_config(len(tokenizer))).eval(),
        tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(),
        unet=unet.eval(),
        scheduler=_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def _sd_original():
    return build_tiny_sd()


@pytest.fixture(scope="session")
def _sdxl_original():
    return build_tiny_sdxl()


@pytest.fixture
def tiny_sd(_sd_original):
    return copy.deepcopy(_sd_original)


@pytest.fixture
def tiny_sdxl(_sdxl_original):
    return copy.deepcopy(_sdxl_original)


@pytest.fixture(scope="session")
def tiny_sd_folder(_sd_original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "sd"
    _sd_original.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sdxl_folder(_sdxl_original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "sdxl"
    _sdxl_original.save_pretrained(folder)
    return folder
