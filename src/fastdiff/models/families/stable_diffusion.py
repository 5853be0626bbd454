"""Stable Diffusion 1.x and 2.x: one CLIP text encoder and a UNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastdiff.models.conditioning import Conditioning
from fastdiff.models.families.base import Family

UNET_LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
"""The target modules of the published LCM and DMD2 LoRAs for SD UNets."""


class StableDiffusion(Family):
    """`StableDiffusionPipeline`; unconditional means the encoding of the empty prompt."""

    name = "stable-diffusion"
    pipeline_classes = ("StableDiffusionPipeline",)
    network_name = "unet"
    lora_targets = UNET_LORA_TARGETS
    attention_targets = ("to_q", "to_k", "to_v", "to_out.0")
    kohya_file = True

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], resolution: int) -> Conditioning:
        embeds, _ = pipeline.encode_prompt(list(prompts), pipeline.text_encoder.device, 1, False)
        return Conditioning({"prompt_embeds": embeds})

    def null(self, pipeline: Any, resolution: int) -> Conditioning:
        return self.encode_prompts(pipeline, [""], resolution)

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Conditioning, **inputs: Any) -> Tensor:
        embeds = cond.tensors["prompt_embeds"]
        return network(x_t, time, encoder_hidden_states=embeds, return_dict=False, **inputs)[0]

    def conditioning_shapes(
        self, network: nn.Module, text_encoders: Sequence[Mapping[str, Any]]
    ) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (text_encoders[0]["max_position_embeddings"], text_encoders[0]["hidden_size"])}

    def feature_taps(self, network: nn.Module) -> dict[str, int]:
        return unet_feature_taps(network)

    def middle_taps(self, network: nn.Module) -> dict[str, int]:
        return unet_middle_taps(network)


def unet_feature_taps(network: nn.Module) -> dict[str, int]:
    """Every level of a conditional UNet: name -> channels, from the first down block to the last up block."""
    widths = network.config.block_out_channels
    down = {f"down_blocks.{level}": width for level, width in enumerate(widths)}
    up = {f"up_blocks.{level}": width for level, width in enumerate(reversed(widths))}
    return down | {"mid_block": widths[-1]} | up


def unet_middle_taps(network: nn.Module) -> dict[str, int]:
    """The middle block of a conditional UNet."""
    return {"mid_block": network.config.block_out_channels[-1]}
