"""Walks through a run's heaviest steps with the engine's and the method's own code, on tensors without values."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdiff.data import PromptData
from fastdiff.diffusion.schedules import schedule_from_config
from fastdiff.engine import Settings, Trainer
from fastdiff.methods import Batch, Method, Update
from fastdiff.models import roles
from fastdiff.models.quantizing import linears_in_blocks
from fastdiff.models.roles import TEACHER
from fastdiff.models.scorers import Scorer, TowerScorer, open_scorer
from fastdiff.planning.blueprint import Blueprint
from fastdiff.planning.teacher import PlannedTeacher
from fastdiff.planning.tracker import ACTIVATIONS, MemoryTracker

FROZEN, TRAINED, GRADIENTS, OPTIMIZER = "frozen weights", "trained weights", "gradients", "optimizer"
AVERAGE, ENCODERS = "average", "text encoders and autoencoder"
KINDS = (FROZEN, TRAINED, GRADIENTS, OPTIMIZER, AVERAGE, ENCODERS, ACTIVATIONS)
PROMPTS, SAMPLE, DECODE, ENCODE = "prompts", "sample", "decode", "encode"
BETWEEN = (PROMPTS, SAMPLE, DECODE, ENCODE)
"""Phases between steps."""
_VALIDATED, _SHOWN = 16, 8
"""Samples at a time in validations and in previews."""
_HORIZON = 64
"""Steps that are searched for turns of every kind; update ratios are far smaller."""


@dataclass
class PlannedProcess:
    """Stands where accelerate's process would: one device that holds nothing."""

    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    is_main_process: bool = True
    process_index: int = 0
    num_processes: int = 1

    def wait_for_everyone(self) -> None:
        """Nobody else is there."""


@dataclass(frozen=True)
class Walk:
    """What a run's steps hold and move.

    Args:
        phases: the fullest moment of each phase, bytes by kind (`KINDS`).
        exchanged: bytes of the gradients of each update, which several devices average.
        buffer: bytes of the largest flat buffer in which they do.
        whole_buffer: the same where full networks are cut over devices, and adapters and heads alone are averaged.
        cut: bytes by kind that are cut then: full networks, the base, and what belongs to them.
        gathered: bytes of network weights that pass by in a step: a network's own for each forward and each backward.
        largest_block: bytes of the largest block of a network.
        sizes: weights of each trained group.
        block_weights: weights of the base that `quantize_base` stores in fewer bits.
        resolution: pixels of the images.
    """

    phases: dict[str, Counter[str]]
    exchanged: dict[str, int]
    buffer: int
    whole_buffer: int
    cut: Counter[str]
    gathered: int
    largest_block: int
    sizes: dict[str, int]
    block_weights: int
    resolution: int


def walk(
    method: Method,
    blueprint: Blueprint,
    settings: Settings,
    *,
    frozen_dtype: torch.dtype = torch.float32,
    cached: bool = True,
    offloaded: bool = False,
) -> Walk:
    """Takes the steps.

    Phases are the updates of the method by name, and between steps `prompts` (text encoders at work), `sample` (a
    network call of a validation), `decode` (one image) and, unless `cached`, `encode` (images to latents). A decoder
    that an update needs stays on the device even if `offloaded`; it is not counted then. A scorer is opened in earnest.
    Kernels' own workspaces and the allocator's fragmentation are not in it.
    """
    schedule = schedule_from_config(dict(blueprint.scheduler))
    scorer = open_scorer(settings.scorer) if method.needs_scorer() else None  # files cannot be read as fake tensors
    with (
        tempfile.TemporaryDirectory() as folder,
        FakeTensorMode(allow_non_fake_inputs=True),
        _replaced_on_conversion(),
        mock.patch.object(roles, "on_host", _elsewhere),
    ):
        # A program of the compiler holds no more than the operations it stands for, and is not made of fake tensors.
        changes = {"output_dir": folder, "resume_from_checkpoint": None, "fsdp": "none", "torch_compile": False}
        settings = dataclasses.replace(settings, **changes)
        with MemoryTracker() as tracker:
            teacher = PlannedTeacher(blueprint, schedule, frozen_dtype)
            block_weights = sum(
                getattr(owner, name).weight.numel() for owner, name in linears_in_blocks(teacher.network)
            )
            trainer = Trainer(
                method, teacher, PromptData(["a prompt"]), settings, scorer=scorer, accelerator=PlannedProcess()
            )
            _mark_weights(tracker, trainer, teacher)
            tracker.mark(FROZEN, _weights_of(scorer))
            moved: list[int] = []
            gathered = _count_gathered(trainer)
            for step in _steps(method):
                trainer.step = step
                gathered.clear()
                with _phases(trainer.method, tracker):
                    trainer.train_step(
                        [batch_of(trainer, method) for _ in range(settings.gradient_accumulation_steps)]
                    )
                tracker.phase = None
                moved.append(gathered.total())
                tracker.mark(OPTIMIZER, _optimizer_tensors(trainer))
            _between_steps(tracker, trainer, images=not cached and method.needs() != "prompts")
            encoders = teacher.text_encoder_bytes
            updates = [update for step in _steps(method) for update in method.updates(step)]
            gradients = {name: _size(one.parameters) for name, one in trainer.optimizers.items()}
            exchanged = {update.name: sum(gradients[group] for group in update.trains) for update in updates}
            kept = [name for name, one in trainer.optimizers.items() if not one.in_backward]
            full = _full_roles(trainer)
            buffers = [
                max(sum(gradients[group] for group in update.trains if group in some) for update in updates)
                for some in (kept, [name for name in kept if name not in full])
            ]
            cut = _cut(trainer, full)
            sizes = {name: sum(p.numel() for p in one.parameters) for name, one in trainer.optimizers.items()}
            largest = max(_size(_without_adapters(block, trainer)) for block in _blocks(teacher.network))
    for phase, peak in tracker.peaks.items():
        peak[ENCODERS] = _encoders_in(phase, peak[ENCODERS], encoders, offloaded)
    return Walk(
        phases=tracker.peaks,
        exchanged=exchanged,
        buffer=buffers[0],
        whole_buffer=buffers[1],
        cut=cut,
        gathered=max(moved),
        largest_block=largest,
        sizes=sizes,
        block_weights=block_weights,
        resolution=trainer.batches.resolution,
    )


