"""Measurements on tiny networks: they run, and the bare passes are those of the step."""

import json

import pytest
import torch

from fastdiff.cli import main
from fastdiff.planning.bare import Bare, record
from fastdiff.planning.measure_memory import CASES, SUITE
from fastdiff.planning.measure_step import _trainer, measure
from fastdiff.planning.walk import batch_of


def test_bare_networks_compute_what_the_step_computes(tmp_path):
    trainer = _trainer("dmd2", "tiny", 2, str(tmp_path), {"gradient_checkpointing": True})
    work = batch_of(trainer, trainer.method)
    trainer.step = 1
    with torch.no_grad():  # adapters that do something
        for role in ("student", "fake_score"):
            for parameter in trainer.networks.parameters(role):
                parameter.normal_(0, 0.1)
    before = {name: trainer.networks.roles.state_dict(name) for name in ("student", "fake_score")}
    before = {name: {k: v.clone() for k, v in group.items()} for name, group in before.items()}
    turns = record(trainer, work)
    assert [(turn.trains, [(len(c.x), c.with_graph) for c in turn.calls]) for turn in turns] == [
        (("student",), [(2, True), (6, False)]),
        (("fake_score",), [(2, True)]),
    ]
    for name, group in before.items():
        trainer.networks.roles.load_state_dict(name, group)
    bare = Bare(trainer, turns)
    denoiser = trainer.networks.denoiser
    for turn in turns:
        for call in turn.calls:
            bare.at_work[:] = call.parts
            theirs = bare.family.call(bare.networks[call.network], call.x, call.time, call.cond)
            with denoiser.roles.active.use(call.parts):
                ours = denoiser.family.call(denoiser.roles.base, call.x, call.time, call.cond)
            torch.testing.assert_close(theirs, ours)
    weights = [parameter.clone() for group in bare.parameters.values() for parameter in group]
    bare.step()
    moved = [parameter for group in bare.parameters.values() for parameter in group]
    assert sum(not torch.equal(a, b) for a, b in zip(weights, moved)) > 0.95 * len(moved) > 0


@pytest.mark.parametrize("method", ["dmd2", "lcm"])
def test_step_times_come_in_pairs(method):
    row = measure(method, "tiny", batch=1, pairs=2)
    assert row["step_seconds"] > 0 and row["bare_seconds"] > 0 and row["ratio"] > 0.5


@pytest.mark.slow
def test_memory_is_measured_in_a_fresh_process(tmp_path, capsys):
    output = tmp_path / "memory.json"
    assert main(["bench", "memory", "--case", "tiny-lora", "--output", str(output)]) == 0
    row = json.loads(output.read_text())["tiny-lora"]
    assert row["peak"] >= 0 and row["seconds_a_step"] > 0 and row["predicted"] == sum(row["split"].values()) > 0
    assert "tiny-lora" in capsys.readouterr().out


def test_cases_that_are_measured_by_default_fit_small_machines():
    assert len(SUITE) >= 6 and all("block_out_channels" in CASES[name].network for name in SUITE)


def test_unknown_names_are_refused(capsys):
    assert main(["bench", "memory", "--case", "huge"]) == 2
    assert "unknown case 'huge'" in capsys.readouterr().err
    assert main(["bench", "speed"]) == 2
