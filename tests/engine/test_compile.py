"""Compiled blocks: what eager ones compute, and nothing new to compile once every turn has been taken."""

import copy
import functools

import pytest
import torch
from engine_helpers import PROMPTS, Latents
from torch._dynamo.utils import counters

from fastdiff.engine import Settings, Trainer
from fastdiff.methods import DMD2, DMD2Config
from fastdiff.models.compiling import Compilation
from fastdiff.models.teacher import Teacher
from fastdiff.planning.walk import batch_of

ONE_BLOCK = {
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}


@pytest.fixture
def small(tiny_sd):
    torch.manual_seed(0)
    unet = type(tiny_sd.unet).from_config({**tiny_sd.unet.config, **ONE_BLOCK})
    tiny_sd.register_modules(unet=unet.eval())
    return tiny_sd


@pytest.fixture
def traced_only(monkeypatch):
    """Everything of the compiler but the machine code, which takes gcc minutes."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def trainer(pipeline, folder, **settings):
    values = {
        "output_dir": str(folder),
        "train_batch_size": 2,
        "lora_rank": 2,
        "learning_rate": 1e-5,
        "log_every": 1,
        "report_to": "none",
        "gradient_checkpointing": True,
    }
    return Trainer(
        DMD2(DMD2Config(student_update_every=2, timesteps=(999, 499), gan_weight=1e-3)),
        Teacher(copy.deepcopy(pipeline), "tiny"),
        Latents(PROMPTS),
        Settings(**(values | settings)),
    )


def programs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_compiled_steps_are_the_eager_ones_and_are_compiled_in_the_first_two(small, tmp_path, traced_only, kind):
    roles = {"student": kind, "fake_score": kind}
    eager = trainer(small, tmp_path / "eager", **roles)
    compiled = trainer(small, tmp_path / "compiled", torch_compile=True, **roles)
    for run in (eager, compiled):
        generator = torch.Generator().manual_seed(1)
        for role in ("student", "fake_score") if kind == "lora" else ():  # B is zero at first
            for parameter in run.networks.parameters(role):
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    work = batch_of(eager, eager.method)
    for step in range(4):
        if step == 2:
            assert programs() > 0
            first = programs()
        seen = []
        for run in (eager, compiled):
            run.train_step([work])
            seen.append(run.metrics.read())
        assert seen[0].keys() == seen[1].keys() and any(name.startswith("grad_norm/") for name in seen[0])
        for name, value in seen[0].items():  # losses and gradient norms
            assert seen[1][name] == pytest.approx(value, rel=1e-4), (step, name)
    assert programs() == first


@pytest.mark.slow
def test_blocks_are_eager_outside_steps_and_in_copies(small, traced_only):
    unet = copy.deepcopy(small.unet)
    compilation = Compilation()
    compilation.add(unet)
    inputs = torch.randn(1, 4, 16, 16), torch.tensor([9.0]), torch.randn(1, 16, 16)
    with torch.no_grad():
        expected = small.unet(*inputs).sample
        assert torch.equal(unet(*inputs).sample, expected)
        twin = copy.deepcopy(unet)
        with compilation.at_work():
            assert torch.equal(twin(*inputs).sample, expected) and programs() == 0
            next(twin.down_blocks[0].resnets[0].parameters()).zero_()
            assert not torch.equal(twin(*inputs).sample, expected)  # it has weights of its own
            torch.testing.assert_close(unet(*inputs).sample, expected, rtol=1e-4, atol=1e-4)
        assert programs() > 0


@pytest.mark.slow
def test_machine_code_computes_what_the_block_computes(small):
    """One transformer block with gradient, through the compiler's own backend and gcc."""
    torch._dynamo.reset()
    network = copy.deepcopy(small.unet)
    block = network.down_blocks[0].attentions[0].transformer_blocks[0]
    x, text = torch.randn(2, 64, 16, requires_grad=True), torch.randn(2, 16, 16)
    expected = block(x, encoder_hidden_states=text)
    (slope,) = torch.autograd.grad(expected.square().sum(), x)
    compilation = Compilation()
    compilation.add(network)
    with compilation.at_work():
        found = block(x, encoder_hidden_states=text)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        total = found.square().sum()
        for keep in (True, False):  # terms are weighed by a backward of their own
            (own,) = torch.autograd.grad(total, x, retain_graph=keep)
            torch.testing.assert_close(own, slope, rtol=1e-4, atol=1e-4)


def test_a_network_without_repeated_blocks_is_refused():
    with pytest.raises(ValueError, match="Linear has none"):
        Compilation().add(torch.nn.Linear(2, 2))
