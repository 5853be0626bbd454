"""What fastdiff must know about one family of diffusers pipelines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastdiff.models.codec import Codec
from fastdiff.models.conditioning import Conditioning


class Family(ABC):
    """One family of text-to-image pipelines: how it encodes prompts and how its network is called.

    Families hold no weights; a pipeline or a network is always an argument.

    Attributes:
        name: of the family.
        pipeline_classes: the diffusers pipelines it serves.
        network_name: the pipeline's name of the network, `unet` or `transformer`.
        lora_targets, attention_targets: ends of module names that adapters go to, all and few.
        loads_lora: whether the stock pipeline has `load_lora_weights`.
        kohya_file: whether other programs want LoRAs of this family in kohya's form.
        gives_levels: whether the stock pipeline asks its scheduler for evenly spaced levels 1 .. 1/n, instead of
            leaving the grid to it.
        own_guidance: what a network that embeds guidance is told where a method asks for none: its pipeline's default.
    """

    name: ClassVar[str]
    pipeline_classes: ClassVar[tuple[str, ...]]
    network_name: ClassVar[str]
    lora_targets: ClassVar[tuple[str, ...]]
    attention_targets: ClassVar[tuple[str, ...]]
    loads_lora: ClassVar[bool] = True
    kohya_file: ClassVar[bool] = False
    gives_levels: ClassVar[bool] = False
    own_guidance: ClassVar[float] = 1.0

    @abstractmethod
    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], resolution: int) -> Conditioning:
        """Embeds `B` prompts for images of `resolution` pixels; all prompts have the same number of tokens."""

    @abstractmethod
    def null(self, pipeline: Any, resolution: int) -> Conditioning:
        """The unconditional embedding, one row, as this family was trained with."""

    @abstractmethod
    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Conditioning, **inputs: Any) -> Tensor:
        """One network evaluation: `x_t` `(B, C, H, W)`, `time` `(B,)` of the schedule's `network_time` -> native output.

        Whatever else a network of this family does to its time, its latents' layout or its output's sign is done here.
        """

    @abstractmethod
    def feature_taps(self, network: nn.Module) -> dict[str, int]:
        """Modules whose activations discriminators may read, in running order: name -> channels."""

    @abstractmethod
    def middle_taps(self, network: nn.Module) -> dict[str, int]:
        """The one tap that a single head reads."""

    def feature(self, network: nn.Module, output: Any, x_t: Tensor) -> Tensor:
        """What a tapped module returned for `x_t`, as a map `(B, C, h, w)`."""
        return output[0] if isinstance(output, tuple) else output

    def conditioning_shapes(
        self, network: nn.Module, text_encoders: Sequence[Mapping[str, Any]]
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of a row of `encode_prompts`, from the configs of the pipeline's text encoders alone, for planning.

        Raises:
            ValueError: if nobody has said so of this family.
        """
        raise ValueError(f"runs of {self.name} cannot be planned yet: what its prompts take is not written down")

    def prepare(self, pipeline: Any) -> None:
        """Makes a newly loaded pipeline cheaper where this changes nothing that it computes."""

    def codec(self, autoencoder: nn.Module) -> Codec:
        """The autoencoder, its latents in the scale and layout that `call` takes."""
        return Codec(autoencoder)

    def sample_size(self, network: nn.Module) -> int:
        """Latent cells along one side of the images that the network was trained for."""
        return network.config.sample_size

    def patch(self, network: nn.Module) -> int:
        """Latent cells along one side of what the network sees as one token; must divide the latents' side."""
        return 1

    def embeds_guidance(self, network: nn.Module) -> bool:
        """Whether guidance is an input of the network (`guidance`, `(B,)`), which has no unconditional branch then."""
        return False

    def sampling_arguments(self, cond: Conditioning, noise: Tensor, pixels: int) -> dict[str, Any]:
        """Arguments of the stock pipeline that stand for prompts and size; `noise` is what it begins with."""
        return {**cond.tensors, "latents": noise, "height": pixels, "width": pixels}

    def step_noise(self, noise: Tensor, generator: torch.Generator) -> Tensor:
        """Fresh noise like `noise`, as the stock pipeline's scheduler draws it between steps, on the CPU."""
        return torch.randn(noise.shape, generator=generator)

    def sampled(self, latents: Tensor, noise: Tensor) -> Tensor:
        """What the stock pipeline returns with `output_type="latent"`, in the layout of `noise`."""
        return latents
