"""Time of a training step against the sum of its own network passes, measured bare in the same process."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Mapping
from typing import Any

import torch

from fastdiff.data import PromptData
from fastdiff.diffusion.schedules import schedule_from_config
from fastdiff.engine import Settings, Trainer
from fastdiff.methods import method_named
from fastdiff.planning.bare import Bare, Turn, record
from fastdiff.planning.blueprint import Blueprint, blueprint_of
from fastdiff.planning.teacher import PlannedTeacher
from fastdiff.planning.timing import interleaved
from fastdiff.planning.walk import PlannedProcess, batch_of

MIDDLE = {"block_out_channels": [128, 256, 512], "attention_head_dim": 8, "layers_per_block": 1, "sample_size": 32} | {
    "down_block_types": ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2,
}
TINY = MIDDLE | {"block_out_channels": [32, 32, 64], "norm_num_groups": 8, "sample_size": 8}
SIZES: dict[str, dict[str, Any]] = {"middle": MIDDLE, "tiny": TINY}
BOTH_TURNS = {"student_update_every": 1}
_STEP = 1
"""Every measured step is this one, so that all make the same draws and calls; step 0 also weighs terms."""


def measure(
    name: str,
    size: str = "middle",
    *,
    batch: int = 2,
    pairs: int = 20,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Median over interleaved pairs of (step, its bare passes), both in seconds, and their ratio.

    Args:
        name: of the method, with its defaults; two-time-scale methods take both turns.
        size: a key of `SIZES`.
        batch: samples a step.
        pairs: how many.
        settings: of the run, besides LoRA of rank 16.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(name, size, batch, folder, settings or {})
        work = batch_of(trainer, trainer.method)
        trainer.step = _STEP
        turns = record(trainer, work)
        bare = Bare(trainer, turns)

        def step() -> None:
            trainer.step = _STEP
            trainer.train_step([work])

        times = list(interleaved(step, bare.step, pairs, trainer.device))
    return {
        "method": name,
        "size": size,
        "batch": batch,
        "pairs": pairs,
        "weights": sum(parameter.numel() for parameter in bare.networks["base"].parameters()),
        "settings": dict(settings or {}),
        "calls": [_described(turn) for turn in turns],
        "step_seconds": statistics.median(ours for ours, _ in times),
        "bare_seconds": statistics.median(theirs for _, theirs in times),
        "ratio": statistics.median(ours / theirs for ours, theirs in times),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def take_steps(name: str, size: str, batch: int, settings: Mapping[str, Any], steps: int) -> None:
    """A method's steps; everything they made is dropped with the return."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(name, size, batch, folder, settings)
        work = batch_of(trainer, trainer.method)
        for _ in range(steps):
            trainer.step = _STEP
            trainer.train_step([work])


def middle_blueprint(size: str) -> Blueprint:
    """A Stable Diffusion UNet of another width."""
    whole = blueprint_of("sd15")
    return dataclasses.replace(whole, network={**whole.network, **SIZES[size]})


def _trainer(name: str, size: str, batch: int, folder: str, changes: Mapping[str, Any]) -> Trainer:
    method = method_named(name)
    fields = {field.name for field in dataclasses.fields(method.Config)}
    config = {key: value for key, value in BOTH_TURNS.items() if key in fields}
    blueprint = middle_blueprint(size)
    teacher = PlannedTeacher(blueprint, schedule_from_config(dict(blueprint.scheduler)), torch.float32, False)
    teacher.fill()
    kind = {"student": "lora" if "lora" in method.info.student_kinds else "full"}
    settings = Settings(
        output_dir=folder,
        train_batch_size=batch,
        report_to="none",
        log_every=10**6,
        **(kind | {"lora_rank": 16} | dict(changes)),
    )
    built = method(method.Config(**config))
    return Trainer(built, teacher, PromptData(["a prompt"]), settings, accelerator=PlannedProcess())


def _described(turn: Turn) -> dict[str, Any]:
    calls = [{"network": call.network, "rows": len(call.x), "graph": call.with_graph} for call in turn.calls]
    return {"trains": list(turn.trains), "calls": calls}
