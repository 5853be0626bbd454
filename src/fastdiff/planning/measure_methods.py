"""Memory and time of one step of a method, by what is trained of it, each combination in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from fastdiff.methods import Method

Kinds = tuple[str, str | None]
"""Of the student and of the critics; None where a method has no critics."""
LEAST_BATCH = {"freeflow": 2, "apex": 4}
"""Where a method splits its batch."""


def combinations(method: type[Method]) -> list[Kinds]:
    """What of a method can be trained as adapters or in full."""
    critics = ("lora", "full") if method.critics else (None,)
    return [(student, critic) for student in method.info.student_kinds for critic in critics]


def measure(
    name: str, kinds: Kinds, size: str, batch: int, pairs: int, resolution: int | None = None
) -> dict[str, Any]:
    """The numbers of `run_here`, from a process of its own; its batch may be larger, see `LEAST_BATCH`.

    Raises:
        RuntimeError: if the process failed, with the end of what it said.
    """
    rows = max(batch, LEAST_BATCH.get(name, 1))
    told = json.dumps(
        {"name": name, "kinds": kinds, "size": size, "batch": rows, "pairs": pairs, "resolution": resolution}
    )
    command = [sys.executable, "-m", "fastdiff.planning.measure_methods", told]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} with {kinds} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_here(name: str, kinds: Kinds, size: str, batch: int, pairs: int, resolution: int | None) -> dict[str, Any]:
    """Peak resident bytes of two steps above those after imports, then seconds of a step and of its bare passes.

    Args:
        name: of the method.
        kinds: of student and critics.
        size: a key of `measure_step.SIZES`.
        batch: samples a step.
        pairs: of (step, bare passes), interleaved.
        resolution: image side in pixels; the size's own if not given.
    """
    import gc

    from fastdiff.planning.measure_memory import resident
    from fastdiff.planning.measure_step import measure as measure_step
    from fastdiff.planning.measure_step import take_steps

    settings: dict[str, Any] = {key: kind for key, kind in zip(("student", "fake_score"), kinds, strict=True) if kind}
    take_steps(name, "tiny", batch, settings, times=1)  # libraries load much of their code when it is first used
    gc.collect()
    before = resident("VmRSS")
    if resolution:
        settings["resolution"] = resolution
    take_steps(name, size, batch, settings, times=2)  # the first makes the optimizers' states
    peak = resident("VmHWM") - before
    row = measure_step(name, size, batch=batch, pairs=pairs, settings=settings)
    return row | {"student": kinds[0], "fake_score": kinds[1], "peak": peak}


if __name__ == "__main__":
    print(json.dumps(run_here(**json.loads(sys.argv[1]))))
