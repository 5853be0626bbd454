"""What methods share whose student is told where its jump ends.

Everything is said in flow coordinates, for any process: with share = sigma / (alpha + sigma) in place of time and
x / (alpha + sigma) in place of x, a prediction read as `flow = eps - x0` moves x by (end share - share) * flow. That
is one step of DDIM exactly, so that the average velocity of an epsilon network is its own prediction of (x0, eps),
and stock schedulers serve it. Coordinates in which an epsilon network's output itself is the average (x / alpha over
sigma / alpha) have the same maps and optima, but errors there count (alpha / (alpha + sigma))^2 as much: 1/244 at
Stable Diffusion's last index.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.schedules import CLEAN_INDEX, NoiseSchedule
from fastdiff.diffusion.tensors import as_times, broadcast_to
from fastdiff.methods.base import Method, check_positive, time_at
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.embeddings import time_features, with_extra_times


def noise_share(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """sigma / (alpha + sigma), which is a flow's own time."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return sigma / (alpha + sigma)


def noise_share_rate(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """dt / d share; finite at both ends of any process."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return (alpha + sigma) ** 2 / (alpha * schedule.d_sigma(t) - sigma * schedule.d_alpha(t))


def time_of_share(schedule: NoiseSchedule, share: Tensor) -> Tensor:
    """Times from the clean one to the schedule's last whose share is about `share`, clamped there.

    Between the clean end of a table and its first index the share grows linearly; the exact share of what is
    returned is `noise_share` of it.
    """
    clean, times = schedule.t_clean, schedule.time_of_kappa(share / (1 - share))
    if schedule.t_min <= clean:
        return times
    first = noise_share(schedule, torch.full_like(share, schedule.t_min))
    return torch.where(share < first, clean + (schedule.t_min - clean) * share / first, times)


def end_input(schedule: NoiseSchedule, end: Tensor) -> dict[str, Tensor]:
    """The network input that says where a jump ends, a schedule time `(B,)`."""
    return {"timestep_cond": time_features([schedule.network_time(end)])}


def adaptive_distance(
    prediction: Tensor, target: Tensor, power: float, constant: float, finite: Tensor | None = None
) -> Tensor:
    """Mean over samples of |d|^2 / sg(|d|^2 + constant)^power, with |d|^2 the mean over elements.

    The weight of MeanFlow (arXiv 2505.13447) with a mean in place of its sum, so that `constant` does not depend on
    the resolution. At power 1/2 every sample's gradient has about one length; at power 1 every sample's loss has about
    one value, and its gradient falls as 1/|d|. Samples that are not `finite` `(B,)` do not count.
    """
    square = (prediction - target.detach()).square().flatten(1).mean(1)
    if finite is not None:
        square = torch.where(finite, square, 0)
    return (square / (square.detach() + constant) ** power).mean()


def check_adaptive(norm_power: float, norm_constant: float) -> None:
    """Refuses what `adaptive_distance` cannot take, by the names methods give it."""
    check_positive(norm_constant=norm_constant)
    if not 0 <= norm_power <= 1:
        raise ValueError(f"norm_power must be in [0, 1], got {norm_power}")


class EndTold(Method):
    """A full student told where its jump ends; as sampled here, with jumps to the clean end, it is told one thing only."""

    @property
    def own_network(self) -> bool:
        return True

    def student_network(self, network: nn.Module) -> nn.Module | None:
        return with_extra_times(network)

    def sampling_inputs(self, denoiser: Denoiser, batch_size: int, device: torch.device) -> dict[str, Tensor]:
        like = torch.empty(batch_size, device=device)
        return end_input(denoiser.schedule, time_at(CLEAN_INDEX, like, denoiser.schedule))


def average_velocity(prediction: Prediction) -> Tensor:
    """What these methods regress."""
    return prediction.flow


def moved_share(schedule: NoiseSchedule, t: Tensor, end: Tensor, like: Tensor) -> Tensor:
    """Share at `t` minus share at `end`, shaped to multiply `like` and in its precision."""
    t, end = as_times(t, like), as_times(end, like)
    return broadcast_to(noise_share(schedule, t) - noise_share(schedule, end), like)
