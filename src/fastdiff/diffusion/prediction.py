"""What a network says about a noisy sample, in every parameterisation.

One linear rule covers all of them: with ``x_t = alpha x0 + sigma eps`` and an output ``F = a x0 + b eps``,

    x0 = (b x_t - sigma F) / (alpha b - sigma a),    eps = (alpha F - a x_t) / (alpha b - sigma a).

All of it is linear at fixed ``x_t``, so guidance commutes with every conversion.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from .schedules import NoiseSchedule, Terminal
from .tensors import as_times, broadcast_to, compute_dtype

__all__ = ["Prediction", "PredictionKind", "guide", "prediction_target", "transition_target"]

PredictionKind = Literal["epsilon", "sample", "v_prediction", "flow"]


class Prediction:
    """A network's output at ``(x_t, t)``, converted on demand; conversions run in float32 or better.

    Args:
        native: the output as the network gave it, shaped like ``x_t``.
        kind: what it predicts, in diffusers' names: ``epsilon`` (the noise), ``sample`` (x0), ``v_prediction``
            (alpha eps - sigma x0), ``flow`` (eps - x0).
        x_t: the noisy sample the network saw.
        t: its time, scalar, per sample (B,) or per frame.
        schedule: the process.

    Two conversions do not exist and give infinities: ``x0`` from ``epsilon`` where alpha is 0, ``eps`` from ``sample``
    where sigma is 0.

    Raises:
        ValueError: for an unknown kind, or an output whose shape is not that of ``x_t``.
    """

    def __init__(
        self, native: Tensor, kind: PredictionKind, x_t: Tensor, t: Tensor | float, schedule: NoiseSchedule
    ) -> None:
        _check_kind(kind)
        if native.shape != x_t.shape:
            raise ValueError(
                f"a prediction of shape {tuple(native.shape)} does not fit its input of shape {tuple(x_t.shape)}: if "
                "the network also predicts a variance, split it off first"
            )
        self.native = native
        self.kind = kind
        self.x_t = x_t
        self.t = t
        self.schedule = schedule

    @classmethod
    def from_x0(cls, x0: Tensor, x_t: Tensor, t: Tensor | float, schedule: NoiseSchedule) -> Prediction:
        """The prediction of a denoiser that returns the clean sample."""
        return cls(x0, "sample", x_t, t, schedule)

    @cached_property
    def x0(self) -> Tensor:
        """The clean sample."""
        if self.kind == "sample":
            return self._output
        _, sigma = self.levels
        _, b = self._weights
        return (b * self.x_t - sigma * self._output) / self._determinant

    @cached_property
    def eps(self) -> Tensor:
        """The noise."""
        if self.kind == "epsilon":
            return self._output
        alpha, _ = self.levels
        a, _ = self._weights
        return (alpha * self._output - a * self.x_t) / self._determinant

    @cached_property
    def v(self) -> Tensor:
        """``alpha eps - sigma x0``."""
        alpha, sigma = self.levels
        return self._output if self.kind == "v_prediction" else alpha * self.eps - sigma * self.x0

    @cached_property
    def flow(self) -> Tensor:
        """``eps - x0``."""
        return self._output if self.kind == "flow" else self.eps - self.x0

    @cached_property
    def score(self) -> Tensor:
        """Gradient of the log-density of ``x_t``: ``-eps/sigma``."""
        return -self.eps / self.levels[1]

    @cached_property
    def levels(self) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at ``t``, shaped to multiply ``x_t``."""
        return self.schedule.levels(self.t, self._output)

    def as_kind(self, kind: PredictionKind) -> Tensor:
        """The same prediction in another parameterisation (what a critic of that kind regresses)."""
        _check_kind(kind)
        if kind == "epsilon":
            return self.eps
        if kind == "sample":
            return self.x0
        return self.v if kind == "v_prediction" else self.flow

    @cached_property
    def _output(self) -> Tensor:
        return self.native.to(compute_dtype(self.native, self.x_t))

    @cached_property
    def _weights(self) -> tuple[Tensor | float, Tensor | float]:
        return _weights(self.kind, *self.levels)

    def target(self, x0: Tensor, eps: Tensor) -> Tensor:
        """What this output is regressed on where its input was made of `x0` and `eps`; float32 or better."""
        return prediction_target(self.kind, self.schedule, x0, eps, self.t)

    @cached_property
    def _determinant(self) -> Tensor:
        (alpha, sigma), (a, b) = self.levels, self._weights
        return alpha * b - sigma * a


