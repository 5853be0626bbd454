"""Measurements on tiny networks: they run, and the bare passes are those of the step."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastdiff.cli import main
from fastdiff.methods import METHODS
from fastdiff.planning.bare import Bare, record
from fastdiff.planning.measure_inference import record as inference_record
from fastdiff.planning.measure_memory import CASES, SUITE
from fastdiff.planning.measure_step import _steps, _trainer, measure
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
    turns = record(trainer, lambda: trainer.train_step([work]))
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


def products(work) -> int:
    """Operations in matrix products, convolutions and attention, forward, backward and in forward mode."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


FAST = ("dmd2", "scm")
SLOW = [pytest.param(one.info.name, marks=pytest.mark.slow) for one in METHODS if one.info.name not in FAST]


@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_bare_passes_are_those_of_the_step_and_no_more(name, tmp_path):
    trainer = _trainer(name, "tiny", 4, str(tmp_path), {})
    work, steps = batch_of(trainer, trainer.method), _steps(trainer.method)

    def step():
        for trainer.step in steps:
            trainer.train_step([work])

    bare = Bare(trainer, record(trainer, step))
    theirs, ours = products(bare.step), products(step)
    assert 0 < theirs <= ours <= 1.001 * theirs


def test_a_measured_step_takes_turns_of_every_kind(tmp_path):
    trainer = _trainer("f_distill", "tiny", 2, str(tmp_path), {})  # steps the student or its critics
    assert _steps(trainer.method) == [1, 2]
    trains = [update.trains for step in (1, 2) for update in trainer.method.updates(step)]
    assert trains == [("fake_score", "discriminator"), ("student",)]


@pytest.mark.parametrize("method", ["dmd2", "lcm"])
def test_step_times_come_in_pairs(method):
    row = measure(method, "tiny", batch=1, pairs=2)
    assert row["step_seconds"] > 0 and row["bare_seconds"] > 0 and row["ratio"] > 0.5
    assert row["cpu_ratio"] > 0.5


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


def test_a_picture_is_timed_beside_its_parts(tiny_sd_folder, tmp_path, capsys):
    output = tmp_path / "inference.json"
    arguments = ["--teacher", str(tiny_sd_folder), "--pairs", "2", "--output", str(output)]
    assert main(["bench", "inference", "teacher", *arguments]) == 0
    row = json.loads(output.read_text())["teacher"]
    assert row["calls"] == {"text encoder": 2, "network": 50, "decoder": 1}  # the pipeline's own default, guided
    parts = row["split_seconds"]
    assert set(parts) == {"text encoder", "network", "decoder"} and min(parts.values()) > 0
    assert row["ratio"] == pytest.approx(row["seconds"] / row["bare_seconds"], rel=0.5) and row["ratio"] > 0.8
    assert "teacher" in capsys.readouterr().out


def test_recorded_parts_give_what_the_pipeline_gave(tiny_sdxl):
    seen = []

    def whole():
        generator = torch.Generator().manual_seed(0)
        seen.append(
            tiny_sdxl("a dog", num_inference_steps=2, guidance_scale=1.0, generator=generator, output_type="pt")
        )

    with torch.no_grad():
        calls = inference_record(tiny_sdxl, whole)
        (decode,) = calls["decoder"]
        assert [len(calls[name]) for name in ("text encoder", "network")] == [2, 2]
        torch.testing.assert_close((decode()[0] / 2 + 0.5).clamp(0, 1), seen[0].images)
    assert "forward" not in vars(tiny_sdxl.unet) and "decode" not in vars(tiny_sdxl.vae)  # nothing is left behind
