"""Two ways of computing one thing give one trajectory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_helpers import weights

ROOT = Path(__file__).parents[2]


def trajectory(trainer) -> dict[str, torch.Tensor]:
    """The weights after training by plain gradient descent, which shows the gradients as they are."""
    for optimizer in trainer.optimizers.values():
        plain = torch.optim.SGD(optimizer.parameters, lr=1e-2, fused=True)
        optimizer.optimizer = plain
    for batches in trainer.batches.steps(0):
        trainer.train_step(batches)
    return {name: tensor for name, tensor in weights(trainer).items() if not name.startswith("optimizer")}


def assert_close(a, b, tolerance=1e-5):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], atol=tolerance, rtol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("method", ["dmd2", "lcm"])
def test_accumulation_equals_a_larger_batch(make_trainer, tmp_path, method):
    small = make_trainer(
        method, output_dir=str(tmp_path / "a"), train_batch_size=2, gradient_accumulation_steps=4, max_train_steps=3
    )
    large = make_trainer(method, output_dir=str(tmp_path / "b"), train_batch_size=8, max_train_steps=3)
    start = weights(small)
    result = trajectory(small)
    assert_close(result, trajectory(large))
    moved = [name for name, tensor in result.items() if not torch.equal(tensor, start[name])]
    assert len(moved) > len(result) / 2


def test_checkpointing_changes_no_gradient(make_trainer, tmp_path):
    plain = make_trainer(output_dir=str(tmp_path / "a"), max_train_steps=2)
    recomputed = make_trainer(output_dir=str(tmp_path / "b"), max_train_steps=2, gradient_checkpointing=True)
    assert_close(trajectory(plain), trajectory(recomputed), 1e-6)


def test_splitting_roles_changes_no_gradient(make_trainer, tmp_path):
    together = make_trainer(output_dir=str(tmp_path / "a"), max_train_steps=2)
    split = make_trainer(output_dir=str(tmp_path / "b"), max_train_steps=2, split_roles=True)
    assert_close(trajectory(together), trajectory(split), 1e-6)


def test_a_term_of_zero_weight_changes_nothing(make_trainer, tmp_path):
    """The discriminator's presence alone must not leak into the student."""
    without = make_trainer(method_config={"gan_weight": 0.0}, output_dir=str(tmp_path / "a"), max_train_steps=1)
    tiny = make_trainer(method_config={"gan_weight": 1e-12}, output_dir=str(tmp_path / "b"), max_train_steps=1)
    a, b = trajectory(without), trajectory(tiny)
    student = [name for name in a if name.startswith("student/")]
    assert_close({name: a[name] for name in student}, {name: b[name] for name in student}, 1e-7)


METHODS = {
    "dmd2": "DMD2(DMD2Config(student_update_every=2, timesteps=(999, 499), gan_weight=1e-3))",
    "lcm": "LCM(LCMConfig())",
    "rectified_flow": "RectifiedFlow(RectifiedFlowConfig())",
    "scm": "SCM(SCMConfig(tangent_warmup=0))",
    "tscd": "TSCD(TSCDConfig(num_segments=1, score_weight=0.5))",
    "pcm": "PCM(PCMConfig())",
    "lightning": "Lightning(LightningConfig())",
    # A gap of two velocities near zero is divided by itself, which shows nothing but rounding: guidance opens it.
    "freeflow": "FreeFlow(FreeFlowConfig(correct_every=2, guidance_scale=4.0, norm_constant=1.0))",
    "apex": "APEX(APEXConfig())",
}
FULL = ("tscd", "freeflow", "apex")
BATCH = {"apex": 8}  # its four groups of samples are the same ones on two processes
PROCESS = """
import json, sys
sys.path[:0] = [{root!r} + "/tests", {root!r} + "/tests/engine"]
import torch
import conftest as pipelines
from engine_helpers import PROMPTS, Pairs, weights
from fastdiff.engine import Settings, Trainer
from fastdiff.engine.distributed import leave_together
from fastdiff.methods import *
from fastdiff.models.teacher import Teacher
trainer = Trainer({method}, Teacher(pipelines.build_tiny_sd(), "tiny"), Pairs(PROMPTS),
    Settings(output_dir={folder!r}, max_train_steps=3, train_batch_size={batch}, student={student!r}, lora_rank=4,
        report_to="none", log_every=1))
for optimizer in trainer.optimizers.values():
    optimizer.optimizer = torch.optim.SGD(optimizer.parameters, lr=1e-2, fused=True)
losses = []
for batches in trainer.batches.steps(0):
    trainer.train_step(batches)
    losses.append(trainer.metrics.read())
if trainer.is_main:
    from safetensors.torch import save_file
    kept = {{k: v.contiguous() for k, v in weights(trainer).items() if not k.startswith("optimizer")}}
    save_file(kept, {folder!r} + "/weights.safetensors")
    json.dump([trainer.accelerator.num_processes, losses], open({folder!r} + "/losses.json", "w"))
leave_together()
"""


def _launch(folder: Path, method: str, processes: int, batch: int) -> tuple[int, list[dict[str, float]]]:
    script = folder.with_suffix(".py")
    values = {"method": METHODS[method], "student": "full" if method in FULL else "lora", "batch": batch}
    script.write_text(PROCESS.format(root=str(ROOT), folder=str(folder), **values))
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        str(processes),
        "--num_machines",
        "1",
    ]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else []
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, str(script)], env=environment, capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads((folder / "losses.json").read_text())


@pytest.mark.launch
@pytest.mark.parametrize("method", [m if m == "dmd2" else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_two_real_processes_equal_one(method, tmp_path):
    from safetensors.torch import load_file

    batch = BATCH.get(method, 4)
    one, one_losses = _launch(tmp_path / "one", method, 1, batch)
    two, two_losses = _launch(tmp_path / "two", method, 2, batch // 2)
    assert (one, two) == (1, 2)
    for a, b in zip(one_losses, two_losses, strict=True):
        for name in a:
            if name.startswith("loss/"):
                assert b[name] == pytest.approx(a[name], abs=1e-5), name
    assert_close(
        load_file(tmp_path / "one" / "weights.safetensors"), load_file(tmp_path / "two" / "weights.safetensors")
    )
