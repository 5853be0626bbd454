"""What `train_unet.py --flow` trains instead of the UNet: a tiny SD3 transformer by rectified flow.

x_t = (1 - t) x_0 + t noise, the network says noise - x_0 (Liu et al. 2022, arXiv 2209.03003); t is logit-normal as in
SD3 (Esser et al. 2024, arXiv 2403.03206).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

from fastdiff.diffusion.schedules import FlowSchedule
from fastdiff.models.embedded import flow_pipeline
from fastdiff.models.families.stable_diffusion_3 import T5_TOKENS
from fastdiff.models.repeated_context import count_last_token

TIMESTEPS = 1000


def build(latent_channels: int) -> SD3Transformer2DModel:
    """Six joint blocks of width 128 on 16 tokens of 2 x 2 cells; gates and output begin at zero (adaLN-Zero)."""
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=256,
        caption_projection_dim=128,
        pooled_projection_dim=256,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1_context.linear.weight)
    torch.nn.init.zeros_(model.norm_out.linear.weight)
    torch.nn.init.zeros_(model.proj_out.weight)
    return model


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """No shift: at 16 tokens nothing asks for one."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS, shift=1.0)


class Flow:
    """Training pairs of rectified flow, and text as SD3's pipeline gives it.

    `settings.flow` is a Stable Diffusion pipeline folder, whose autoencoder and text encoder serve the new pipeline.
    """

    stage = "flow transformer"
    checked = (100, 300, 500, 700, 900)
    inputs = ("encoder_hidden_states", "pooled_projections")

    def __init__(self, settings: argparse.Namespace):
        self.settings, parts = settings, settings.flow
        self.pipeline = flow_pipeline(parts, build(8), scheduler())

    def build(self, latent_channels: int) -> SD3Transformer2DModel:
        model = build(latent_channels)
        if self.settings.init_from:
            model = SD3Transformer2DModel.from_pretrained(self.settings.init_from).float()
        count_last_token(model, T5_TOKENS)  # `embed` gives one row for all
        return model

    @torch.no_grad()
    def embed(self, captions: list[str]) -> dict[str, torch.Tensor]:
        rows = [self._embed(captions[i : i + 500]) for i in range(0, len(captions), 500)]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _embed(self, captions: list[str]) -> dict[str, torch.Tensor]:
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            captions, None, None, do_classifier_free_guidance=False, max_sequence_length=1
        )
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled}

    def pairs(self, clean, text, generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noisy latents, timesteps 0..1000, velocities, and the weight (B,) of each error: 1."""
        offsets = torch.rand(len(clean), generator=generator)
        share = (torch.randperm(len(clean), generator=generator) + offsets) / len(clean)
        t = torch.special.ndtri(share.clamp(1e-4, 1 - 1e-4)).sigmoid()
        noise = torch.randn(clean.shape, generator=generator)
        noisy, steps, velocity = self.at(clean, noise, TIMESTEPS * t)
        return noisy, steps, velocity, torch.ones(len(clean))

    def at(self, clean, noise, steps) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noisy latents at given timesteps, these, and what is to be said there."""
        return FlowSchedule().add_noise(clean, noise, steps / TIMESTEPS), steps, noise - clean

    def assemble(self, model: SD3Transformer2DModel, output: Path) -> None:
        """A whole pipeline folder, parts included."""
        bare = SD3Transformer2DModel.from_config(model.config)
        bare.load_state_dict(model.state_dict())
        self.pipeline.register_modules(transformer=bare)
        self.pipeline.save_pretrained(output)
