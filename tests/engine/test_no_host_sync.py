"""A training step never waits for the device: no value is read, moved to the host or printed."""

import contextlib
import io

import pytest
import torch
from engine_helpers import PROMPTS, Latents
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.engine import Settings, Trainer
from fastdiff.methods import METHODS, method_named
from fastdiff.models.teacher import Teacher
from fastdiff.planning.walk import batch_of

READERS = (
    *("item", "cpu", "numpy", "tolist", "__bool__", "__float__", "__int__", "__index__", "__contains__"),
    *("__repr__", "__format__", "__array__"),
)
READING = {getattr(torch.Tensor, name) for name in READERS} | {torch.equal, torch.allclose}
aten = torch.ops.aten
READING_OPS = {aten._local_scalar_dense, aten.item, aten.nonzero, aten.equal, aten.masked_select, aten.is_nonzero}


class HostRead(AssertionError):
    """Something asked for a value."""


class ForbidReads(TorchFunctionMode):
    """Python calls that wait for the device; on a CPU some of them never become an operation."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READING:
            raise HostRead(f"{getattr(func, '__name__', func)} of a tensor")
        return func(*args, **(kwargs or {}))


class ForbidReadingOps(TorchDispatchMode):
    """Operations that wait for the device, also where C++ calls them, such as indexing by a mask."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = func.overloadpacket is aten.index and any(
            one is not None and one.dtype == torch.bool for one in args[1]
        )
        if func.overloadpacket in READING_OPS or masks:
            raise HostRead(f"operation {func}")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_host_reads():
    with ForbidReads(), ForbidReadingOps():
        yield


X = torch.tensor([1.0, -2.0])


@pytest.mark.parametrize(
    "read",
    [
        lambda: X[0].item(),
        lambda: X.cpu(),
        lambda: X.tolist(),
        lambda: X.numpy(),
        lambda: float(X[0]),
        lambda: int(X[0]),
        lambda: bool(X[0] > 0),
        lambda: X[0] > 0 and 1,
        lambda: X[X > 0],
        lambda: X.nonzero(),
        lambda: torch.equal(X, X),
        lambda: torch.masked_select(X, X > 0),
        lambda: print(X, file=io.StringIO()),
        lambda: f"{X[0]}",
        lambda: f"{X[0]:.2f}",
        lambda: [0, 1][X[0].long()],
    ],
)
def test_the_mode_sees_every_kind_of_read(read):
    with pytest.raises(HostRead), no_host_reads():
        read()


def test_the_mode_lets_ordinary_work_pass():
    weight = torch.ones(2, requires_grad=True)
    with no_host_reads():
        (weight * X).sum().backward()
        torch.where(X > 0, X, 0).to(torch.bfloat16)


def trainer(pipeline, folder, name, config=None, **settings):
    method = method_named(name)
    names = {field for field in method.Config.__dataclass_fields__}
    config = ({"student_update_every": 2} if "student_update_every" in names else {}) | (config or {})
    if name == "msd":  # one student: what is routed is chosen with the data
        config["students"] = 1
    values = {"student": "lora" if "lora" in method.info.student_kinds else "full", "lora_rank": 2} | settings
    return Trainer(
        method(method.Config(**config)),
        Teacher(pipeline, "tiny"),
        Latents(PROMPTS),
        Settings(
            **{"output_dir": str(folder), "train_batch_size": 2, "report_to": "none", "max_grad_norm": 1.0} | values
        ),
    )


def check(run, warm_up=0):
    work = batch_of(run, run.method)
    for _ in range(warm_up):
        run.train_step([work])
    with no_host_reads():
        for _ in range(2):  # two-time-scale methods take both turns
            run.train_step([work])
    assert run.step == 2 + warm_up and run.metrics.read()


@pytest.mark.parametrize("name", ["dmd2", "lcm"])
@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True, "mixed_precision": "bf16"},
        {"student": "full", "fake_score": "full", "ema_decay": 0.9},
    ],
    ids=["lora", "full"],
)
def test_a_step_reads_nothing(tiny_sd, tmp_path, name, settings):
    check(trainer(tiny_sd, tmp_path, name, **settings))


def test_pairs_made_on_the_way_read_nothing(tiny_sd, tmp_path):
    check(trainer(tiny_sd, tmp_path, "kd", config={"online_steps": 2}))


def test_a_low_precision_critic_reads_nothing(tiny_sd, tmp_path):
    low = {"fake_score": "full", "fake_score_dtype": "bf16", "fake_score_in_backward": True, "mixed_precision": "bf16"}
    check(trainer(tiny_sd, tmp_path, "dmd2", **low))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["dmd2", "lcm"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_checkpointing": True, "activation_offload": True}],
    ids=["plain", "offloaded"],
)
def test_cuda_itself_sees_no_synchronisation(tiny_sd, tmp_path, name, settings):
    """The driver's own watch also sees what no Python mode can: copies and allocations that wait inside kernels."""
    run = trainer(tiny_sd.to("cuda"), tmp_path, name, **settings)
    work = next(iter(run.batches.steps(0)))
    run.train_step(work)  # libraries are opened and optimizer states made
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            run.train_step(work)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.metrics.read()


@pytest.mark.slow
@pytest.mark.parametrize("name", [method.info.name for method in METHODS if method.info.name not in ("dmd2", "lcm")])
def test_no_method_reads_anything(tiny_sd, tmp_path, name):
    kind = {"student": "full"} if name == "apex" else {}  # its default losses have a further network input
    # A table made at its first use is read once; batches of 4 serve methods that split them.
    check(trainer(tiny_sd, tmp_path, name, train_batch_size=4, **kind), warm_up=1)
