"""What both sides of a comparison share: one small pipeline on disk, one batch, one way to fill adapters."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models.teacher import Teacher
from fastdiff.planning.measure_step import middle_blueprint

PROMPT = "a red apple"
GUIDANCE = 1.75
RANK = 16
TOKENS = 77


@dataclass(frozen=True)
class Work:
    """The same weights, batch and precision (float32) for both sides.

    Args:
        folder: of the pipeline.
        batch: samples of one prompt.
        resolution: image side in pixels.
    """

    folder: Path
    batch: int
    resolution: int

    @property
    def images(self) -> Tensor:
        """`(B, 3, H, W)` in [-1, 1]."""
        generator = torch.Generator().manual_seed(1)
        return torch.rand(self.batch, 3, self.resolution, self.resolution, generator=generator) * 2 - 1


@dataclass
class Seen:
    """One step of a peer: its losses, and the draws behind each of the steps that ours takes for it, by our sites."""

    losses: dict[str, float]
    draws: list[dict[str, Tensor]]
    latents: Tensor | None = None


@dataclass
class Noisings:
    """Arguments of a peer's noising calls, in order."""

    calls: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def around(self, own: Any) -> Any:
        """`own(self, x, eps, t)`, written down."""

        def told(scheduler: Any, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
            self.calls.append((x.detach().clone(), eps.detach().clone(), t.detach().clone()))
            return own(scheduler, x, eps, t)

        return told


def write_pipeline(folder: Path, size: str = "middle") -> None:
    """A Stable Diffusion pipeline with random weights whose encoders weigh next to nothing beside its network."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    plan = middle_blueprint(size)
    tokenizer = _tokenizer()
    unet = diffusers.UNet2DConditionModel.from_config(dict(plan.network))
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=unet.config.cross_attention_dim,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=len(tokenizer) - 2,
        eos_token_id=len(tokenizer) - 1,
        pad_token_id=len(tokenizer) - 1,
    )
    widths = (8, 8, 8, 8)
    diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            latent_channels=4,
            norm_num_groups=4,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=getattr(diffusers, plan.scheduler["_class_name"]).from_config(dict(plan.scheduler)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def open_teacher(work: Work) -> Teacher:
    """The pipeline, as ours loads it."""
    return Teacher.from_pretrained(work.folder)


@torch.no_grad()
def fill_adapters(network: nn.Module, prefix: str = "") -> int:
    """Gives every low-rank layer values that depend on its name only; returns how many layers there are."""
    count = 0
    for name, module in network.named_modules():
        if not (hasattr(module, "lora_A") and hasattr(module, "lora_B")):  # as peft names them
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(name.removeprefix(prefix).encode()))
        for half, scale in ((module.lora_A, 0.05), (module.lora_B, 0.05)):
            for layer in half.values():
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * scale)
        count += 1
    return count


@torch.no_grad()
def disturb(network: nn.Module, role: str) -> None:
    """Moves every weight by a tenth of its size, as its name and the role's say: full roles start as the teacher, and
    a gap between equal scores would compare zeros."""
    for name, parameter in network.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{role}/{name}".encode()))
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1 * parameter.abs().mean())


def _tokenizer() -> Any:
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS)
