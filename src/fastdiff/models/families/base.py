"""What fastdiff must know about one family of diffusers pipelines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from fastdiff.models.conditioning import Conditioning


class Family(ABC):
    """One family of text-to-image pipelines: how it encodes prompts and how its network is called.

    Families hold no weights; a pipeline or a network is always an argument.
    """

    name: ClassVar[str]
    pipeline_classes: ClassVar[tuple[str, ...]]
    network_name: ClassVar[str]
    lora_targets: ClassVar[tuple[str, ...]]
    attention_targets: ClassVar[tuple[str, ...]]
    feature_tap: ClassVar[str]

    @abstractmethod
    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], resolution: int) -> Conditioning:
        """Embeds `B` prompts for images of `resolution` pixels."""

    @abstractmethod
    def null(self, pipeline: Any, resolution: int) -> Conditioning:
        """The unconditional embedding, one row, as this family was trained with."""

    @abstractmethod
    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Conditioning, **inputs: Any) -> Tensor:
        """One network evaluation: `x_t` `(B, C, H, W)`, `time` `(B,)` as the network is fed -> native output."""

    @abstractmethod
    def feature_taps(self, network: nn.Module) -> dict[str, int]:
        """Modules whose activations `(B, C, H, W)` discriminators may read, in running order: name -> channels."""

    def feature_channels(self, network: nn.Module) -> int:
        """Channels of the activation at `feature_tap`."""
        return self.feature_taps(network)[self.feature_tap]

    def middle_taps(self, network: nn.Module) -> dict[str, int]:
        """The one tap that a single head reads."""
        return {self.feature_tap: self.feature_channels(network)}
