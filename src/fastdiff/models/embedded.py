"""The teachers that ship: `embedded`, a Stable Diffusion pipeline, and `embedded-flow`, an SD3 pipeline on its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

ASSETS = Path(__file__).resolve().parents[1] / "assets"
EMBEDDED = "embedded"
EMBEDDED_FLOW = "embedded-flow"
SHIPPED = {EMBEDDED: ASSETS / "teacher", EMBEDDED_FLOW: ASSETS / "flow_teacher"}
"""Folders by name; that of `embedded-flow` has only what is its own."""


def embedded_flow(dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline of `embedded-flow`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    own = SHIPPED[EMBEDDED_FLOW]
    transformer = SD3Transformer2DModel.from_pretrained(own / "transformer", torch_dtype=dtype)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(own / "scheduler")
    return flow_pipeline(SHIPPED[EMBEDDED], transformer, scheduler, dtype)


def flow_pipeline(parts: Path, transformer: nn.Module, scheduler: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A `StableDiffusion3Pipeline` without T5, whose other parts are those of a Stable Diffusion pipeline folder.

    Its one CLIP text encoder serves as both of SD3's, with the identity as projection of the pooled state.
    """
    from diffusers import AutoencoderTiny, StableDiffusion3Pipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    text = CLIPTextModel.from_pretrained(parts / "text_encoder", dtype=dtype)
    encoder = CLIPTextModelWithProjection(text.config).to(dtype).eval()
    encoder.text_model.load_state_dict(text.state_dict())
    nn.init.eye_(encoder.text_projection.weight)
    tokenizer = CLIPTokenizer.from_pretrained(parts / "tokenizer")
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=AutoencoderTiny.from_pretrained(parts / "vae", torch_dtype=dtype),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
