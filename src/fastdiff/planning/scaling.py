"""A plan carried to many devices, on paper: memory of each device, and bytes it sends in a step.

Replicated, every device holds all weights and a ring sends each gradient twice: 2 (N - 1) / N of its bytes. Sharded
(`fully_shard`), a device holds 1/N of full networks and the base with their gradients and states, gathers the blocks at
work, and sends (N - 1) / N of a network's bytes for each forward, each backward, and each reduction of gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastdiff.planning.plan import Plan, with_margin
from fastdiff.planning.sharing import device_phases

DEVICES = (1, 8, 32, 64, 128, 256)


@dataclass(frozen=True)
class Scale:
    """One row; bytes of a device. `batch` is the samples of all devices in a micro-batch."""

    devices: int
    batch: int
    replicated: int
    replicated_sent: int
    sharded: int
    sharded_sent: int


def scale(plan: Plan, devices: Sequence[int] = DEVICES) -> list[Scale]:
    """Rows for several numbers of devices."""
    walked = plan.walked
    exchanged = sum(walked.exchanged.values())
    rows = []
    for count in devices:
        moved = (count - 1) / count
        replicated, sharded = (
            with_margin(max(split.total() for split in device_phases(walked, count, cut).values()))
            for cut in (False, True)
        )
        rows.append(
            Scale(
                devices=count,
                batch=count * plan.batch,
                replicated=replicated,
                replicated_sent=round(2 * moved * exchanged),
                sharded=sharded,
                sharded_sent=round(moved * (walked.gathered + exchanged)),
            )
        )
    return rows


def table(plan: Plan) -> str:
    """The rows as Markdown."""
    lines = [
        "| devices | samples | replicated: GiB | sent, GB a step | sharded: GiB | sent, GB a step |",
        "|---|---|---|---|---|---|",
    ]
    for row in scale(plan):
        sizes = (row.replicated / 2**30, row.replicated_sent / 1e9, row.sharded / 2**30, row.sharded_sent / 1e9)
        lines.append(f"| {row.devices} | {row.batch} | " + " | ".join(f"{size:.1f}" for size in sizes) + " |")
    return "\n".join(lines)
