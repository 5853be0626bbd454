"""Runs that several processes make together; a test makes the same ones alone and compares."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from engine_helpers import PROMPTS, Latents
from safetensors.torch import save_file
from torch.multiprocessing import start_processes

from fastdiff.engine import Settings, Trainer
from fastdiff.engine.distributed import leave_together
from fastdiff.engine.metrics import DeferredMetrics, NonFiniteError
from fastdiff.engine.sharding import local
from fastdiff.methods import DMD2, LCM, DMD2Config, LCMConfig
from fastdiff.models.denoiser import Taps
from fastdiff.models.teacher import Teacher

GLOBAL_BATCH = 4
STEPS = 2
_RECOMPUTED = {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}
CASES = {
    "full": ("dmd2", {"student": "full", "fake_score": "full", "ema_decay": 0.5}),
    "full_recomputed": ("dmd2", {"student": "full", "fake_score": "full"} | _RECOMPUTED),
    "lora": ("dmd2", {"student": "lora", "fake_score": "lora", "ema_decay": 0.5}),
    "lora_recomputed": ("dmd2", {"student": "lora", "fake_score": "lora"} | _RECOMPUTED),
    "bf16": ("dmd2", {"student": "full", "fake_score": "full", "mixed_precision": "bf16"}),
    "lcm": ("lcm", {"student": "full", "ema_decay": 0.5}),
}
"""Both methods go through a network without training it: DMD2's student through the critic, LCM's target."""


def trainer(pipeline: Any, case: str, folder: Path, world: int, **settings) -> Trainer:
    """A tiny run whose batch is the same on any number of processes."""
    name, own = CASES[case]
    if name == "dmd2":
        method = DMD2(DMD2Config(student_update_every=1, timesteps=(999, 499), gan_weight=1e-3))
    else:
        method = LCM(LCMConfig())
    batch = GLOBAL_BATCH // world // own.get("gradient_accumulation_steps", 1)
    # Parameters without a true gradient get rounding noise for one, which a large epsilon keeps Adam from amplifying.
    defaults = {"lora_rank": 4, "learning_rate": 1e-3, "adam_epsilon": 1e-3, "max_grad_norm": 1.0, "log_every": 1}
    defaults |= {"report_to": "none", "checkpointing_steps": 1, "validation_steps": 1000, "max_train_steps": STEPS}
    defaults |= {"output_dir": str(folder), "train_batch_size": batch, "fsdp": "full_shard"} | own | settings
    return Trainer(method, Teacher(copy.deepcopy(pipeline), "tiny"), Latents(PROMPTS), Settings(**defaults))


def descend(pipeline: Any, case: str, folder: Path, world: int, **settings) -> None:
    """Plain gradient descent, which shows gradients as they are; leaves all weights and metrics in the folder."""
    run = trainer(pipeline, case, folder, world, **settings)
    rate = 10.0 if run.settings.student == "lora" else 0.1  # new adapters are products with zero: small gradients
    for optimizer in run.optimizers.values():
        optimizer.optimizer = torch.optim.SGD(optimizer.parameters, lr=rate, fused=True)
    metrics = []
    for batches in run.batches.steps(0):
        run.train_step(batches)
        metrics.append(run.metrics.read())
    _write_weights(run, folder)
    if run.is_main:
        held = sum(p.numel() for p in run.networks.parameters("student"))
        base = sum(local(p).numel() for p in run.networks.roles.base.parameters())
        report = {"world": run.accelerator.num_processes, "metrics": metrics, "student": held, "base": base}
        (folder / "report.json").write_text(json.dumps(report))


def feature_gradients(pipeline: Any, folder: Path, world: int) -> None:
    """Gradients of the critic from its features alone, with other calls between forward and backward."""
    run = trainer(pipeline, "full", folder, world)
    (batch,) = next(run.batches.steps(0))
    denoiser, held = run.networks.denoiser, run.held["fake_score"]
    asked = (batch.images(), torch.full((len(batch),), 500.0), batch.cond, "fake_score")
    (middle,) = denoiser.features(*asked, ("mid_block",))  # the network stops there
    taps = Taps(("down_blocks.0",))
    denoiser(*asked, taps=taps)
    with torch.no_grad():
        denoiser(*asked)
    loss = middle.square().mean() + taps.features["down_blocks.0"].square().mean()
    loss.backward(inputs=held.leaves)
    held.collect_gradients()
    names = [name for name, _ in run.networks.roles.named_parameters("fake_score")]
    got = {n: p.grad for n, p in zip(names, held.parameters, strict=True) if p.grad is not None}
    whole = dict(held.whole(got, [names.index(name) for name in got]))
    if run.is_main:
        save_file({name: tensor.contiguous() for name, tensor in whole.items()}, folder / "weights.safetensors")


def train(pipeline: Any, case: str, folder: Path, world: int, **settings) -> None:
    """The whole loop with Adam and checkpoints; leaves all weights, averages and moments in the folder."""
    run = trainer(pipeline, case, folder, world, **settings)
    assert run.train() == "done"
    _write_weights(run, folder)


def distill(teacher: Path, folder: Path, **settings) -> None:
    """From a recipe to an exported student, with previews and validation on the way."""
    import fastdiff

    defaults = {"max_train_steps": 2, "validation_steps": 2, "validation_samples": 4, "report_to": "none"}
    defaults |= {"train_batch_size": 2, "fsdp": "full_shard", "resolution": 32, "ema_decay": 0.5, "log_every": 1}
    fastdiff.distill(teacher, "dmd2", list(PROMPTS), output_dir=str(folder), **(defaults | settings))


def stopped(pipeline: Any, folder: Path, world: int) -> None:
    """One process gets a signal in step 2; both stop after step 3 with one checkpoint."""
    run = trainer(pipeline, "lora", folder, world, fsdp="no", max_train_steps=6, checkpointing_steps=100)
    step, second = run.train_step, run.accelerator.process_index == 1

    def interrupted(batches: list) -> None:
        if second and run.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        step(batches)

    run.train_step = interrupted
    assert run.train() == ("SIGTERM" if second else "another process")
    assert run.step == 3
    assert [path.name for path in (folder / "checkpoints").glob("step-*")] == ["step-3"]


def metered() -> None:
    """Shared metrics are means over processes, others are a process's own; who is not finite is known to both."""
    second = Accelerator().process_index == 1
    metrics = DeferredMetrics()
    for step in (1, 2):
        metrics.add("own", torch.tensor(7.0 if second else 5.0), step)
        metrics.add("loss/a", torch.tensor(step + 2.0 * second), step, shared=True)
    assert metrics.read() == {"loss/a": 2.5, "own": 7.0 if second else 5.0}
    for step in (3, 4):
        bad = float("nan") if second and step == 4 else 1.0
        metrics.add("loss/a", torch.tensor(bad), step, shared=True)
    with pytest.raises(NonFiniteError, match="loss/a is not finite at step 4"):
        metrics.read()


