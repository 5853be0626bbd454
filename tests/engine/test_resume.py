"""k steps, stop, resume, n steps equal k + n steps straight, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from engine_helpers import assert_equal, weights

RUNS = [
    ("dmd2", {"student": "lora", "fake_score": "lora", "ema_decay": 0.9}),
    ("dmd2", {"student": "full", "fake_score": "lora", "lr_scheduler": "cosine", "lr_warmup_steps": 2}),
    ("lcm", {"student": "full", "ema_decay": 0.9}),
]


@pytest.mark.parametrize(("method", "settings"), RUNS)
def test_a_resumed_run_equals_a_straight_one(make_trainer, tmp_path, method, settings):
    straight = make_trainer(method, output_dir=str(tmp_path / "straight"), max_train_steps=5, **settings)
    straight.train()
    first = make_trainer(
        method, output_dir=str(tmp_path / "split"), max_train_steps=5, checkpointing_steps=3, **settings
    )
    for batches in first.batches.steps(0):
        first.train_step(batches)
        if first.step == 3:
            break
    first.save()
    second = make_trainer(
        method, output_dir=str(tmp_path / "split"), max_train_steps=5, resume_from_checkpoint="latest", **settings
    )
    second.train()
    assert second.step == 5
    assert_equal(weights(second), weights(straight))


def test_resuming_without_a_checkpoint_starts_at_zero(make_trainer):
    trainer = make_trainer(max_train_steps=1, resume_from_checkpoint="latest")
    trainer.train()
    assert trainer.step == 1


def test_a_half_written_checkpoint_is_ignored(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.save("step-1")
    (trainer.checkpoints.folder / "step-9").mkdir()
    (trainer.checkpoints.folder / ".step-10.partial").mkdir()
    assert trainer.checkpoints.find("latest").name == "step-1"


def test_a_checkpoint_that_lost_a_file_is_named(make_trainer):
    trainer = make_trainer()
    trainer.save("step-1")
    (trainer.checkpoints.folder / "step-1" / "student.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks student\.safetensors"):
        trainer.checkpoints.load(trainer, trainer.checkpoints.folder / "step-1")


def test_checkpoints_of_another_method_are_refused(make_trainer, tmp_path):
    make_trainer("dmd2").save("step-1")
    with pytest.raises(ValueError, match="method 'dmd2', this run has 'lcm'"):
        make_trainer("lcm", resume_from_checkpoint="latest").train()


def test_checkpoints_of_another_teacher_are_refused(make_trainer):
    trainer = make_trainer()
    trainer.save("step-1")
    state = trainer.checkpoints.folder / "step-1" / "state.json"
    values = json.loads(state.read_text())
    values["teacher"]["fingerprint"] = "another"
    state.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="teacher 'another'"):
        make_trainer(resume_from_checkpoint="latest").train()


def test_another_rank_is_refused_and_nothing_is_loaded(make_trainer):
    make_trainer(lora_rank=4).save("step-1")
    other = make_trainer(lora_rank=8, resume_from_checkpoint="latest")
    before = weights(other)
    with pytest.raises(ValueError, match="do not fit role"):
        other.train()
    assert_equal(weights(other), before)


def test_old_checkpoints_are_dropped(make_trainer):
    trainer = make_trainer(max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=2)
    trainer.train()
    assert [path.name for path in trainer.checkpoints.numbered()] == ["step-3", "step-4"]


def test_a_signal_checkpoints_and_stops(make_trainer):
    trainer = make_trainer(max_train_steps=50)
    step = trainer.train_step

    def step_then_signal(batches):
        step(batches)
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.train_step = step_then_signal
    assert trainer.train() == "SIGTERM"
    assert trainer.checkpoints.find("latest").name == "step-2"


def test_weights_survive_a_non_finite_step(make_trainer):
    from fastdiff.engine.metrics import NonFiniteError

    trainer = make_trainer(max_train_steps=3, log_every=3)
    batches = next(trainer.batches.steps(0))
    trainer.train_step(batches)
    before = {name: p.detach().clone() for name, p in trainer.networks.roles.named_parameters("student")}
    broken = [type(b)(b.indices, b.cond, b.null, b.latent_shape, b.latents) for b in batches]
    broken[0].cond.tensors["prompt_embeds"][:] = float("nan")
    trainer.step = 2  # a student's turn
    trainer.train_step(broken)
    after = dict(trainer.networks.roles.named_parameters("student"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(NonFiniteError, match=r"not finite at step 3"):
        trainer.metrics.read()


KILL_SCRIPT = """
import sys
sys.path[:0] = [{root!r} + "/tests", {root!r} + "/tests/engine"]
import conftest as pipelines
from engine_helpers import PROMPTS, Latents
from fastdiff.engine import Settings, Trainer
from fastdiff.methods import DMD2, DMD2Config
from fastdiff.models.teacher import Teacher
trainer = Trainer(DMD2(DMD2Config(student_update_every=2)), Teacher(pipelines.build_tiny_sd(), "tiny"), Latents(PROMPTS),
    Settings(output_dir={folder!r}, max_train_steps=60, train_batch_size=2, lora_rank=4, report_to="none", log_every=1,
             checkpointing_steps=2, validation_steps=1000, resume_from_checkpoint="latest", seed=1))