def _full_roles(trainer: Trainer) -> list[str]:
    """Roles that are networks of their own."""
    own = trainer.networks.roles
    return [role for role in own if not own.is_adapter(role)]


def _cut(trainer: Trainer, full: list[str]) -> Counter[str]:
    """Bytes by kind of what belongs to full networks and to the base, which devices may share."""
    networks = trainer.networks
    cut = Counter({FROZEN: _size(_without_adapters(networks.roles.base, trainer))})
    for role in full:
        size = _size(networks.parameters(role))
        if role in trainer.optimizers:
            states = trainer.optimizers[role].state_tensors().values()
            cut += Counter({TRAINED: size, GRADIENTS: size, OPTIMIZER: _size(states)})
        else:
            cut[FROZEN] += size
    if trainer.student.ema is not None and "student" in full:
        cut[AVERAGE] = _size(trainer.student.ema.shadow_params)
    return cut


def _count_gathered(trainer: Trainer) -> Counter[str]:
    """Counts the bytes of each network that runs, once more where a backward follows."""
    gathered: Counter[str] = Counter()
    own = trainer.networks.roles
    for network in {id(network): network for network in map(own.network, own)}.values():
        size = _size(_without_adapters(network, trainer))

        def before(_module: nn.Module, _args: Any, size: int = size) -> None:
            gathered["networks"] += size * (1 + torch.is_grad_enabled())

        network.register_forward_pre_hook(before)
    return gathered


