"""Which of several students serves a condition: a deterministic split of conditions into parts of equal size."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastdiff.models.conditioning import Conditioning

_AXIS_ROUNDS = 50


def features_of(cond: Conditioning) -> Tensor:
    """What conditions are routed by, `(B, D)` float64 on the host.

    The pooled prompt embedding where the family is given one, as in the paper; else prompt embeddings, averaged over
    tokens (pipelines of Stable Diffusion 1 and 2 drop their encoder's pooled output); the class label `(B, 1)` where that is the condition.
    """
    named = cond.tensors.get("pooled_prompt_embeds", next(iter(cond.tensors.values())))
    first = named.detach().to("cpu", torch.float64)
    return first.flatten(1, -2).mean(1) if first.dim() > 2 else first.reshape(len(first), -1)


class Router:
    """A tree of cuts: each sends a condition left or right by its coordinate along one direction.

    Fitted cuts of the same depth go along the same principal direction of the conditions, the first along that of the
    largest spread: four parts are quadrants, class labels fall into blocks of consecutive classes, as in multi-student
    distillation (Song et al. 2024, arXiv 2410.23274). Parts differ in size by at most one, unless conditions coincide
    along a direction, and cover every condition, seen or not.

    Args:
        directions: `(P - 1, D)` float64.
        thresholds: `(P - 1,)` float64; a coordinate above it goes right.
        children: `(P - 1, 2)` int64: left and right; the number of another cut, or -1 - k for part k.
    """

    def __init__(self, directions: Tensor, thresholds: Tensor, children: Tensor) -> None:
        self.directions, self.thresholds, self.children = directions, thresholds, children

    @property
    def parts(self) -> int:
        """Number of parts."""
        return len(self.thresholds) + 1

    @classmethod
    def fit(cls, features: Tensor, parts: int) -> Router:
        """Cuts the given conditions, which must be distinct, into `parts`.

        Args:
            features: `(N, D)`.
            parts: how many, at most N.

        Raises:
            ValueError: if there are fewer conditions than parts.
        """
        if not 1 <= parts <= len(features):
            raise ValueError(f"{len(features)} different conditions cannot be split among {parts} students")
        rows, count = features.to(torch.float64), len(features)
        axes = _principal(rows, (parts - 1).bit_length())
        directions, thresholds, children = [], [], []

        def cut(chosen: Tensor, first: int, end: int, depth: int = 0) -> int:
            """Cuts the rows of parts first .. end - 1; the number of the cut, or the part if there is only one."""
            if end - first == 1:
                return -1 - first
            middle = (first + end) // 2
            left = middle * count // parts - first * count // parts
            axis = axes[depth % len(axes)]
            coordinates, order = torch.sort(rows[chosen] @ axis, stable=True)
            number = len(thresholds)
            directions.append(axis)
            thresholds.append((coordinates[left - 1] + coordinates[left]) / 2)
            children.append([0, 0])
            chosen = chosen[order]
            halves = ((chosen[:left], first, middle), (chosen[left:], middle, end))
            children[number] = [cut(*half, depth + 1) for half in halves]
            return number

        cut(torch.arange(count), 0, parts)
        if parts == 1:
            return cls(rows.new_zeros(0, rows.shape[1]), rows.new_zeros(0), torch.zeros(0, 2, dtype=torch.int64))
        return cls(torch.stack(directions), torch.stack(thresholds), torch.tensor(children))

    def __call__(self, features: Tensor) -> Tensor:
        """The part of each condition `(N, D)`, `(N,)` int64 in 0 .. parts - 1."""
        at = torch.zeros(len(features), dtype=torch.int64)
        if self.parts == 1:
            return at
        for _ in range(self.parts - 1):  # no tree of so many cuts is deeper
            inside = at.clamp_min(0)
            coordinates = (features.to(torch.float64) * self.directions[inside]).sum(1)
            chosen = self.children[inside, (coordinates > self.thresholds[inside]).long()]
            at = torch.where(at >= 0, chosen, at)
        return -1 - at

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that `from_state` takes."""
        return {"directions": self.directions, "thresholds": self.thresholds, "children": self.children}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Router:
        """The router of `state_dict()`."""
        return cls(state["directions"], state["thresholds"], state["children"])

    def agrees(self, other: Router, tolerance: float = 1e-6) -> bool:
        """Whether both cut alike, up to rounding of the features they were fitted to."""
        return self.parts == other.parts and all(
            mine.shape == theirs.shape and torch.allclose(mine, theirs, rtol=tolerance, atol=tolerance)
            for mine, theirs in zip(self.state_dict().values(), other.state_dict().values(), strict=True)
        )


def _principal(rows: Tensor, count: int) -> list[Tensor]:
    """About the `count` directions of largest spread, fewer if the rows span fewer; the largest entry is positive."""
    rest = rows - rows.mean(0)
    scale = rest.abs().max()
    axes: list[Tensor] = []
    for _ in range(count):
        if axes and not rest.abs().max() > 1e-9 * scale:
            break
        axis = rest[rest.square().sum(1).argmax()]
        for _ in range(_AXIS_ROUNDS):
            axis = axis / axis.norm()
            axis = rest.T @ (rest @ axis)
        axis = axis / axis.norm()
        axes.append(axis * axis[axis.abs().argmax()].sign())
        rest = rest - (rest @ axis)[:, None] * axis
    return axes
