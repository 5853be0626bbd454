"""A base in few bits under exact adapters: small errors, flowing gradients, exact exports, refusals."""

import builtins
import copy
import importlib.util

import pytest
import torch
from engine_helpers import PROMPTS, Latents

from fastdiff.engine import Settings, Trainer
from fastdiff.engine.memory import state_memory
from fastdiff.methods import DMD2, DMD2Config
from fastdiff.models.quantizing import QuantizedLinear, exact_weights, quantize_blocks
from fastdiff.models.roles import AdapterSpec, Roles
from fastdiff.models.teacher import Teacher
from fastdiff.planning.walk import batch_of

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
SPEC = AdapterSpec(4, 4, ("to_q", "ff.net.2", "conv1"))


def inputs(rows=2):
    generator = torch.Generator().manual_seed(5)
    x, text = (torch.randn(rows, *shape, generator=generator) for shape in ((4, 16, 16), (16, 16)))
    return x, torch.linspace(20.0, 900.0, rows), text


@needs_library
@pytest.mark.parametrize(("kind", "step"), [("int8", 1 / 127), ("nf4", 0.304)])
def test_a_layer_is_off_by_at_most_half_a_step(kind, step):
    """int8: rows have 127 steps to their largest value. nf4: 0.304 is the widest gap of its sixteen levels."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 64)
    holder = torch.nn.ModuleList([linear])
    holder._repeated_blocks = ["ModuleList"]
    quantize_blocks(holder, kind)
    (layer,) = holder
    assert isinstance(layer, QuantizedLinear)
    error = (layer.kind.read(layer, torch.float32) - linear.weight).abs()
    assert 0 < error.max() <= 0.55 * step * linear.weight.abs().max()
    x = torch.randn(3, 5, 128, requires_grad=True)
    out = layer(x)
    torch.testing.assert_close(out, x @ layer.kind.read(layer, torch.float32).T + linear.bias)
    cotangent = torch.randn_like(out)
    (slope,) = torch.autograd.grad(out, x, cotangent)
    torch.testing.assert_close(slope, cotangent @ layer.kind.read(layer, torch.float32))
    kept = [name for name, _ in layer.named_buffers()]
    size = sum(getattr(layer, name).numel() * getattr(layer, name).element_size() for name in kept)
    assert size < 0.3 * linear.weight.numel() * 4


@needs_library
@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.02), ("nf4", 0.2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_roles_on_a_quantised_base(tiny_sd, kind, bound, dtype):
    tiny_sd.unet.to(dtype)
    exact = Roles(copy.deepcopy(tiny_sd.unet), {"student": SPEC, "fake_score": SPEC})
    own = Roles(tiny_sd.unet, {"student": SPEC, "fake_score": SPEC}, gradient_checkpointing=True, quantize_base=kind)
    generator = torch.Generator().manual_seed(1)
    for role in ("student", "fake_score"):
        for mine, theirs in zip(own.parameters(role), exact.parameters(role), strict=True):
            mine.data = 0.1 * torch.randn(mine.shape, generator=generator)
            theirs.data = mine.data.clone()
            assert mine.dtype == torch.float32
    x, t, text = inputs()
    x, text = x.to(dtype), text.to(dtype)
    outputs = {}
    for role in ("teacher", "student", "fake_score"):
        pair = []
        for roles in (own, exact):
            with roles.active.use(roles.parts(role)):
                pair.append(roles.base(x, t, text).sample)
        outputs[role] = pair[0]
        error = (pair[0] - pair[1]).float().norm() / pair[1].float().norm()
        assert 0 < error < bound, role
    assert (outputs["student"] - outputs["teacher"]).abs().max() > 1e-2
    outputs["student"].float().square().sum().backward()
    gradients = [parameter.grad for parameter in own.parameters("student")]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    assert all(parameter.grad is None for parameter in own.parameters("fake_score"))


@needs_library
def test_exact_weights_come_and_go(tiny_sd):
    exact = copy.deepcopy(tiny_sd.unet)
    own = Roles(tiny_sd.unet, {"student": SPEC}, quantize_base="nf4")
    with torch.no_grad():
        expected, rounded = exact(*inputs()).sample, own.base(*inputs()).sample
        with exact_weights(own.base, exact):
            assert torch.equal(own.base(*inputs()).sample, expected)
        assert torch.equal(own.base(*inputs()).sample, rounded)
    assert not torch.equal(rounded, expected)


def trainer(teacher, folder, **settings):
    values = {"output_dir": str(folder), "train_batch_size": 2, "lora_rank": 2, "report_to": "none"}
    method = DMD2(DMD2Config(student_update_every=1))
    return Trainer(method, teacher, Latents(PROMPTS), Settings(**(values | {"quantize_base": "int8"} | settings)))


@needs_library
def test_a_step_trains_adapters_and_the_teacher_stays_itself(tiny_sd, tmp_path):
    known = Teacher(copy.deepcopy(tiny_sd), "tiny").identity()
    exact = trainer(Teacher(copy.deepcopy(tiny_sd), "tiny"), tmp_path, quantize_base="none")
    run = trainer(Teacher(tiny_sd, "tiny"), tmp_path, mixed_precision="bf16")
    assert run.json_state()["teacher"] == known
    before = [parameter.clone() for parameter in run.networks.parameters("student")]
    for _ in range(2):
        run.train_step([batch_of(run, run.method)])
    assert run.metrics.read()
    moved = [not torch.equal(a, b) for a, b in zip(before, run.networks.parameters("student"))]
    assert sum(moved) > 0.9 * len(moved)
    rows = {name: state_memory(one.networks, one.optimizers) for name, one in (("exact", exact), ("int8", run))}
    assert rows["int8"].frozen < rows["exact"].frozen and rows["int8"].trained == rows["exact"].trained


@needs_library
@pytest.mark.slow
def test_the_planner_knows_the_smaller_base(tiny_sd_folder, tmp_path):
    from fastdiff.planning.blueprint import blueprint_of
    from fastdiff.planning.walk import FROZEN, walk

    blueprint = blueprint_of(str(tiny_sd_folder))
    teacher = Teacher.from_pretrained(tiny_sd_folder)
    run = trainer(teacher, tmp_path, quantize_base="nf4")
    held = state_memory(run.networks, run.optimizers).frozen
    phases = walk(run.method, blueprint, run.settings).phases
    assert phases["fake_score"][FROZEN] == pytest.approx(held, rel=0.01)


@needs_library
@pytest.mark.slow
def test_the_exported_lora_is_that_of_the_exact_base(tiny_sd_folder, tmp_path):
    from fastdiff import distill

    student = distill(
        str(tiny_sd_folder),
        "dmd2",
        ["a dog"],
        output_dir=str(tmp_path / "run"),
        max_train_steps=2,
        train_batch_size=2,
        lora_rank=2,
        validation_samples=0,
        report_to="none",
        quantize_base="nf4",
    )
    assert student.record.load_back["ok"] and student.record.load_back["max_error"] < 1e-5


@needs_library
def test_full_roles_are_refused(tiny_sd, tmp_path):
    with pytest.raises(ValueError, match=r"int8 rounds the base, and fake_score would be trained in full"):
        trainer(Teacher(tiny_sd, "tiny"), tmp_path, fake_score="full")


def test_a_missing_library_is_named(tiny_sd, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("bitsandbytes"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"fastdiff-diffusers\[8bit\]"):
        quantize_blocks(tiny_sd.unet, "int8")
