"""f-divergences D_f(p || q) = E_q[f(p/q)] by the weights they give to a score gap.

With x_t = alpha x + sigma eps and x = G(z) of law q, the gradient of D_f is that of the reverse KL divergence times a
weight, E_q[h(r) alpha (s_q - s_p)(x_t) dx] with r = p_t/q_t and h(r) = r^2 f''(r) (Xu et al. 2025, arXiv 2502.15681).
Everything is given as a function of phi = log r, in which h neither overflows nor cancels. Duality: the divergence with
p and q exchanged has h*(r) = r h(1/r).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["DIVERGENCES", "Divergence", "DivergenceName", "divergence_named", "power_divergence"]

DivergenceName = Literal[
    "rkl", "soft_rkl", "js", "sq_hellinger", "fkl", "jeffreys", "soft_fkl", "pearson", "neyman", "power"
]
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Divergence:
    """One divergence; every function is elementwise, in the precision of its argument.

    Args:
        name: as configs call it.
        f: of r, convex, f(1) = 0.
        h: r^2 f''(r) as a function H of phi = log r.
        slope: H'.
        rest: H - H'.
        rest_slope: H' - H''. With the two before it, these are the weights of the gradient of E_q[h |s_p - s_q|^2]
            (Uni-Instruct, Wang et al. 2025, arXiv 2505.20755).
    """

    name: str
    f: Function
    h: Function
    slope: Function
    rest: Function
    rest_slope: Function


def power_divergence(gamma: float, name: str = "power", scale: float = 1.0, f: Function | None = None) -> Divergence:
    """h(r) = scale r^gamma: reverse KL at gamma 0, Hellinger at 1/2, forward KL at 1, Pearson at 2, Neyman at -1."""

    def power(factor: float) -> Function:
        return lambda phi: scale * factor * torch.exp(gamma * phi)

    return Divergence(
        name,
        f or (lambda r: scale * _power_f(r, gamma)),
        h=power(1.0),
        slope=power(gamma),
        rest=power(1 - gamma),
        rest_slope=power(gamma * (1 - gamma)),
    )


def _power_f(r: Tensor, gamma: float) -> Tensor:
    if gamma == 0:
        return -r.log()
    if gamma == 1:
        return r * r.log()
    return (r**gamma - 1) / (gamma * (gamma - 1))


def _s(phi: Tensor) -> Tensor:
    """r / (1 + r)."""
    return torch.sigmoid(phi)


def _q(phi: Tensor) -> Tensor:
    """1 / (1 + r)."""
    return torch.sigmoid(-phi)


DIVERGENCES: tuple[Divergence, ...] = (
    power_divergence(0.0, "rkl"),
    Divergence(
        "soft_rkl",
        f=lambda r: (r + 1) * (0.5 + 0.5 / r).log(),
        h=_q,
        slope=lambda phi: -_s(phi) * _q(phi),
        rest=lambda phi: (1 + _s(phi)) * _q(phi),
        rest_slope=lambda phi: -2 * _s(phi).square() * _q(phi),
    ),
    Divergence(  # twice the Jensen-Shannon divergence with its usual factor 1/2
        "js",
        f=lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
        h=_s,
        slope=lambda phi: _s(phi) * _q(phi),
        rest=lambda phi: _s(phi).square(),
        rest_slope=lambda phi: 2 * _s(phi).square() * _q(phi),
    ),
    power_divergence(0.5, "sq_hellinger", 0.25, f=lambda r: 1 - r.sqrt()),
    power_divergence(1.0, "fkl"),
    Divergence(
        "jeffreys",
        f=lambda r: (r - 1) * r.log(),
        h=lambda phi: 1 + phi.exp(),
        slope=torch.exp,
        rest=torch.ones_like,
        rest_slope=torch.zeros_like,
    ),
    Divergence(
        "soft_fkl",
        f=lambda r: (r + 1) * ((r + 1) / 2).log(),
        h=lambda phi: phi.exp() * _s(phi),
        slope=lambda phi: phi.exp() * _s(phi) * (1 + _q(phi)),
        rest=lambda phi: -_s(phi).square(),
        rest_slope=lambda phi: -2 * _s(phi).square() * _q(phi),
    ),
    power_divergence(2.0, "pearson", 2.0, f=lambda r: (r - 1).square()),
    power_divergence(-1.0, "neyman", 2.0, f=lambda r: (1 - r).square() / r),
)


def divergence_named(name: DivergenceName, gamma: float = 0.5) -> Divergence:
    """The divergence of a config; `gamma` is the exponent of `power` and means nothing to the others.

    Raises:
        ValueError: for an unknown name.
    """
    if name == "power":
        return power_divergence(gamma)
    for divergence in DIVERGENCES:
        if divergence.name == name:
            return divergence
    raise ValueError(f"unknown divergence {name!r}: give one of {[one.name for one in DIVERGENCES]} or 'power'")