def prediction_target(
    kind: PredictionKind, schedule: NoiseSchedule, x0: Tensor, eps: Tensor, t: Tensor | float
) -> Tensor:
    """What a network of this kind is regressed on at ``x_t = alpha x0 + sigma eps``; float32 or better.

    Raises:
        ValueError: for an unknown kind.
    """
    _check_kind(kind)
    dtype = compute_dtype(x0, eps)
    x0, eps = x0.to(dtype), eps.to(dtype)
    a, b = _weights(kind, *schedule.levels(t, x0))
    return a * x0 + b * eps


def transition_target(
    kind: PredictionKind,
    schedule: NoiseSchedule,
    x_s: Tensor,
    s: Tensor | float | Terminal,
    eps: Tensor,
    t: Tensor | float,
) -> Tensor:
    """What a network of this kind is regressed on at ``x_t = transition(x_s, s, t, eps)``, where ``x_s`` is not clean.

    With ``x_t = r x_s + q eps`` the pair ``x* = (x_s - r sigma_s^2 / q eps) / alpha_s``, ``eps* = sigma_t / q eps``
    satisfies ``alpha_t x* + sigma_t eps* = x_t`` in every sample, and its mean given ``x_t`` is the denoiser of the law
    that ``x_s`` comes from, whatever that is: ``-eps/q`` is the score of the kernel (Phased DMD, arXiv 2510.27684, eq. 13
    for flows; the same identity for every process and kind). With ``s`` clean it is :func:`prediction_target` of
    ``x_s``. Treating ``x_s`` as clean instead biases what is learned. The target grows like ``1/q`` as ``t`` falls to
    ``s``; at ``t = s`` it is not defined, and neither is it where ``x_s`` holds no signal. Float32 or better.

    Raises:
        ValueError: for an unknown kind.
    """
    _check_kind(kind)
    dtype = compute_dtype(x_s, eps)
    x_s, eps = x_s.to(dtype), eps.to(dtype)
    alpha_s, sigma_s = schedule.levels(s, x_s)
    alpha_t, sigma_t = schedule.levels(t, x_s)
    kept, added = schedule.kernel(s, t, x_s)
    clean = (x_s - kept * sigma_s**2 / added * eps) / alpha_s
    noise = sigma_t / added * eps
    a, b = _weights(kind, alpha_t, sigma_t)
    return a * clean + b * noise


def guide(null: Tensor, cond: Tensor, w: Tensor | float) -> Tensor:
    """Classifier-free guidance ``null + w (cond - null)`` in float32 or better; exactly ``cond`` at ``w = 1``.

    ``w`` is a number, or a tensor of one value a sample (B,). It may be applied to any parameterisation, as all of
    them are linear in one another (Ho & Salimans, arXiv 2207.12598, write ``w - 1`` for our ``w``).
    """
    dtype = compute_dtype(null, cond)
    weight = broadcast_to(as_times(w, null.to(dtype)), null)
    return torch.lerp(null.to(dtype), cond.to(dtype), weight)  # lerp is exact at both ends


def _weights(kind: PredictionKind, alpha: Tensor, sigma: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """(a, b) of ``output = a x0 + b eps``."""
    if kind == "epsilon":
        return 0.0, 1.0
    if kind == "sample":
        return 1.0, 0.0
    if kind == "v_prediction":
        return -sigma, alpha
    return -1.0, 1.0


def _check_kind(kind: str) -> None:
    if kind not in get_args(PredictionKind):
        raise ValueError(f"prediction type {kind!r} is not known: use one of {', '.join(get_args(PredictionKind))}")