def _without_adapters(network: nn.Module, trainer: Trainer) -> Iterator[nn.Parameter]:
    """The weights of a network that devices can share; adapters stay whole on each."""
    roles = trainer.networks.roles
    adapters = {weight for role in roles if roles.is_adapter(role) for weight in roles.parameters(role)}
    return (weight for weight in network.parameters() if weight not in adapters)


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The parts of a network that are gathered as one: the elements of its lists, and its other children."""
    for child in network.children():
        yield from child.children() if isinstance(child, nn.ModuleList) else (child,)


def _size(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _encoders_in(phase: str, autoencoder: int, text_encoders: int, offloaded: bool) -> int:
    """Bytes on the device; offloaded parts are there while they work only, and never together."""
    if not offloaded:
        return autoencoder + text_encoders
    return {PROMPTS: text_encoders, DECODE: autoencoder, ENCODE: autoencoder}.get(phase, 0)


@torch.no_grad()
def _between_steps(tracker: MemoryTracker, trainer: Trainer, images: bool) -> None:
    """What previews and validations do, one network call of each kind, and the encoding of a batch of images."""
    settings, shape = trainer.settings, trainer.batches.latent_shape
    rows = _VALIDATED if settings.validation_samples else _SHOWN
    tracker.start(PROMPTS)
    cond = trainer.teacher.encode(["a prompt"] * rows, trainer.batches.resolution)
    tracker.start(SAMPLE)
    trainer.networks.denoiser(torch.randn(rows, *shape), torch.zeros(rows), cond, TEACHER)
    tracker.start(DECODE)
    trainer.teacher.decode(torch.zeros(1, *shape))
    if images:
        tracker.start(ENCODE)
        trainer.teacher.encode_images(images_of(trainer, settings.train_batch_size))


def _elsewhere(network: nn.Module) -> contextlib.AbstractContextManager:
    """Stands for `roles.on_host`, where there is but one device: what is saved leaves no bytes behind."""

    def pack(tensor: Tensor) -> Callable[[], Tensor]:
        return functools.partial(
            torch.empty_strided, tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda make: make())


@contextlib.contextmanager
def _replaced_on_conversion() -> Iterator[None]:
    """Inside, `module.to` gives a module new parameters; torch would swap fake ones in place, and refuses to as soon
    as its own fake mode has looked at them."""

    def convert(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for child in module.children() if recurse else ():
            convert(child, fn)
        for name, parameter in module._parameters.items():
            if parameter is not None and (new := fn(parameter)) is not parameter:
                module._parameters[name] = nn.Parameter(new.detach(), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else fn(buffer)
        return module

    with mock.patch.object(nn.Module, "_apply", convert), warnings.catch_warnings():
        # Copying a module asks each parameter where it lies, which a fake one answers under protest.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield


def _mark_weights(tracker: MemoryTracker, trainer: Trainer, teacher: PlannedTeacher) -> None:
    """Says what is what, and takes one optimizer step without gradients' graph so that states exist."""
    tracker.mark(FROZEN, (*teacher.network.parameters(), *teacher.network.buffers()))  # quantised codes are buffers
    tracker.mark(ENCODERS, teacher.autoencoder.parameters())
    if trainer.student.ema is not None:
        tracker.mark(AVERAGE, trainer.student.ema.shadow_params)
    for role in _full_roles(trainer):
        tracker.mark(FROZEN, trainer.networks.roles.network(role).parameters())
    for optimizer in trainer.optimizers.values():
        tracker.mark(TRAINED, optimizer.parameters)
        tracker.mark_gradients(GRADIENTS, optimizer.parameters)
        optimizer.make_state()
    tracker.mark(OPTIMIZER, _optimizer_tensors(trainer))


def _weights_of(scorer: Scorer | None) -> Iterable[Tensor]:
    """What a scorer keeps in memory."""
    if scorer is None:
        return ()
    return (scorer.tower.model if isinstance(scorer, TowerScorer) else scorer.network).parameters()


def _optimizer_tensors(trainer: Trainer) -> Iterator[Tensor]:
    for optimizer in trainer.optimizers.values():
        yield from optimizer.state_tensors().values()


def _steps(method: Method) -> list[int]:
    """The first step, which also weighs terms against each other, and the first steps of updates it lacks."""
    seen: set[tuple[str, ...]] = set()
    chosen = []
    for step in range(_HORIZON):
        updates = {(update.name, *update.trains) for update in method.updates(step)}
        if not updates <= seen:
            seen |= updates
            chosen.append(step)
    return chosen


@contextlib.contextmanager
def _phases(method: Method, tracker: MemoryTracker) -> Iterator[None]:
    """Inside, the method's updates tell the tracker their names when they start."""
    own = method.updates

    def told(update: Update) -> Update:
        def loss(batch, ctx):
            tracker.start(update.name)
            return update.loss(batch, ctx)

        return dataclasses.replace(update, loss=loss)

    method.updates = lambda step: (told(update) for update in own(step))
    try:
        yield
    finally:
        del method.updates


def batch_of(trainer: Trainer, method: Method) -> Batch:
    """A batch with what the method needs, at random."""
    size, shape = trainer.settings.train_batch_size, trainer.batches.latent_shape
    rows = torch.randn(size, *shape)
    return Batch(
        indices=torch.arange(size),
        cond=trainer.teacher.encode(["a prompt"] * size, trainer.batches.resolution),
        null=trainer.batches.null,
        latent_shape=shape,
        latents=None if method.needs() == "prompts" else rows,
        extra={"noise": torch.randn_like(rows)} if method.needs() == "pairs" else {},
        prompts=("a prompt",) * size,
    )


def images_of(trainer: Trainer, count: int) -> Tensor:
    """Images `(count, 3, H, W)` of the run's size."""
    side = trainer.batches.resolution
    return torch.zeros(count, 3, side, side)
