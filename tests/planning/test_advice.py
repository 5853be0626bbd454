"""What is advised where memory is short: only what a run accepts, and the plan of several devices by arithmetic."""

import dataclasses
from collections import Counter

import pytest

from fastdiff.engine import Settings
from fastdiff.methods import METHODS, method_named
from fastdiff.planning import levers as module
from fastdiff.planning.advice import advise
from fastdiff.planning.levers import levers
from fastdiff.planning.plan import Plan, with_margin
from fastdiff.planning.scaling import scale
from fastdiff.planning.sharing import EXCHANGE, GATHERED, device_phases
from fastdiff.planning.tracker import ACTIVATIONS
from fastdiff.planning.walk import ENCODERS, FROZEN, GRADIENTS, OPTIMIZER, PROMPTS, TRAINED, Walk
from fastdiff.recipes.recipe import resolve

GB = 10**9
ADAPTERS = {"student": "lora", "fake_score": "lora", "mixed_precision": "bf16", "cast_teacher_unet": True}
COPIES = {"student": "full", "fake_score": "full"}
WALKED = Walk(
    phases={
        "student": Counter({FROZEN: 10 * GB, TRAINED: 20 * GB, OPTIMIZER: 40 * GB, ACTIVATIONS: 8 * GB, ENCODERS: GB}),
        PROMPTS: Counter({FROZEN: 10 * GB, TRAINED: 20 * GB, OPTIMIZER: 40 * GB, ENCODERS: 3 * GB}),
    },
    exchanged={"student": 10 * GB},
    buffer=10 * GB,
    whole_buffer=2 * GB,
    cut=Counter({FROZEN: 10 * GB, TRAINED: 16 * GB, GRADIENTS: 8 * GB, OPTIMIZER: 32 * GB}),
    gathered=30 * GB,
    largest_block=GB,
    sizes={"student": 2 * GB, "fake_score": 2 * GB},
    block_weights=2 * GB,
    resolution=1024,
)


@pytest.fixture(autouse=True)
def bitsandbytes(monkeypatch):
    """Advice depends on whether the package is there, not on what is in it."""
    monkeypatch.setattr(module, "find_spec", lambda name: object())


def recipe(**values):
    return resolve({"method": "dmd2", "train_batch_size": 4} | values)


def plan(gpus=1, sharded=False, walked=WALKED):
    return Plan("dmd2", "sdxl", 1024, 4, gpus, device_phases(walked, gpus, sharded), walked)


def offered(gpus=1, **values):
    return {lever.flags: lever for lever in levers(recipe(**values), plan(gpus))}


def test_a_base_under_adapters_goes_to_int8_and_then_to_nf4():
    first = offered(**ADAPTERS)["--quantize_base int8"]
    assert first.saving == 2 * GB
    second = offered(**ADAPTERS, quantize_base="int8")["--quantize_base nf4"]
    assert 0.4 * 2 * GB < second.saving < 0.5 * 2 * GB
    assert not any("quantize" in flags for flags in offered(**ADAPTERS, quantize_base="nf4"))


@pytest.mark.parametrize("values", [{"fake_score": "full"}, {"student": "full"}, {"fsdp": "full_shard"}])
def test_a_base_is_not_quantised_where_a_run_would_refuse_it(values):
    assert not any("quantize" in flags for flags in offered(**ADAPTERS | values))


