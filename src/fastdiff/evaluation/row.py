"""One line of a results table."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Row:
    """What was measured of one model under one protocol; None where a number does not apply.

    steps: scheduler steps; network_calls: denoiser rows an image (a guided step counts two); fid: Frechet distance to
    the protocol's reference; fid_to_teacher: to the teacher's own samples; kid: kernel distance; clip: mean cosine
    with the caption; retrieval: R@1; diversity: mean pairwise cosine distance at one caption; sharpness: gradient
    energy;
    interval: 95 % (low, high) by metric name; settings: everything needed to measure again, the protocol's name first.
    """

    name: str
    steps: int | None = None
    network_calls: float | None = None
    guidance_scale: float | None = None
    solver: str | None = None
    fid: float | None = None
    fid_to_teacher: float | None = None
    kid: float | None = None
    clip: float | None = None
    retrieval: float | None = None
    precision: float | None = None
    recall: float | None = None
    diversity: float | None = None
    sharpness: float | None = None
    seconds_per_image: float | None = None
    interval: dict[str, tuple[float, float]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def protocol(self) -> str:
        """The protocol every number of this row belongs to."""
        return self.settings["protocol"]

    def to_dict(self) -> dict[str, Any]:
        """JSON content; what JSON cannot hold (NaN, infinities of scheduler configs) becomes null."""
        return _finite({f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Row:
        """The inverse of ``to_dict``; keys of other versions are dropped."""
        known = {f.name for f in fields(cls)}
        row = {k: v for k, v in content.items() if k in known}
        row["interval"] = {k: tuple(v) for k, v in row.get("interval", {}).items()}
        return cls(**row)


def excess(row: Row, floor: Row, metric: str = "fid") -> float | None:
    """How far a row lies above the floor in a distance; None where either has no number.

    Raises:
        ValueError: the rows were measured under different protocols.
    """
    if row.protocol != floor.protocol:
        raise ValueError(
            f"{row.name} was measured under {row.protocol}, {floor.name} under {floor.protocol}: not comparable"
        )
    value, least = getattr(row, metric), getattr(floor, metric)
    return None if value is None or least is None else value - least


def score(row: Row, floor: Row, baseline: Row, metric: str = "fid") -> float | None:
    """(distance - floor) / (baseline - floor): 0 is as good as the floor, 1 no better than the undistilled
    baseline."""
    mine, theirs = excess(row, floor, metric), excess(baseline, floor, metric)
    return None if mine is None or not theirs else mine / theirs


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
