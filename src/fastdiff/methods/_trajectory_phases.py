"""Phases of a trajectory: the grid cut into equal parts, at indices that the trailing sampler walks over."""

from __future__ import annotations

from torch import Tensor


def check_phases(phases: int, points: int, name: str) -> None:
    """Refuses phases whose edges are not grid points.

    Raises:
        ValueError: naming what fits.
    """
    if phases < 1 or points % phases:
        fit = [count for count in range(1, points + 1) if points % count == 0 and count <= 16]
        raise ValueError(
            f"{name} {phases} does not divide num_ddim_timesteps {points}, so that phases would end off the sampler's "
            f"grid: give one of {', '.join(map(str, fit))}, or num_ddim_timesteps 40 (1, 2, 4, 5, 8, 10)"
        )


def phase_edge(number: Tensor, points: Tensor, phases: int) -> Tensor:
    """Index `(B,)` at which the phase of each pair of the grid ends, -1 for the cleanest phase."""
    width = (len(points) - 1) // phases
    return points[number // width * width]


def draw_end(edge: Tensor, following: Tensor, u: Tensor) -> Tensor:
    """Index `(B,)` uniform among `edge`, ..., `following`, for uniform draws `u` in [0, 1)."""
    above = (u * (following - edge + 1)).long()
    return (edge + above).minimum(following)
