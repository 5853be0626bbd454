"""Sharded over N processes, a run does what one process does, goes on on any number of them, and exports the same."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from sharding_jobs import CASES, descend, distill, feature_gradients, launch, train

from fastdiff.engine import Settings


@pytest.fixture
def folder(tmp_path):
    """Makes a folder."""

    def make(name):
        (tmp_path / name).mkdir()
        return tmp_path / name

    return make


def differences(a, b, prefix=""):
    """The largest difference of each tensor that two runs have left."""
    a, b = load_file(a / "weights.safetensors"), load_file(b / "weights.safetensors")
    assert a.keys() == b.keys()
    found = {name: float((a[name] - b[name]).abs().max()) for name in a if name.startswith(prefix)}
    assert found and all(math.isfinite(value) for value in found.values())
    return found


def assert_close(a, b):
    found = differences(a, b)
    assert max(found.values()) < 1e-5, max(found, key=found.get)


def assert_equal_runs(a, b, processes):
    """Metrics and weights; returns what a process held of each."""
    one, many = (json.loads((path / "report.json").read_text()) for path in (a, b))
    assert (one["world"], many["world"]) == (1, processes)
    for ours, theirs in zip(one["metrics"], many["metrics"], strict=True):
        for name in theirs:
            if name.startswith(("loss/", "grad_norm/")):
                assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-5), name
    assert_close(a, b)
    return one, many


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.parametrize("case", [case for case in CASES if case != "bf16"])
def test_two_processes_equal_one(_sd_original, folder, case):
    start, one, two = folder("start"), folder("one"), folder("two")
    descend(_sd_original, case, start, 1, max_train_steps=0)
    descend(_sd_original, case, one, 1)
    for group in ("student/", "fake_score/") if case != "lcm" else ("student/", "ema/"):
        assert max(differences(one, start, group).values()) > 1e-3  # far more than the runs may differ
    launch(descend, 2, _sd_original, case, two, 2)
    alone, held = assert_equal_runs(one, two, 2)
    adapters = 2 * alone["student"] if case.startswith("lora") else 0
    assert held["base"] == pytest.approx((alone["base"] - adapters) / 2 + adapters, rel=0.02)
    assert held["student"] == (alone["student"] if adapters else pytest.approx(alone["student"] / 2, rel=0.02))


@pytest.mark.slow
@pytest.mark.launch
def test_features_alone_carry_the_gradient(_sd_original, folder):
    one, two = folder("one"), folder("two")
    feature_gradients(_sd_original, one, 1)
    launch(feature_gradients, 2, _sd_original, two, 2)
    gradients = load_file(one / "weights.safetensors")
    assert (
        min(float(gradients[name].abs().max()) for name in ("conv_in.weight", "time_embedding.linear_1.weight")) > 1e-3
    )
    assert_close(one, two)


@pytest.mark.slow
@pytest.mark.launch
def test_gathering_in_half_precision_changes_little(_sd_original, folder):
    start, one, two = folder("start"), folder("one"), folder("two")
    descend(_sd_original, "bf16", start, 1, max_train_steps=0)
    descend(_sd_original, "bf16", one, 1)
    launch(descend, 2, _sd_original, "bf16", two, 2)
    start, one, two = (load_file(path / "weights.safetensors") for path in (start, one, two))
    for group in ("student/", "fake_score/"):
        moved, apart = (
            torch.cat([(one[name] - other[name]).flatten() for name in one if name.startswith(group)]).norm()
            for other in (start, two)
        )
        assert apart < 0.1 * moved


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.parametrize("case", ["full", "lora"])
def test_two_nodes_of_two_equal_one(_sd_original, folder, case):
    one, four = folder("one"), folder("four")
    descend(_sd_original, case, one, 1)
    launch(descend, 4, _sd_original, case, four, 4, fsdp="hybrid_shard", node=2)
    alone, held = assert_equal_runs(one, four, 4)
    if case == "full":  # a half, not a quarter
        assert held["student"] == pytest.approx(alone["student"] / 2, rel=0.02)


@pytest.fixture(scope="module")
def on_two(_sd_original, tmp_path_factory):
    """A run of two steps on two processes, with a checkpoint after each."""
    run = tmp_path_factory.mktemp("two")
    launch(train, 2, _sd_original, "full", run, 2)
    return run


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_checkpoint_of_two_processes_goes_on_on_any_number(_sd_original, on_two, tmp_path, processes):
    how = (_sd_original, "full", tmp_path, processes)
    resume = {"resume_from_checkpoint": str(on_two / "checkpoints" / "step-1")}
    if processes == 1:
        train(*how, **resume)
    else:
        launch(train, processes, *how, **resume)
    found = differences(on_two, tmp_path)
    groups = {name.split("/")[0] for name in found}
    assert groups >= {"student", "fake_score", "discriminator", "ema", "optimizer_student", "optimizer_fake_score"}
    if processes == 2:
        assert set(found.values()) == {0.0}
    assert_close(on_two, tmp_path)


@pytest.mark.slow
@pytest.mark.launch
def test_a_checkpoint_of_one_process_goes_on_on_two(_sd_original, folder):
    one, two = folder("one"), folder("two")
    train(_sd_original, "full", one, 1)
    step = one / "checkpoints" / "step-1"
    launch(train, 2, _sd_original, "full", two, 2, resume_from_checkpoint=str(step))
    assert_close(one, two)
    ours, theirs = one / "checkpoints" / "step-2", two / "checkpoints" / "step-2"
    assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in theirs.iterdir())


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_sharded_run_validates_shows_and_exports(tiny_sd_folder, tmp_path, kind):
    run = tmp_path / "run"
    launch(distill, 2, tiny_sd_folder, run, student=kind, fake_score=kind, lora_rank=4)
    assert {path.name for path in (run / "previews").iterdir()} == {"step-0.png", "step-2.png"}
    assert (run / "checkpoints" / "best" / "state.json").is_file()
    record = json.loads((run / "student" / "fastdiff.json").read_text())
    assert record["load_back"]["max_error"] < 1e-4 and record["teacher"]["fingerprint"]
    averaged = load_file(run / "checkpoints" / "step-2" / "ema.safetensors")
    live = load_file(run / "checkpoints" / "step-2" / "student.safetensors")
    names = _parameter_names(run) if kind == "full" else list(live)
    assert names and set(names) == live.keys()
    if kind == "full":
        (file,) = (run / "student" / "unet").glob("*.safetensors")
        exported = load_file(file)
        assert all(torch.equal(exported[name], averaged[str(index)]) for index, name in enumerate(names))
        assert any(not torch.equal(exported[name], live[name]) for name in names)


def _parameter_names(run):
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel.from_pretrained(run / "student" / "unet")
    return [name for name, _ in network.named_parameters() if "cond_proj" not in name]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fake_score": "full", "fake_score_in_backward": True}, "16 bytes a weight"),
        ({"fake_score": "full", "fake_score_dtype": "bf16", "mixed_precision": "bf16"}, "16 bytes a weight"),
        ({"student": "full", "use_8bit_adam": True}, "share"),
        ({"torch_compile": True}, "have not been made to work"),
        ({"quantize_base": "int8"}, "have not been made to work"),
    ],
)
def test_what_cannot_be_cut_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(fsdp="full_shard", **settings)
