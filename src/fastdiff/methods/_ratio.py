"""Weights made of the density ratio that a discriminator has learned (Xu et al. 2025, arXiv 2502.15681)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.diffusion.divergences import Divergence, DivergenceName, divergence_named
from fastdiff.methods._adversarial_score_gap import AdversarialScoreGap, AdversarialScoreGapConfig
from fastdiff.methods._unread import refuse_unread
from fastdiff.methods.base import Context, check_positive

Mean = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RatioConfig(AdversarialScoreGapConfig):
    """Which divergence, and how its ratio is tamed.

    Args:
        divergence: which f; the reverse KL is what an unweighted score gap follows.
        power: exponent of h(r) = r^power where `divergence` is `power`.
        ratio_min, ratio_max: bounds of the density ratio.
        time_bins: parts of the time range in which the ratio is brought to mean 1 before h is taken; 0 for none.
        time_bins_decay: share of the old mean of such a part in its new one. At 0 a sample alone in its part has the
            ratio 1, so that small micro-batches need a decay near 1 or no parts.
    """

    divergence: DivergenceName = "rkl"
    power: float = 0.5
    ratio_min: float = 0.1
    ratio_max: float = 20.0
    time_bins: int = 0
    time_bins_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(ratio_min=self.ratio_min, ratio_max=self.ratio_max)
        if not self.ratio_min < self.ratio_max:
            raise ValueError(f"ratio_min ({self.ratio_min}) must be below ratio_max ({self.ratio_max})")
        if not (self.time_bins >= 0 and 0 <= self.time_bins_decay < 1):
            raise ValueError(
                f"time_bins ({self.time_bins}) must not be negative, time_bins_decay ({self.time_bins_decay}) in [0, 1)"
            )
        self._check_read()

    def _check_read(self) -> None:
        if self.divergence != "power":
            refuse_unread(self, ("power",), f"with divergence {self.divergence}")
        if self.divergence == "rkl":
            # No parts are as good as any here, so that 0 may stand beside every divergence.
            of_ratio = {"ratio_min", "ratio_max", "time_bins_decay"} | ({"time_bins"} if self.time_bins else set())
            refuse_unread(self, of_ratio, "with divergence rkl, whose weight is 1 at any ratio")
        if self.time_bins == 0:
            refuse_unread(self, ("time_bins_decay",), "with time_bins 0")

    def check_logits(self) -> None:
        """Refuses a divergence whose density ratio no GAN learns.

        Raises:
            ValueError: naming what is missing.
        """
        if self.divergence == "rkl":
            return
        if self.gan_weight == 0:
            raise ValueError(
                f"divergence {self.divergence} takes the density ratio from the discriminator: gan_weight must be "
                "above 0, or the divergence rkl"
            )
        if self.gan_loss != "softplus":
            raise ValueError(
                f"gan_loss {self.gan_loss!r} gives logits that are no log-ratio of densities, which divergence "
                f"{self.divergence} needs: use softplus"
            )

    @property
    def compared(self) -> tuple[int, int]:
        """First and last index at which scores are compared."""
        return self.min_timestep, self.max_timestep

    def ratio_weight(self) -> RatioWeight:
        """The weights."""
        divergence = divergence_named(self.divergence, self.power)
        return RatioWeight(divergence, self.ratio_min, self.ratio_max, self.time_bins, self.time_bins_decay)


class RatioWeight:
    """h(r) of a divergence with r = exp(logit), brought to mean 1 over a micro-batch of all processes.

    Args:
        divergence: which h.
        low, high: bounds of r; the ratio of two laws far apart has no finite variance.
        bins: if not 0, r is first divided by its mean over these samples in the same of so many equal parts of the time
            range, since how far the two laws are apart depends on the noise.
        decay: share of a part's old mean in its new one.
    """

    def __init__(self, divergence: Divergence, low: float, high: float, bins: int = 0, decay: float = 0.0) -> None:
        self.divergence, self.low, self.high, self.bins, self.decay = divergence, low, high, bins, decay
        self.means = torch.zeros(bins)  # 0 where no sample has been yet

    def __call__(self, logits: Tensor, place: Tensor, global_mean: Mean) -> Tensor:
        """Weights `(B,)` without graph.

        Args:
            logits: `(B,)`, estimates of log p_teacher,t(x_t) / p_student,t(x_t).
            place: `(B,)`, where in the time range each sample is, from 0 to 1.
            global_mean: the mean over processes.
        """
        phi = logits.detach().clamp(math.log(self.low), math.log(self.high))
        if self.bins:
            phi = phi - self._bin_means(phi.exp(), place, global_mean).log()
        h = self.divergence.h(phi)
        return h / global_mean(h.mean())

    def state_dict(self) -> dict[str, Tensor]:
        """The running means."""
        return {"ratio_means": self.means} if self.bins else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores them.

        Raises:
            ValueError: if they are of another number of parts.
        """
        if not self.bins:
            return
        if "ratio_means" not in state or state["ratio_means"].shape != self.means.shape:
            found = {name: tuple(tensor.shape) for name, tensor in state.items()}
            raise ValueError(
                f"the checkpoint's density ratios {found} are not those of {self.bins} time bins: resume with the "
                "time_bins of the run that wrote it"
            )
        self.means = state["ratio_means"].clone()

    def _bin_means(self, r: Tensor, place: Tensor, global_mean: Mean) -> Tensor:
        """The updated mean of each sample's part."""
        number = (place * self.bins).long().clamp(0, self.bins - 1)
        # Not one_hot, which waits for the device to check its numbers.
        member = (number[:, None] == torch.arange(self.bins, device=r.device)).to(r.dtype)
        # Means of sums and of counts, so that a part which some process has no sample of is still averaged rightly.
        total, count = global_mean(torch.stack([r @ member, member.sum(0)]))
        now, old = total / count.clamp_min(torch.finfo(r.dtype).tiny), self.means.to(r)
        updated = torch.where(old > 0, self.decay * old + (1 - self.decay) * now, now)
        self.means = torch.where(count > 0, updated, old)
        return self.means[number]


class RatioWeighted(AdversarialScoreGap):
    """A score gap that may be weighted by the density ratio that its discriminator has learned."""

    config: RatioConfig

    def __init__(self, config: RatioConfig) -> None:
        super().__init__(config)
        self.ratio = config.ratio_weight()

    @property
    def least_batch(self) -> int:
        """Two, since weights have mean 1 over a micro-batch, and so many that no sample is more than half of the mean
        that its own ratio is divided by: of that mean it is `(1 - decay)` over the samples in its part."""
        if self.config.divergence == "rkl":
            return super().least_batch
        needed = 2 * self.config.time_bins * (1 - self.config.time_bins_decay)
        return max(2, math.ceil(needed - 1e-9))

    def density_weight(self, logits: Tensor, t: Tensor, ctx: Context) -> Tensor:
        """h(r) `(B,)` of logits `(B, K)` at times `t`, without graph."""
        low, high = (ctx.denoiser.schedule.time_of_index(end) for end in self.config.compared)
        weight = self.ratio(logits.mean(1), (t - low) / (high - low), ctx.global_mean)
        ctx.log("ratio_weight_max", weight.max())
        return weight

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | self.ratio.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.ratio.load_state_dict(state)