print("resumed", trainer.train() if len(sys.argv) < 2 else "", flush=True)
"""


@pytest.mark.slow
def test_ten_kills_lose_at_most_the_steps_since_the_last_checkpoint(tmp_path):
    script = textwrap.dedent(KILL_SCRIPT)
    root = str(Path(__file__).parents[2])
    killed, reached = tmp_path / "killed", []
    for attempt in range(10):
        code = script.format(root=root, folder=str(killed))
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root
        )
        log = killed / "logs" / "metrics.jsonl"
        seen = _lines(log)
        while process.poll() is None and _lines(log) < seen + 3 + attempt % 3:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        steps = [
            int(path.name[5:]) for path in (killed / "checkpoints").glob("step-*") if (path / "state.json").is_file()
        ]
        logged = json.loads(log.read_text().splitlines()[-1])["step"]
        assert max(steps, default=0) >= logged - 2
        reached.append(max(steps, default=0))
    assert reached == sorted(reached)
    assert reached[-1] > reached[0]
    for folder in (killed, tmp_path / "straight"):
        subprocess.run([sys.executable, "-c", script.format(root=root, folder=str(folder))], check=True, cwd=root)
    from safetensors.torch import load_file

    for path in sorted((tmp_path / "straight" / "checkpoints" / "step-60").glob("*.safetensors")):
        assert_equal(load_file(path), load_file(killed / "checkpoints" / "step-60" / path.name))


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_run_that_stops_where_it_validates_has_the_same_best(make_trainer, tmp_path):
    """A checkpoint is written before its step is validated; the second score is the best, the third is not."""

    def validate(trainer):
        return {2: 3.0, 4: 1.0, 6: 2.0}[trainer.step]

    options = {"max_train_steps": 6, "checkpointing_steps": 2, "validation_steps": 2, "hooks": {"validate": validate}}
    straight = make_trainer(output_dir=str(tmp_path / "straight"), **options)
    straight.train()
    for stop in (2, 4):
        folder = str(tmp_path / f"stopped-{stop}")
        run = make_trainer(output_dir=folder, **options)
        step = run.train_step

        def step_then_signal(batches, run=run, step=step, stop=stop):
            step(batches)
            if run.step == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        run.train_step = step_then_signal
        assert run.train() == "SIGTERM"
        resumed = make_trainer(output_dir=folder, resume_from_checkpoint="latest", **options)
        assert resumed.train() == "done" and resumed.best == straight.best == 1.0
        best = resumed.checkpoints.read_state(resumed.checkpoints.folder / "best")
        assert best["step"] == 4 and best["best"] == 1.0
