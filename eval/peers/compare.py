"""Side by side with public trainers, run from their own sources: images a second, peak memory, and the same losses.

    OMP_NUM_THREADS=1 python eval/peers/compare.py --sources /tmp/peers --output eval/bench/peers.json

`README.md` beside this file says how to get the sources. Everything runs on the CPU, in a process for each measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from ours import Ours
from work import Work, open_teacher, write_pipeline

from fastdiff.cli.bench_results import keep
from fastdiff.planning.measure_memory import _resident
from fastdiff.planning.timing import seconds

PEERS = {
    "diffusers-lcm-lora": "diffusers_lcm",
    "dmd2-official-sd15": "dmd2_official",
    "fastgen-dmd2-sd15": "fastgen_dmd2",
}
SIZES = {"middle": (2, 128), "tiny": (2, 64)}
"""Samples and pixels."""
TOLERANCE = 1e-4


def main() -> None:
    """Measures the peers that were named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, required=True, help="folder of the peers' sources")
    parser.add_argument("--peer", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--size", choices=SIZES, default="middle")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    folder = flags.sources / f"pipeline-{flags.size}"
    if not folder.is_dir():
        write_pipeline(folder, flags.size)
    work = Work(folder, *SIZES[flags.size])
    if flags.part:
        run_part(flags.part, flags.peer[0], flags.sources, work, flags.pairs)
        return
    for name in flags.peer:
        row = measure(name, flags)
        keep(flags.output, name if flags.size == "middle" else f"{name}-{flags.size}", row)
        print(json.dumps({name: row}, indent=1), flush=True)


def measure(name: str, flags: argparse.Namespace) -> dict[str, Any]:
    """All measurements of one peer, each in a process of its own."""

    def child(part: str) -> dict[str, Any]:
        told = ["--sources", flags.sources, "--size", flags.size, "--pairs", flags.pairs, "--peer", name]
        command = [sys.executable, __file__, *map(str, told), "--part", part]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name}, {part}: {done.stderr[-3000:]}")
        return json.loads(done.stdout.splitlines()[-1])

    row = child("pairs")
    row["peak_bytes"] = {side: child(f"memory:{side}")["peak"] for side in ("theirs", *row["sides"])}
    return row


def run_part(part: str, name: str, sources: Path, work: Work, pairs: int) -> None:
    """One measurement in this process; the last line it prints is the result."""
    module = importlib.import_module(PEERS[name])
    with contextlib.redirect_stdout(sys.stderr):
        kind, _, side = part.partition(":")
        found = side_by_side(module, sources, work, pairs) if kind == "pairs" else memory(module, sources, work, side)
    print(json.dumps(found))


def sides(module: Any, work: Work) -> dict[str, Callable[[], Ours]]:
    """Ours as the peer is laid out and, where that is with full copies, as adapters on one base."""
    layouts = {"ours": module.SETTINGS, "ours as adapters": getattr(module, "LORA", None)}
    return {
        name: lambda settings=settings: Ours(work, module.METHOD, module.OURS, settings, module.STEPS)
        for name, settings in layouts.items()
        if settings is not None
    }


def side_by_side(module: Any, sources: Path, work: Work, pairs: int) -> dict[str, Any]:
    """Losses on the same inputs, then steps in turn."""
    peer = module.Peer(sources, work)
    ours = {name: make() for name, make in sides(module, work).items()}
    losses = compared(module.LOSSES, peer.first(), ours["ours"])
    steps = {"theirs": peer.step} | {name: one.step for name, one in ours.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(pairs + 1):
        names = list(steps)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            took = seconds(steps[name])
            if turn:  # the first warms up
                times[name].append(took)
    ratios = {
        name: statistics.median(a / b for a, b in zip(times["theirs"], times[name], strict=True)) for name in ours
    }
    return {
        "commit": module.COMMIT,
        "how": module.NOTE,
        "method": module.METHOD,
        "weights": sum(parameter.numel() for parameter in open_teacher(work).network.parameters()),
        "batch": work.batch,
        "resolution": work.resolution,
        "precision": "float32",
        "pairs": pairs,
        "sides": list(ours),
        "images_per_second": {name: work.batch / statistics.median(values) for name, values in times.items()},
        "faster_than_theirs": ratios,
        "losses": losses,
        "losses_agree": all(abs(one["relative"]) <= TOLERANCE for one in losses.values()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def compared(names: Mapping[str, str], seen: Any, ours: Ours) -> dict[str, dict[str, float]]:
    """The peer's losses beside ours on its draws."""
    own = ours.losses(seen.draws, seen.latents)
    return {
        theirs: {"theirs": seen.losses[theirs], "ours": own[name], "relative": own[name] / seen.losses[theirs] - 1}
        for theirs, name in names.items()
    }


def memory(module: Any, sources: Path, work: Work, side: str) -> dict[str, Any]:
    """Resident bytes at the peak of two steps, above those after all imports."""
    import diffusers
    import transformers

    _ = diffusers.StableDiffusionPipeline, transformers.CLIPTextModel
    if side == "theirs":
        module.load(sources)
    before = _resident("VmRSS")
    one = module.Peer(sources, work) if side == "theirs" else sides(module, work)[side]()
    for _ in range(2):
        one.step()
    return {"peak": _resident("VmHWM") - before}


if __name__ == "__main__":
    main()
