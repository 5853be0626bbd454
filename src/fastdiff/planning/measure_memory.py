"""Measured peak memory of real training steps on random weights, each in a fresh process, beside its prediction."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdiff.planning.blueprint import Blueprint, blueprint_of

HALF = {"block_out_channels": [160, 320, 640, 640]}
TINY = {"block_out_channels": [32, 64], "norm_num_groups": 8, "layers_per_block": 1} | {
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
LORA = {"student": "lora", "fake_score": "lora", "lora_rank": 64, "gradient_checkpointing": True}
COPIES = {"student": "full", "fake_score": "full", "gradient_checkpointing": True}
LOW = {"fake_score": "full", "fake_score_dtype": "bf16", "fake_score_in_backward": True}
DMD2 = {"guidance_scale": 8.0, "student_update_every": 1}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Case:
    """One configuration: frozen weights in bfloat16, bfloat16 computation, cached embeddings and latents.

    Args:
        teacher: configs of the teacher.
        resolution: image side in pixels.
        settings: of the run, besides these.
        network: changes to the network's config.
        method, config: what is computed; both turns of a two-time-scale method in every step.
        batch: samples.
        steps: training steps; the first makes the optimizers' states.
        encoders: text encoders and autoencoder in float32 stay in memory and encode each batch; else it was cached.
        against: the case without this one's lever, or with one base where this one has copies.
    """

    teacher: str
    resolution: int
    settings: Mapping[str, Any]
    network: Mapping[str, Any] = field(default_factory=dict)
    method: str = "dmd2"
    config: Mapping[str, Any] = field(default_factory=lambda: DMD2)
    batch: int = 1
    steps: int = 2
    encoders: bool = False
    against: str | None = None

    def blueprint(self) -> Blueprint:
        """The parts, with the network's changes."""
        whole = blueprint_of(self.teacher)
        return dataclasses.replace(whole, network={**whole.network, **self.network})


LCM = {"method": "lcm", "config": {"target_decay": 0.0}}
PLAIN, FULL_CRITIC, LCM_LORA = "half-sd15-lora", "half-sd15-full-critic", "half-sd15-lcm-lora"
STORED = {"gradient_checkpointing": False}
CASES: dict[str, Case] = {
    "tiny-lora": Case("sd15", 64, LORA | {"lora_rank": 4}, TINY),
    PLAIN: Case("sd15", 256, LORA, HALF),
    "half-sd15-three-copies": Case("sd15", 256, COPIES, HALF, against=PLAIN),
    "half-sd15-lora-stored": Case("sd15", 256, LORA | STORED, HALF, batch=2),
    "half-sd15-lora-checkpointed": Case("sd15", 256, LORA, HALF, batch=2, against="half-sd15-lora-stored"),
    FULL_CRITIC: Case("sd15", 256, LORA | {"fake_score": "full"}, HALF),
    "half-sd15-low-critic": Case("sd15", 256, LORA | LOW, HALF, against=FULL_CRITIC),
    "half-sd15-8bit-adam": Case(
        "sd15", 256, LORA | {"fake_score": "full", "use_8bit_adam": True}, HALF, against=FULL_CRITIC
    ),
    LCM_LORA: Case("sd15", 512, LORA, HALF, batch=2, against="half-sd15-lcm-lora-encoders", **LCM),
    "half-sd15-lcm-lora-encoders": Case("sd15", 512, LORA, HALF, batch=2, encoders=True, **LCM),
    "half-sd15-lcm-full": Case("sd15", 256, COPIES, HALF, **LCM),
    "int8-half-sd15-lora": Case("sd15", 256, LORA | {"quantize_base": "int8"}, HALF, against=PLAIN),
    "nf4-half-sd15-lora": Case("sd15", 256, LORA | {"quantize_base": "nf4"}, HALF, against=PLAIN),
    "sd15-lora": Case("sd15", 512, LORA),
    "sd15-low-critic": Case("sd15", 256, LORA | LOW, steps=1),
    "sdxl-lora-attention": Case("sdxl", 512, LORA | {"lora_target_modules": ATTENTION}, steps=1),
    "sdxl-lora": Case("sdxl", 512, LORA, steps=1),
}
SUITE = tuple(name for name in CASES if name.startswith("half"))
"""What fits a machine with 8 GiB; larger ones are named one by one."""


