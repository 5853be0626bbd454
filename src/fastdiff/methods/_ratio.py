"""Weights made of the density ratio that a discriminator has learned (Xu et al. 2025, arXiv 2502.15681)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastdiff.diffusion.divergences import Divergence

Mean = Callable[[Tensor], Tensor]


class RatioWeight:
    """h(r) of a divergence with r = exp(logit), brought to mean 1 over all samples of all processes.

    Args:
        divergence: which h.
        low, high: bounds of r; the ratio of two laws far apart has no finite variance.
        bins: if not 0, r is first divided by its mean over all samples in the same of so many equal parts of the time
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
        member = torch.nn.functional.one_hot(number, self.bins).to(r.dtype)
        # Means of sums and of counts, so that a part which some process has no sample of is still averaged rightly.
        total, count = global_mean(torch.stack([r @ member, member.sum(0)]))
        now, old = total / count.clamp_min(torch.finfo(r.dtype).tiny), self.means.to(r)
        updated = torch.where(old > 0, self.decay * old + (1 - self.decay) * now, now)
        self.means = torch.where(count > 0, updated, old)
        return self.means[number]
