"""What methods share that bake guidance into the student: one strength, or a range of them fed as an embedding."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from fastdiff.methods._unread import refuse_unread
from fastdiff.methods.base import Context, Method
from fastdiff.models.analytic_networks import WidenableNetwork
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.embeddings import TIME_FEATURES, guidance_embedding, has_own_slot, with_guidance_input


class GuidanceSettings(Protocol):
    """The fields that a config needs."""

    guidance_scale: float
    guidance_range: tuple[float, float] | None


class GuidanceInput(Method):
    """A student of one guidance, or of any in a range, which it is told by the embedding of stock pipelines."""

    config: GuidanceSettings

    @property
    def own_network(self) -> bool:
        return self.config.guidance_range is not None

    def student_network(self, network: nn.Module) -> nn.Module | None:
        """A network that is told its guidance.

        Raises:
            ValueError: if the student's users would have to say it to a stock pipeline that cannot pass it on.
        """
        if not self.own_network:
            return None
        if self.sampling_guidance > 1 and not isinstance(network, WidenableNetwork) and not has_own_slot(network):
            raise ValueError(
                f"guidance_range {self.config.guidance_range} makes a student that is told its guidance, and stock "
                f"pipelines of {type(network).__name__} have no argument for that: fix guidance_scale instead."
            )
        return with_guidance_input(network)

    def sampling_inputs(self, denoiser: Denoiser, batch_size: int, device: torch.device) -> dict[str, Tensor]:
        return self.told(torch.full((batch_size,), self.sampling_guidance, device=device))

    @property
    def sampling_guidance(self) -> float:
        """What a pipeline is called with: 0 where guidance is baked in, else the middle of the range."""
        return 0.0 if self.config.guidance_range is None else sum(self.config.guidance_range) / 2

    def guidance(self, ctx: Context) -> float | Tensor:
        """w of the teacher, a number or one a sample."""
        if self.config.guidance_range is None:
            return self.config.guidance_scale
        low, high = self.config.guidance_range
        return low + (high - low) * ctx.random.uniform("guidance")

    def told(self, w: float | Tensor) -> dict[str, Tensor]:
        """The network input that says `w`; nothing where it is fixed."""
        return (
            {} if self.config.guidance_range is None else {"timestep_cond": guidance_embedding(w - 1, TIME_FEATURES)}
        )


def check_range(config: GuidanceSettings) -> None:
    """Refuses a range that is none, and one strength beside a range.

    Raises:
        ValueError: naming the setting.
    """
    if config.guidance_range is None:
        return
    low, high = config.guidance_range
    if not 0 <= low <= high < float("inf"):
        raise ValueError(f"guidance_range must be (low, high), finite and not negative, got {config.guidance_range}")
    refuse_unread(config, ("guidance_scale",), "with guidance_range, from which w is drawn (null draws from none)")