def measure(name: str) -> dict[str, Any]:
    """Runs a case in a process of its own, and predicts it in this one.

    Raises:
        RuntimeError: if the process failed, with the end of what it said.
    """
    done = subprocess.run(
        [sys.executable, "-m", "fastdiff.planning.measure_memory", name], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"case {name} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | predict(name)


def predict(name: str) -> dict[str, Any]:
    """The planner's number for the same steps."""
    import torch

    from fastdiff.planning.walk import BETWEEN, ENCODE, ENCODERS, walk

    case = CASES[name]
    method, settings = _method_and_settings(case, ".")
    blueprint = case.blueprint()
    phases = walk(method, blueprint, settings, frozen_dtype=torch.bfloat16, cached=not case.encoders).phases
    left_out = () if case.encoders else (ENCODERS,)
    splits = [
        {kind: size for kind, size in split.items() if kind not in left_out}
        for phase, split in phases.items()
        if phase not in BETWEEN or (case.encoders and phase == ENCODE)
    ]
    split = max(splits, key=lambda one: sum(one.values()))
    return {"predicted": sum(split.values()), "split": split}


def compared(row: Mapping[str, Any], rows: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its peak as a share of that of the case it is against, where that was measured."""
    other = CASES[row["name"]].against
    if other not in rows:
        return dict(row)
    return {**row, "against": other, "peak_share": row["peak"] / rows[other]["peak"]}


def run_here(name: str) -> dict[str, Any]:
    """The steps, in this process: resident bytes after imports and at the peak, and seconds a step.

    A tiny step of the same kind is taken first, since libraries load much of their code when it is first used.
    """
    import gc

    import torch

    case, tiny = CASES[name], CASES["tiny-lora"]
    storage = {"quantize_base": case.settings.get("quantize_base", "none")}
    _steps(dataclasses.replace(tiny, settings={**tiny.settings, **storage}))
    gc.collect()
    before = resident("VmRSS")
    found = _steps(case)
    return {
        "name": name,
        "case": dataclasses.asdict(case),
        "resident_after_imports": before,
        "peak": resident("VmHWM") - before,
        "torch": torch.__version__,
    } | found


def _steps(case: Case) -> dict[str, Any]:
    """A case's steps; everything they made is dropped with the return."""
    import tempfile
    import time

    import torch

    from fastdiff.data import PromptData
    from fastdiff.diffusion.schedules import schedule_from_config
    from fastdiff.engine import Trainer
    from fastdiff.engine.memory import state_memory
    from fastdiff.planning.teacher import PlannedTeacher
    from fastdiff.planning.walk import PlannedProcess, batch_of, images_of

    with tempfile.TemporaryDirectory() as folder:
        method, settings = _method_and_settings(case, folder)
        blueprint = case.blueprint()
        schedule = schedule_from_config(dict(blueprint.scheduler))
        teacher = PlannedTeacher(blueprint, schedule, torch.bfloat16, autoencoder=case.encoders)
        teacher.fill()
        texts = teacher.text_encoders() if case.encoders else []
        weights = sum(parameter.numel() for parameter in teacher.network.parameters())  # before any is quantised
        trainer = Trainer(method, teacher, PromptData(["a prompt"]), settings, accelerator=PlannedProcess())
        began = time.perf_counter()
        for _ in range(case.steps):
            if case.encoders:
                _encode(teacher, texts, images_of(trainer, case.batch))
            trainer.train_step([batch_of(trainer, method)])
        seconds = (time.perf_counter() - began) / case.steps
        trainer.metrics.read()  # raises if anything was not finite
        frozen = state_memory(trainer.networks, trainer.optimizers).frozen
    return {"network_weights": weights, "frozen_bytes": frozen, "seconds_a_step": seconds}


def _encode(teacher: Any, texts: Any, images: Any) -> None:
    """Prompts of 77 tokens and images pass through the encoders; what comes out is dropped."""
    import torch

    with torch.no_grad():
        for encoder in texts:
            encoder(torch.zeros(len(images), 77, dtype=torch.long))
        teacher.encode_images(images)


def _method_and_settings(case: Case, folder: str) -> tuple[Any, Any]:
    from fastdiff.engine import Settings
    from fastdiff.methods import method_named

    method = method_named(case.method)
    settings = Settings(
        output_dir=folder,
        resolution=case.resolution,
        train_batch_size=case.batch,
        mixed_precision="bf16",
        report_to="none",
        **case.settings,
    )
    return method(method.Config(**case.config)), settings


def resident(key: str) -> int:
    """Bytes resident now (`VmRSS`) or at most so far (`VmHWM`); Linux only."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    print(json.dumps(run_here(sys.argv[1])))
