"""How a role's prediction changes along a direction in its inputs: the tangents of continuous-time methods.

Forward-mode differentiation gives it in one pass of about two and a half evaluations, wherever every operation of the
network supports it; attention is computed by its plain formula meanwhile, since fused kernels have no forward
derivative. Where the network refuses, a central difference of two evaluations takes its place. Either way the network
runs in float32 or better: in bf16 neither is usable.

Networks told a time by sinusoids that turn within a few indices, as Stable Diffusion's are, carry ripples of that
period: too small to matter for the prediction, but up to most of its derivative, and training on that makes them grow
(SANA-Sprint, arXiv 2503.09641, trains its teacher anew with slower sinusoids). A chord of a few indices sees past them.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.diffusion.steps import pf_velocity
from fastdiff.diffusion.tensors import broadcast_to, compute_dtype
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.roles import anchor

# Sinusoidal embeddings of a thousand indices turn by one radian an index at their fastest: an eighth of an index keeps
# the truncation error near 0.1 %, and a smaller one drowns in float32's rounding of the angles.
TIME_STEP = 0.125
# Largest root-mean-square move of x, whose scale is one.
SAMPLE_STEP = 0.03

Route = Literal["forward", "difference"]


@dataclass(frozen=True)
class Point:
    """A place in a network's inputs, or a direction there; in a direction, None stands still.

    Args:
        x: `(B, C, H, W)`.
        t: `(B,)` schedule time.
        extra: `(B,)`, a further schedule time the network is told, e.g. the end of a jump.
    """

    x: Tensor | None
    t: Tensor | None
    extra: Tensor | None = None


def ode_direction(teacher: Prediction, rate: Tensor) -> Point:
    """The direction of the teacher's probability-flow ODE when the schedule's time moves at `rate` `(B,)`."""
    return Point(broadcast_to(rate, teacher.x_t) * pf_velocity(teacher), rate)


@dataclass(frozen=True)
class Tangent:
    """A quantity and its derivative along a direction, both `(B, C, H, W)`, without gradient.

    Samples for which either is not finite are zero in both and False in `finite` `(B,)`.
    """

    value: Tensor
    derivative: Tensor
    finite: Tensor


def native(prediction: Prediction) -> Tensor:
    """The network's own output."""
    return prediction.native


class Tangents:
    """Differentiates predictions, by forward mode where the network allows it, else by differences.

    Which of the two is found out once per network and remembered here.

    Args:
        route: take this one instead.
        chord: if above zero, how many indices of time wide a central difference takes the derivative's place; the value
            stays that of the point. Both ends lie in the times the network knows: within half a chord of the noisiest
            or cleanest the slope is that of the nearest point with room on both sides.
    """

    def __init__(self, route: Route | None = None, chord: float = 0.0) -> None:
        self.route, self.chord = route, chord
        self._routes: weakref.WeakKeyDictionary[nn.Module, Route] = weakref.WeakKeyDictionary()

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        cond: Conditioning,
        role: str,
        at: Point,
        along: Point,
        read: Callable[[Prediction], Tensor] = native,
        inputs: Callable[[Tensor], dict[str, Any]] = lambda extra: {},
    ) -> Tangent:
        """`read(prediction)` of a role at a point, and d/dh of it at h = 0 when the point moves by h times `along`.

        Args:
            denoiser: how the role is called.
            cond: conditioning, `B` rows.
            role: whose prediction.
            at: where; `extra` only if `inputs` wants it.
            along: the direction.
            read: what of the prediction, e.g. `lambda p: p.v`; its dependence on x and t beside the network's output
                is always differentiated exactly.
            inputs: extra network inputs from `at.extra`.
        """
        precise = copy.copy(denoiser)
        precise.compute_dtype = compute_dtype(torch.empty(0, dtype=denoiser.compute_dtype))

        def predict(point: Point) -> Prediction:
            extra = {} if point.extra is None else inputs(point.extra)
            return precise(point.x, point.t, cond, role, **extra)

        network = denoiser.roles.network(role)
        with _full_precision(network):
            output, change = self._differentiate(network, predict, at, along, denoiser.schedule)
        return _read(output, change, denoiser, at, along, read)

    def _differentiate(self, network, predict, at, along, schedule) -> tuple[Tensor, Tensor]:
        if self.chord:
            _, change = _slope(predict, at, along, *_chord(at, along, schedule, self.chord))
            return predict(at).native, change
        route = self.route or self._routes.get(network)
        if route == "difference":
            return _central_difference(predict, at, along, schedule)
        if route == "forward":
            return _forward_mode(predict, at, along)
        try:
            result = _forward_mode(predict, at, along)
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, RuntimeError) as error:  # torch raises either where a derivative is missing
            reason = str(error).splitlines()[0]
            warnings.warn(
                f"{type(network).__name__} has no forward-mode derivative ({reason}); central differences take its "
                "place. Standard attention processors have one.",
                stacklevel=4,
            )
            self._routes[network] = "difference"
            return _central_difference(predict, at, along, schedule)
        self._routes[network] = "forward"
        return result


