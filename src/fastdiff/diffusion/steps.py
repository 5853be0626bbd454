"""One step along (or across) the probability-flow ODE, for any process.

In the coordinates ``y = x/alpha`` and ``kappa = sigma/alpha`` the ODE is ``dy/dkappa = eps(x, t)``: a jump is Euler's
step there. ``t`` is where the sample is, ``s`` where it goes. All results are float32 or better.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .prediction import Prediction
from .schedules import NoiseSchedule, Terminal
from .tensors import as_times, broadcast_to, compute_dtype

__all__ = ["ddim_eta", "er_sde", "er_sde_5", "euler", "heun", "heun_flow", "jump", "pf_velocity", "renoise"]

Predict = Callable[[Tensor, Tensor], Prediction]


def jump(prediction: Prediction, s: Tensor | float | Terminal) -> Tensor:
    """``alpha_s x0 + sigma_s eps``: the deterministic DDIM step (arXiv 2010.02502).

    Also Euler's step in (y, kappa), Euler's step of a flow, and the step that consistency trajectory models
    parameterise (arXiv 2310.02279). ``s`` may be a tensor of table indices with :data:`CLEAN_INDEX` among them.
    """
    alpha, sigma = prediction.schedule.levels(s, prediction.x0)
    return alpha * prediction.x0 + sigma * prediction.eps


def pf_velocity(prediction: Prediction) -> Tensor:
    """``dx/dt`` of the probability-flow ODE in the schedule's own time: ``alpha' x0 + sigma' eps``."""
    x0, times = prediction.x0, as_times(prediction.t, prediction.x0)
    schedule = prediction.schedule
    return broadcast_to(schedule.d_alpha(times), x0) * x0 + broadcast_to(schedule.d_sigma(times), x0) * prediction.eps


def euler(prediction: Prediction, s: Tensor | float) -> Tensor:
    """``x + (s - t) dx/dt`` in the schedule's own time; for a flow this is :func:`jump`."""
    x0 = prediction.x0
    span = broadcast_to(as_times(s, x0) - as_times(prediction.t, x0), x0)
    return prediction.x_t + span * pf_velocity(prediction)


def heun(predict: Predict, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Heun's second-order step in (y, kappa), the one of EDM samplers (arXiv 2206.00364); two calls of ``predict``.

    Needs alpha > 0 at ``t``: a flow that starts at t = 1 takes :func:`heun_flow`.
    """
    first = predict(x, t)
    second = predict(jump(first, s), s)
    alpha_t, sigma_t = first.levels
    alpha_s, sigma_s = second.levels
    return alpha_s / alpha_t * first.x_t + (sigma_s - alpha_s * sigma_t / alpha_t) * (first.eps + second.eps) / 2


def heun_flow(predict: Predict, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Heun's step in flow coordinates ``x/(alpha + sigma)``, ``sigma/(alpha + sigma)``: finite at both ends.

    For a flow it is the usual Heun step on the velocity. Two calls of ``predict``.
    """
    first = predict(x, t)
    second = predict(jump(first, s), s)
    total_t, total_s = sum(first.levels), sum(second.levels)
    span = second.levels[1] / total_s - first.levels[1] / total_t
    return total_s * (first.x_t / total_t + span * (first.flow + second.flow) / 2)


def ddim_eta(prediction: Prediction, s: Tensor | float | Terminal, eta: Tensor | float, noise: Tensor) -> Tensor:
    """DDIM with stochasticity ``eta``: 0 is :func:`jump`, 1 is ancestral DDPM sampling (arXiv 2010.02502, eq. 16)."""
    ratio = _kappa_ratio(prediction, s)
    weight = broadcast_to(as_times(eta, ratio), prediction.x_t)
    kept = (1 - weight**2 * (1 - ratio**2)).clamp_min(0).sqrt()
    return _noisy_jump(prediction, s, kept, noise)


def er_sde(prediction: Prediction, s: Tensor | float | Terminal, eta: Tensor | float, noise: Tensor) -> Tensor:
    """First-order step of the SDE with constant ``eta`` (noise function ``kappa^(1 + eta^2)``, arXiv 2309.06169).

    The noise is integrated exactly with the clean prediction held. ``eta`` = 0 is :func:`jump`, 1 equals
    :func:`ddim_eta` with 1; in between the two agree to first order in the step.
    """
    ratio = _kappa_ratio(prediction, s)
    kept = ratio ** (broadcast_to(as_times(eta, ratio), prediction.x_t) ** 2)
    return _noisy_jump(prediction, s, kept, noise)


def er_sde_5(prediction: Prediction, s: Tensor | float | Terminal, noise: Tensor) -> Tensor:
    """First-order step of the SDE with noise function ``kappa (e^(kappa^0.3) + 10)`` (ER-SDE 5, arXiv 2309.06169).

    Nearly ancestral at high noise, nearly deterministic near the clean end.
    """
    alpha_t, sigma_t = prediction.levels
    alpha_s, sigma_s = prediction.schedule.levels(s, prediction.x0)
    high, low = (sigma_t / alpha_t) ** 0.3, (sigma_s / alpha_s) ** 0.3
    return _noisy_jump(prediction, s, (low.exp() + 10) / (high.exp() + 10), noise)


def renoise(
    x_s: Tensor, s: Tensor | float | Terminal, u: Tensor | float, noise: Tensor, schedule: NoiseSchedule
) -> Tensor:
    """Take a sample at ``s`` to the noisier ``u`` with fresh noise, in the dtype of ``x_s``; keeps the marginals."""
    return schedule.transition(x_s, s, u, noise)


def _kappa_ratio(prediction: Prediction, s: Tensor | float | Terminal) -> Tensor:
    """kappa_s / kappa_t, finite where there is no signal at ``t``."""
    alpha_t, sigma_t = prediction.levels
    alpha_s, sigma_s = prediction.schedule.levels(s, prediction.x0)
    return sigma_s * alpha_t / (alpha_s * sigma_t)


def _noisy_jump(prediction: Prediction, s: Tensor | float | Terminal, kept: Tensor, noise: Tensor) -> Tensor:
    """A jump in which a fraction ``kept`` of the noise amplitude is predicted and the rest is fresh."""
    alpha, sigma = prediction.schedule.levels(s, prediction.x0)
    fresh = (1 - kept**2).clamp_min(0).sqrt() * noise.to(compute_dtype(noise))
    return alpha * prediction.x0 + sigma * (kept * prediction.eps + fresh)