def part(folder: Path) -> None:
    """The other process comes late; the first must still be there."""
    if Accelerator().process_index == 1:
        time.sleep(1)
        (folder / "late").touch()
    leave_together()
    assert (folder / "late").exists()
    assert not dist.is_initialized()


def _write_weights(run: Trainer, folder: Path) -> None:
    found = {f"{group}/{name}": t for group, tensors in run.tensor_groups().items() for name, t in tensors.items()}
    if run.is_main:
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in found.items()}, folder / "weights.safetensors"
        )
    run.accelerator.wait_for_everyone()


def launch(job: Callable, processes: int, *arguments: Any, node: int | None = None, **settings: Any) -> None:
    """Runs a job in real processes that gloo connects; launchers are tested in test_failures.py.

    They are forked from a server that has done the imports: a test process whose backward has run cannot be forked.

    Args:
        node: how many of them make a node, where one machine stands for several.
    """
    multiprocessing.set_forkserver_preload(["accelerate", "fastdiff.engine", "fastdiff.models.teacher"])
    # Hosted here, as torchrun does it: nobody can take the port first, and the first to exit does not end it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": node or processes, "MASTER_PORT": store.port}
    work = pickle.dumps((job, arguments, settings))  # by value: shared tensors would be more files than one may pass
    start_processes(_work, (world, work), processes, start_method="forkserver")


def _work(rank: int, world: dict[str, int], work: bytes) -> None:
    told = world | {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    told |= {"TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({name: str(value) for name, value in told.items()})
    torch.set_num_threads(1)
    job, arguments, settings = pickle.loads(work)
    job(*arguments, **settings)
    leave_together()
