"""A teacher without weights of its own: made from configs, to be walked through for free or filled at random."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.models.codec import Codec
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.families import family_of
from fastdiff.models.teacher import prediction_type_of
from fastdiff.planning.blueprint import Blueprint


class PlannedTeacher:
    """Offers what a run asks of its teacher (`TeacherLike`). Under `FakeTensorMode` its weights are shapes and types.

    Args:
        blueprint: the parts.
        schedule: with real values, which its own checks look at.
        dtype: storage of the frozen network; text encoders and autoencoder stay float32, as the engine loads them.
        autoencoder: give the autoencoder memory as well; a run on cached data never touches it.
    """

    adaptable = True

    def __init__(
        self, blueprint: Blueprint, schedule: NoiseSchedule, dtype: torch.dtype, autoencoder: bool = True
    ) -> None:
        self.blueprint = blueprint
        self.family = family_of(blueprint.pipeline)
        self.schedule = schedule
        self.prediction_type = prediction_type_of(blueprint.scheduler)
        self.network = _with_memory(_shapes(blueprint.network).to(dtype))
        self.autoencoder = _shapes(blueprint.autoencoder)
        if autoencoder:
            _with_memory(self.autoencoder)
        self.codec: Codec = self.family.codec(self.autoencoder)

    @torch.no_grad()
    def fill(self, seed: int = 0) -> None:
        """Random weights that keep activations of order one, written in place, wherever there is memory."""
        generator = torch.Generator().manual_seed(seed)
        parts = [self.network] if next(self.autoencoder.parameters()).is_meta else [self.network, self.autoencoder]
        for parameter in itertools.chain.from_iterable(part.parameters() for part in parts):
            if parameter.dim() > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.fill_(1)

    @property
    def default_resolution(self) -> int:
        return self.family.sample_size(self.network) * self.codec.factor

    def schedule_at(self, resolution: int) -> NoiseSchedule:
        """The schedule given; its shift costs no memory."""
        return self.schedule

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        return (self.codec.channels, resolution // self.codec.factor, resolution // self.codec.factor)

    def encode(self, prompts: Sequence[str], resolution: int) -> Conditioning:
        """Rows of the family's conditioning; the text encoders do not run."""
        shapes = self.family.conditioning_shapes(self.network, self.blueprint.text_encoders)
        return Conditioning({name: torch.randn(len(prompts), *shape) for name, shape in shapes.items()})

    def null(self, resolution: int) -> Conditioning:
        return self.encode([""], resolution)

    def encode_images(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.codec.encode(images, noise)

    def decode(self, latents: Tensor) -> Tensor:
        return self.codec.decode(latents)

    def new_network(self) -> nn.Module:
        return copy.deepcopy(self.network)

    def identity(self) -> dict[str, str | None]:
        return {"source": None, "revision": None, "fingerprint": None}

    @property
    def text_encoder_bytes(self) -> int:
        """Float32 weights of all text encoders."""
        with torch.device("meta"):
            return sum(p.numel() * 4 for encoder in self.text_encoders() for p in encoder.parameters())

    def text_encoders(self) -> list[nn.Module]:
        """The text encoders on the current device, float32, at random as transformers starts them."""
        import transformers

        classes = [getattr(transformers, config["architectures"][0]) for config in self.blueprint.text_encoders]
        return [cls(cls.config_class(**config)).eval() for cls, config in zip(classes, self.blueprint.text_encoders)]


def _shapes(config: Mapping[str, Any]) -> nn.Module:
    """A diffusers network on the meta device."""
    import diffusers

    with torch.device("meta"):
        network = getattr(diffusers, config["_class_name"]).from_config(dict(config))
    return network.requires_grad_(False).eval()


def _with_memory(network: nn.Module) -> nn.Module:
    """The same with memory behind every weight; nothing is written there yet."""
    return network.to_empty(device="cpu")