def _forward_mode(predict: Callable[[Point], Prediction], at: Point, along: Point) -> tuple[Tensor, Tensor]:
    # Compiled blocks would drop the derivative.
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        output, change = forward_ad.unpack_dual(predict(_dual(at, along)).native)
    if change is None:
        raise NotImplementedError("its output does not depend on its inputs")
    return output, change


def _central_difference(
    predict: Callable[[Point], Prediction], at: Point, along: Point, schedule: NoiseSchedule
) -> tuple[Tensor, Tensor]:
    h = _step(at, along, schedule)
    return _slope(predict, at, along, -h, h)


def _slope(
    predict: Callable[[Point], Prediction], at: Point, along: Point, behind: Tensor, ahead: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and slope of the outputs `behind` and `ahead` along the direction, `(B,)` each."""
    before, after = (predict(_moved(at, along, h)).native for h in (behind, ahead))
    return (after + before) / 2, (after - before) / broadcast_to(ahead - behind, after)


def _chord(at: Point, along: Point, schedule: NoiseSchedule, width: float) -> tuple[Tensor, Tensor]:
    """How far behind and ahead a chord of so many indices ends, moved inside the times of the schedule.

    They are those of t, or of the further time if t stands still.
    """
    time, speed = (at.extra, along.extra) if along.t is None else (at.t, along.t)
    if speed is None:
        raise ValueError("a chord is measured in time, and this direction stands still there: leave `chord` out")
    whole = width / _fed_speed(time, speed, schedule).clamp_min(1e-6)
    speed = torch.where(speed == 0, 1e-6, speed)
    to_first, to_last = ((bound - time) / speed for bound in (schedule.t_min, schedule.t_max))
    least, most = torch.minimum(to_first, to_last), torch.maximum(to_first, to_last)
    ahead = torch.minimum(whole / 2, most).maximum(least + whole)
    return ahead - whole, ahead


def _step(at: Point, along: Point, schedule: NoiseSchedule) -> Tensor:
    """`(B,)`: how far one may go along the direction, so that no time the network sees and no x moves too far."""
    speeds = []
    if along.x is not None:
        speeds.append(along.x.flatten(1).square().mean(1).sqrt() / SAMPLE_STEP)
    for place, speed in ((at.t, along.t), (at.extra, along.extra)):
        if speed is not None:
            speeds.append(_fed_speed(place, speed, schedule) / TIME_STEP)
    return 1 / torch.stack([speed.to(at.x.dtype) for speed in speeds]).amax(0).clamp_min(1e-6)


def _fed_speed(place: Tensor, speed: Tensor, schedule: NoiseSchedule) -> Tensor:
    """`(B,)`: how fast the number moves that the network is fed for a time."""
    with forward_ad.dual_level():
        fed = schedule.network_time(forward_ad.make_dual(place, speed.to(place.dtype)))
        return forward_ad.unpack_dual(fed).tangent.abs()


def _moved(at: Point, along: Point, h: Tensor) -> Point:
    def move(place: Tensor | None, speed: Tensor | None) -> Tensor | None:
        return place if speed is None else place + broadcast_to(h, speed).to(place.dtype) * speed

    return Point(move(at.x, along.x), move(at.t, along.t), move(at.extra, along.extra))


def _dual(at: Point, along: Point) -> Point:
    def pair(place: Tensor | None, speed: Tensor | None) -> Tensor | None:
        return place if speed is None else forward_ad.make_dual(place, speed.to(place.dtype))

    return Point(pair(at.x, along.x), pair(at.t, along.t), pair(at.extra, along.extra))


def _read(
    output: Tensor, change: Tensor, denoiser: Denoiser, at: Point, along: Point, read: Callable[[Prediction], Tensor]
) -> Tangent:
    """Conversions of the output are elementwise and always have a forward derivative."""
    with forward_ad.dual_level():
        moving = _dual(at, along)
        dual = forward_ad.make_dual(output, change)
        prediction = Prediction(dual, denoiser.kind, moving.x, moving.t, denoiser.schedule)
        value, derivative = forward_ad.unpack_dual(read(prediction))
    if derivative is None:
        derivative = torch.zeros_like(value)
    finite = (value.isfinite() & derivative.isfinite()).flatten(1).all(1)
    keep = broadcast_to(finite, value)
    return Tangent(value.where(keep, 0), derivative.where(keep, 0), finite)


def _full_precision(network: nn.Module) -> contextlib.AbstractContextManager:
    stored = anchor(network).dtype
    return contextlib.nullcontext() if stored == compute_dtype(anchor(network)) else _Widened()


class _Widened(TorchFunctionMode):
    """Weights stored in half precision take part in float32, layer by layer, without a float32 copy of the network."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        args, kwargs = tree_map(_widened, (args, kwargs or {}))
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.to(torch.float32) if half else value
