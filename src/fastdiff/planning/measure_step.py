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
from fastdiff.methods import Method, method_named
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
NETWORKS_ONLY: dict[str, dict[str, Any]] = {
    "dmd": {"regression_loss": "latent_l2"},
    "flash_dmd": {"gan_weight": 0.0, "high_noise_steps": 4},
    "rfpp": {"perceptual_weight": 0.0},
    "msd": {"students": 1},
    "disback": {"degradation_steps": 2, "path_nodes": 1},
    "rcm": {"tangent_warmup": 1},
    "freeflow": {"correct_every": 2},
}
"""Where a method's defaults decode samples to look at pixels, its latent form is measured; msd is measured as one
student, since what is routed is chosen with the data; what opens a run is short, so that its later turns are seen; FreeFlow
corrects every second sample, so that two are a batch."""
ADAPTERS: dict[str, dict[str, Any]] = {"apex": {"losses": "paper"}}
"""What adapters can train of a method whose defaults widen the network."""
_HORIZON = 64
"""Steps that are searched for turns of every kind."""


def measure(
    name: str,
    size: str = "middle",
    *,
    batch: int = 2,
    pairs: int = 20,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Medians over interleaved pairs of (step, its bare passes): both in seconds, their ratio, that of processor time.

    Where a method's turns fall into several steps, one of each kind are taken as one.

    Args:
        name: of the method, with its defaults (but see `NETWORKS_ONLY`).
        size: a key of `SIZES`.
        batch: samples a step.
        pairs: how many.
        settings: of the run, besides LoRA of rank 16 (a full student where the method or its defaults want one).
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(name, size, batch, folder, settings or {})
        work = batch_of(trainer, trainer.method)
        steps = _steps(trainer.method)

        def step() -> None:
            for trainer.step in steps:  # the same numbers each time, so that all make the same draws and calls
                trainer.train_step([work])

        turns = record(trainer, step)
        bare = Bare(trainer, turns)
        times = list(interleaved(step, bare.step, pairs, trainer.device))
    return {
        "method": name,
        "config": _config(name, (settings or {}).get("student")),
        "size": size,
        "latent": list(work.latent_shape),
        "batch": batch,
        "pairs": pairs,
        "weights": sum(parameter.numel() for parameter in bare.networks["base"].parameters()),
        "settings": dict(settings or {}),
        "calls": [_described(turn) for turn in turns],
        "step_seconds": statistics.median(ours.wall for ours, _ in times),
        "bare_seconds": statistics.median(theirs.wall for _, theirs in times),
        "ratio": statistics.median(ours.wall / theirs.wall for ours, theirs in times),
        "cpu_ratio": statistics.median(ours.cpu / theirs.cpu for ours, theirs in times),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def take_steps(name: str, size: str, batch: int, settings: Mapping[str, Any], times: int) -> None:
    """Steps of every kind of turn, so often; everything they made is dropped with the return."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(name, size, batch, folder, settings)
        work = batch_of(trainer, trainer.method)
        steps = _steps(trainer.method) * times
        for trainer.step in steps:
            trainer.train_step([work])


def middle_blueprint(size: str) -> Blueprint:
    """A Stable Diffusion UNet of another width."""
    whole = blueprint_of("sd15")
    return dataclasses.replace(whole, network={**whole.network, **SIZES[size]})


def _trainer(name: str, size: str, batch: int, folder: str, changes: Mapping[str, Any]) -> Trainer:
    method = method_named(name)
    built = method(method.Config(**_config(name, changes.get("student"))))
    blueprint = middle_blueprint(size)
    teacher = PlannedTeacher(blueprint, schedule_from_config(dict(blueprint.scheduler)), torch.float32, False)
    teacher.fill()
    adapter = "lora" in method.info.student_kinds and built.student_network(teacher.network) is None
    settings = Settings(
        output_dir=folder,
        train_batch_size=batch,
        report_to="none",
        log_every=10**6,
        **({"student": "lora" if adapter else "full", "lora_rank": 16} | dict(changes)),
    )
    return Trainer(built, teacher, PromptData(["a prompt"]), settings, accelerator=PlannedProcess())


def _config(name: str, student: str | None) -> dict[str, Any]:
    """What differs from the method's defaults: the student steps as often as the rule of its updates allows."""
    config = method_named(name).Config
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    every = 2 if fields.get("update_rule") == "exclusive" else 1
    own = NETWORKS_ONLY.get(name, {}) | (ADAPTERS.get(name, {}) if student == "lora" else {})
    return ({"student_update_every": every} if "student_update_every" in fields else {}) | own


def _steps(method: Method) -> list[int]:
    """Steps that take turns of every kind; not step 0, which also weighs terms against each other."""
    seen: set[tuple[str, ...]] = set()
    chosen = []
    for step in range(1, _HORIZON):
        updates = {(update.name, *update.trains) for update in method.updates(step)}
        if not updates <= seen:
            seen |= updates
            chosen.append(step)
    return chosen


def _described(turn: Turn) -> dict[str, Any]:
    calls = [
        {"network": call.network, "rows": len(call.x), "graph": call.with_graph, "derivative": bool(call.tangents)}
        for call in turn.calls
    ]
    return {"trains": list(turn.trains), "calls": calls}
