"""What a run writes beside its weights, and what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from engine_helpers import weights

from fastdiff.engine import Settings
from fastdiff.engine.files import whole_folder, writable_folder
from fastdiff.engine.memory import state_memory
from fastdiff.engine.metrics import DeferredMetrics, NonFiniteError
from fastdiff.engine.previews import Previews, sample_role


def test_a_run_leaves_previews_metrics_and_checkpoints(make_trainer):
    hooks = {"on_preview": Previews(["a red apple", "a dog"], teacher_steps=2)}
    trainer = make_trainer(hooks=hooks, max_train_steps=2, validation_steps=2, report_to="tensorboard")
    assert trainer.train() == "done"
    lines = [json.loads(line) for line in (trainer.folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert {"loss/student/distribution_matching", "loss/student/gan", "grad_norm/student"} <= lines[0].keys()
    assert "loss/student/gan" not in lines[1]  # the student steps every second time
    assert {"grad_norm/fake_score/denoising", "grad_norm/fake_score/discriminator"} <= lines[0].keys()
    assert sorted(path.name for path in (trainer.folder / "previews").iterdir()) == ["step-0.png", "step-2.png"]
    assert list((trainer.folder / "logs").rglob("events.out.tfevents*"))


def test_the_start_proves_checkpoint_preview_and_export(make_trainer):
    seen = []
    hooks = {
        "on_start": lambda trainer, label: seen.append(("export", label, trainer.step)),
        "on_preview": lambda trainer, label: seen.append(("preview", label, trainer.step)),
    }
    trainer = make_trainer(hooks=hooks, max_train_steps=1)
    trainer.train()
    assert seen[:2] == [("export", "untrained", 0), ("preview", "step-0", 0)]
    assert not (trainer.folder / "checkpoints" / "untrained").exists()  # proven, and no longer needed


def test_a_failing_export_ends_the_run_before_it_begins(make_trainer):
    def fail(trainer, label):
        raise OSError("disk full")

    trainer = make_trainer(hooks={"on_start": fail})
    with pytest.raises(OSError, match="disk full"):
        trainer.train()
    assert trainer.step == 0


def test_the_best_checkpoint_is_kept(make_trainer):
    scores = iter([3.0, 1.0, 2.0])
    trainer = make_trainer(hooks={"validate": lambda run: next(scores)}, max_train_steps=3, validation_steps=1)
    trainer.train()
    state = trainer.checkpoints.read_state(trainer.checkpoints.folder / "best")
    assert (state["step"], state["best"]) == (2, 1.0)


def test_zero_steps_leave_the_teacher(make_trainer):
    trainer = make_trainer(max_train_steps=0)
    before = weights(trainer)
    assert trainer.train() == "done"
    after = weights(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_averages_are_what_is_evaluated(make_trainer):
    trainer = make_trainer(max_train_steps=3, ema_decay=0.5, method_config={"student_update_every": 1})
    trainer.train()
    live = [parameter.detach().clone() for parameter in trainer.networks.parameters("student")]
    with trainer.student.evaluated():
        averaged = [parameter.detach().clone() for parameter in trainer.networks.parameters("student")]
    assert any(not torch.equal(a, b) for a, b in zip(live, averaged))
    assert all(torch.equal(a, b) for a, b in zip(live, trainer.networks.parameters("student")))


def test_previews_do_not_depend_on_the_batch(make_trainer):
    trainer = make_trainer()
    cond = trainer.teacher.encode(["a dog", "blue cat"], 32)
    spec = trainer.method.sampler()
    both = sample_role(trainer, cond, spec)
    second = sample_role(trainer, cond[1:], spec, first_index=1)
    torch.testing.assert_close(both[1:], second, atol=1e-4, rtol=1e-4)


def test_memory_counts_what_is_held(make_trainer):
    trainer = make_trainer(student="full", fake_score="lora")
    memory = state_memory(trainer.networks, trainer.optimizers)
    base = sum(p.numel() * 4 for n, p in trainer.networks.roles.base.named_parameters() if "lora_" not in n)
    trained = sum(p.numel() * 4 for o in trainer.optimizers.values() for p in o.parameters)
    assert (memory.frozen, memory.trained, memory.gradients, memory.optimizer) == (base, trained, trained, 2 * trained)


def test_the_first_bad_term_is_named():
    metrics = DeferredMetrics()
    for step, value in enumerate([1.0, float("nan"), 2.0], start=1):
        metrics.add("loss/a", torch.tensor(value), step)
    metrics.add("loss/b", torch.tensor(float("inf")), 3)
    with pytest.raises(NonFiniteError, match="loss/a is not finite at step 2"):
        metrics.read()
    metrics.add("loss/a", torch.tensor(4.0), 4)
    assert metrics.read() == {"loss/a": 4.0}


def test_folders_are_whole_or_absent(tmp_path):
    target = tmp_path / "step-1"
    with pytest.raises(RuntimeError), whole_folder(target) as aside:
        (aside / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with whole_folder(target) as aside:
        (aside / "whole").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_a_folder_that_is_replaced_is_never_lost(tmp_path, monkeypatch):
    """Killed between its two renames, the old folder is back with the next one that is written, whatever becomes of it."""
    target, rename = tmp_path / "best", os.replace
    with whole_folder(target) as aside:
        (aside / "old").write_text("x")

    def killed(source, destination):
        if Path(destination) == target:
            raise KeyboardInterrupt
        rename(source, destination)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt), whole_folder(target) as aside:
        (aside / "new").write_text("x")
    monkeypatch.undo()
    assert not target.exists()
    with pytest.raises(RuntimeError), whole_folder(target):
        raise RuntimeError
    assert (target / "old").is_file()
    with whole_folder(target) as aside:
        (aside / "new").write_text("x")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_an_output_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(OSError, match=r"taken cannot be written .* another --output_dir"):
        writable_folder(tmp_path / "taken")


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", float("nan")), ("train_batch_size", 0), ("adam_beta1", 1.0), ("max_train_steps", -1)],
)
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        Settings(**{name: value})


def test_unknown_trackers_are_refused(make_trainer):
    with pytest.raises(ValueError, match="report_to 'tensorbaord'"):
        make_trainer(report_to="tensorbaord").train()


def test_learning_rates_follow_the_steps_of_the_run(make_trainer):
    """A group that steps every second time still ends its schedule with the run."""
    trainer = make_trainer(max_train_steps=4, lr_scheduler="linear", learning_rate=1.0)
    rates = []
    for batches in trainer.batches.steps(0):
        trainer.train_step(batches)
        rates.append({name: optimizer.schedule.get_last_lr()[0] for name, optimizer in trainer.optimizers.items()})
    assert [rate["student"] for rate in rates] == pytest.approx([0.75, 0.5, 0.25, 0.0])
    assert all(len(set(rate.values())) == 1 for rate in rates)
