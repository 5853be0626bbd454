"""When one process fails all of them end, the cause is named, and the run goes on from its last checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from sharding_jobs import launch, metered, part, stopped, train

from fastdiff.engine import announced
from fastdiff.engine.announced import announced_processes

ROOT = Path(__file__).parents[2]

WORKER = """
import os, signal, sys
sys.path[:0] = [{root!r} + "/tests", {root!r} + "/tests/engine"]
import conftest as pipelines
from sharding_jobs import trainer
how, folder = sys.argv[1:3]
run = trainer(pipelines.build_tiny_sd(), "full", folder, 2, max_train_steps=6, resume_from_checkpoint="latest")
step = run.train_step
def fails(batches):
    if run.accelerator.process_index == 1 and run.step == 4:  # the last checkpoint is of step 4
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "raises":
            raise RuntimeError("the disk of this node is gone")
        if how == "nan":
            batches[0].cond.tensors["prompt_embeds"][:] = float("nan")
    step(batches)
run.train_step = fails
print("outcome", run.train(), flush=True)
"""
BOUND = 600
"""Seconds; torchrun itself gives processes 30 after it has told them to end, the rest is a busy machine."""


def _run(tmp_path: Path, how: str, folder: Path) -> subprocess.CompletedProcess:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT)))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", "0", str(script), how, str(folder)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=BOUND)


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("killed", "SIGKILL"),
        ("raises", "the disk of this node is gone"),
        ("nan", "is not finite at step 5"),
    ],
)
def test_one_failing_process_ends_all_and_the_run_goes_on(_sd_original, tmp_path, how, cause):
    folder = tmp_path / "run"
    failed = _run(tmp_path, how, folder)
    assert failed.returncode != 0
    assert cause in failed.stderr
    assert "outcome" not in failed.stdout  # neither process came to the end
    if how != "nan":  # which all processes see at once
        assert "rank      : 1" in failed.stderr
    assert sorted(path.name for path in (folder / "checkpoints").glob("step-*")) == ["step-3", "step-4"]
    launch(train, 2, _sd_original, "full", folder, 2, max_train_steps=6, resume_from_checkpoint="latest")
    assert load_file(folder / "checkpoints" / "step-6" / "student.safetensors")


@pytest.mark.launch
def test_a_signal_to_one_process_stops_all_at_the_same_step(_sd_original, tmp_path):
    launch(stopped, 2, _sd_original, tmp_path, 2)


@pytest.mark.launch
def test_metrics_of_two_processes():
    launch(metered, 2)


@pytest.mark.launch
def test_processes_leave_together(tmp_path):
    """One that exits early may break the other's last exchange, and a run that has done all its work then fails."""
    launch(part, 2, tmp_path)


@pytest.mark.slow
@pytest.mark.launch
def test_a_launcher_that_starts_too_few_processes_is_noticed(tmp_path):
    script = tmp_path / "alone.py"
    script.write_text("from fastdiff.engine.distributed import warn_if_alone\nwarn_if_alone(1)\n")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]
    found = {}
    for processes in ("1", "2"):
        command = [*launcher, "--num_processes", processes, str(script)]
        found[processes] = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=BOUND).stderr
    assert "2 processes were announced but one is running" in found["2"]
    assert "--multi_gpu --num_processes 2" in found["2"]
    assert "announced" not in found["1"]


@pytest.mark.parametrize(
    ("command", "processes"),
    [
        (["python", "/bin/accelerate", "launch", "--cpu", "--num_processes=3", "train.py", "--num_processes", "9"], 3),
        (["python", "-m", "accelerate.commands.launch", "--num-processes", "2", "train.py"], 2),
        (["accelerate", "launch", "--config_file", "{config}", "train.py"], 4),
        (["python", "train.py", "--num_processes", "5"], 1),
        (["bash", "launch"], 1),
    ],
)
def test_what_a_launcher_said(monkeypatch, tmp_path, command, processes):
    config = tmp_path / "cpu.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 4\nuse_cpu: true\n"
    )
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(announced, "_parent_command", lambda: [word.format(config=config) for word in command])
    assert announced_processes() == processes


def test_torchrun_tells_its_children(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert announced_processes() == 4