def test_a_base_is_not_quantised_without_the_package(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert not any("quantize" in flags for flags in offered(**ADAPTERS))


def test_activations_are_offloaded_where_they_are_checkpointed():
    assert "--activation_offload" not in offered()
    assert offered(gradient_checkpointing=True)["--activation_offload"].saving > 0
    assert "--activation_offload" not in offered(gradient_checkpointing=True, activation_offload=True)


def test_sharding_is_for_several_devices_and_saves_what_the_plan_with_it_says():
    assert "--fsdp full_shard" not in offered(**COPIES)
    lever = offered(gpus=8, **COPIES)["--fsdp full_shard"]
    assert lever.saving == plan(gpus=8).tensors - plan(gpus=8, sharded=True).tensors > 40 * GB


@pytest.mark.parametrize(
    "values",
    [
        {"fsdp": "full_shard"},
        COPIES | {"use_8bit_adam": True},
        {"fake_score": "full", "fake_score_dtype": "bf16", "mixed_precision": "bf16"},
        {"quantize_base": "int8"},
        {"torch_compile": True},
    ],
)
def test_sharding_is_not_advised_beside_what_it_refuses(values):
    assert "--fsdp full_shard" not in offered(gpus=8, **values)


@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize("start", [COPIES, {"student": "lora", "fake_score": "full"}, ADAPTERS])
@pytest.mark.parametrize("order", [max, min])
def test_levers_can_be_taken_together(gpus, start, order):
    """Whatever is taken first, a run accepts what follows."""
    changed = recipe(**start)
    for _ in range(30):
        left = [lever for lever in levers(changed, plan(gpus)) if lever.saving > 0]
        if not left:
            break
        changed = changed.changed(**order(left, key=lambda lever: lever.saving).changes)
        changed.build(Settings)
    assert not left


def test_a_lever_pulled_twice_is_named_once():
    tiny = dataclasses.replace(WALKED, phases={"student": Counter({FROZEN: 10 * GB})})
    taken, _ = advise(recipe(**ADAPTERS), plan(walked=tiny), lambda _: plan(walked=tiny), GB)
    flags = [lever.flags for lever in taken]
    assert "--quantize_base nf4" in flags and "--quantize_base int8" not in flags
    assert next(lever for lever in taken if "nf4" in lever.flags).saving > 2.8 * GB
    assert [lever.saving for lever in taken] == sorted((lever.saving for lever in taken), reverse=True)


def test_a_device_holds_its_share_of_networks_and_all_of_adapters():
    phases = device_phases(WALKED, 4, sharded=True)
    step = phases["student"]
    assert step[FROZEN] == 10 * GB / 4
    assert step[TRAINED] == 16 * GB / 4 + 4 * GB
    assert step[OPTIMIZER] == 32 * GB / 4 + 8 * GB
    assert step[ACTIVATIONS] == 8 * GB and step[ENCODERS] == GB and step[GATHERED] == 2 * GB
    assert phases[PROMPTS][GATHERED] == 0  # encoders are whole
    assert phases[EXCHANGE][EXCHANGE] == 2 * GB  # adapters alone are averaged in a buffer
    assert phases[EXCHANGE][GRADIENTS] == 2 * GB + 8 * GB / 4
    assert device_phases(WALKED, 1, sharded=True) == WALKED.phases


def test_replicated_devices_hold_everything_and_a_buffer():
    phases = device_phases(WALKED, 4, sharded=False)
    assert phases["student"] == WALKED.phases["student"]
    assert phases[EXCHANGE].total() == 71 * GB + 2 * 10 * GB


def test_the_table_of_many_devices_is_that_of_plans():
    rows = {row.devices: row for row in scale(plan(), (1, 8))}
    assert rows[1].replicated == rows[1].sharded == plan().needed
    assert rows[8].replicated == plan(gpus=8).needed
    assert rows[8].sharded == plan(gpus=8, sharded=True).needed == with_margin(plan(gpus=8, sharded=True).tensors)


OWN = [
    {"method": "apex"},
    {"method": "meanflow"},
    {"method": "ctm"},
    {"method": "lcm", "guidance_range": (2.0, 8.0)},
    {"method": "slimflow", "student_layers_per_block": 1},
]


@pytest.mark.parametrize("values", OWN, ids=lambda values: values["method"])
def test_an_adapter_is_not_advised_for_a_student_of_another_network(values, tiny_sd):
    full = resolve({"student": "full", "train_batch_size": 4} | values)
    assert not any("--student lora" in lever.flags for lever in levers(full, plan()))
    method = method_named(full.method)
    assert method(full.build(method.Config)).student_network(tiny_sd.unet) is not None


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.info.name)
def test_methods_say_whether_their_student_is_another_network(cls, tiny_sd):
    method = cls(cls.Config())
    assert method.own_network == (method.student_network(tiny_sd.unet) is not None)


@pytest.mark.parametrize(
    ("values", "halved"),
    [
        ({"method": "apex", "train_batch_size": 4}, False),
        ({"method": "apex", "train_batch_size": 8}, True),
        ({"method": "freeflow", "train_batch_size": 6}, False),
        ({"method": "dmd2", "train_batch_size": 2}, True),
        ({"method": "dmd2", "train_batch_size": 1}, False),
    ],
)
def test_batches_are_halved_as_far_as_the_method_goes(values, halved):
    found = levers(resolve({"student": "full"} | values), plan())
    assert any("--train_batch_size" in lever.flags for lever in found) == halved
