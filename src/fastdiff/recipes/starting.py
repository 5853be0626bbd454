"""Starts a run from an earlier student: a checkpoint of a run, or a student folder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from fastdiff.engine.checkpoints import STATE, Checkpoints
from fastdiff.models.embeddings import TRANSFORMER_SLOT, UNET_SLOT

if TYPE_CHECKING:
    from fastdiff.engine import Trainer


def start_from(trainer: Trainer, source: str | None) -> None:
    """Copies weights into a new run; optimizers start afresh.

    Args:
        trainer: a run that has not begun.
        source: a checkpoint `checkpoints/step-N` (all roles and modules it shares with this run are taken, or those
            that the method's `inherits` names; of the student its average where the run kept one), a run folder (its
            last checkpoint), a student folder (the student alone is there), or None.

    Raises:
        FileNotFoundError: if it is none of these, or lacks a role that the method must have from it.
        ValueError: if the weights do not fit, e.g. a LoRA of another rank or a full student for a LoRA run; or if
            nothing is given to a method that goes on from an earlier run.
    """
    method = trainer.method
    if source is None:
        missing = sorted((method.inherits() or {}).keys() & method.frozen().keys())
        if missing:
            raise ValueError(
                f"{method.info.name} goes on from an earlier run, whose weights become {', '.join(missing)}: give "
                "that run's folder as --init_from"
            )
        return
    folder = Path(source)
    checkpoint = folder if (folder / STATE).is_file() else last_checkpoint(folder)
    if checkpoint is not None:
        _from_checkpoint(trainer, checkpoint)
        return
    _take(trainer, {"student": lambda: student_weights(trainer, folder)}, folder)


def last_checkpoint(run: Path) -> Path | None:
    """The newest numbered checkpoint of a run folder, or None."""
    found = Checkpoints(run / "checkpoints", None).numbered()
    return found[-1] if found else None


def student_weights(trainer: Trainer, folder: Path) -> dict[str, Tensor]:
    """Weights of a student folder under the names of this run's student role."""
    from safetensors.torch import load_file

    from fastdiff.export.lora import DIFFUSERS_FILE

    roles, component = trainer.networks.roles, trainer.teacher.family.network_name
    if roles.is_adapter("student"):
        if not (folder / DIFFUSERS_FILE).is_file():
            raise FileNotFoundError(
                f"init_from {folder} holds no {DIFFUSERS_FILE}, which a LoRA student starts from; "
                "train a full student (--student full), or give a LoRA student's folder or checkpoint"
            )
        return _adapter_names(load_file(folder / DIFFUSERS_FILE), component, trainer)
    files = sorted((folder / component).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"init_from {folder} holds no {component}/*.safetensors: it is not a full student")
    buffers = {name for name, _ in roles.network("student").named_buffers()}  # e.g. positions, which are not trained
    weights = {name: tensor for file in files for name, tensor in load_file(file).items() if name not in buffers}
    own = roles.state_dict("student")
    if UNET_SLOT not in own and not weights.get(UNET_SLOT, Tensor([])).any():
        weights.pop(UNET_SLOT, None)  # zeros that the export adds to switch guidance off
    if TRANSFORMER_SLOT in own:
        weights.setdefault(TRANSFORMER_SLOT, own[TRANSFORMER_SLOT])  # exports have none: the input is new again
    return weights


def _adapter_names(weights: Mapping[str, Tensor], component: str, trainer: Trainer) -> dict[str, Tensor]:
    """peft's names; exported B has alpha / rank folded in, which is taken out again."""
    settings = trainer.settings
    strength = (settings.lora_alpha or settings.lora_rank) / settings.lora_rank
    found = {}
    for name, tensor in weights.items():
        path, kind, _ = name.removeprefix(f"{component}.").rsplit(".", 2)
        found[f"{path}.{kind}.student.weight"] = tensor / strength if kind == "lora_B" else tensor
    return found


def _from_checkpoint(trainer: Trainer, folder: Path) -> None:
    from safetensors.torch import load_file

    found = {path.stem: functools.partial(load_file, path) for path in sorted(folder.glob("*.safetensors"))}
    if "student" not in found:
        raise FileNotFoundError(f"checkpoint {folder} holds no student.safetensors")
    _take(trainer, found, folder)


def _take(trainer: Trainer, found: Mapping[str, Callable[[], Mapping[str, Tensor]]], folder: Path) -> None:
    """Gives the weights that `found` reads to the roles and modules that want them."""
    roles, modules = trainer.networks.roles, trainer.networks.modules
    wanted = trainer.method.inherits()
    for name, sources in ({name: (name,) for name in found} if wanted is None else wanted).items():
        source = next((source for source in sources if source in found), None)
        if name in modules and source is not None:
            modules[name].load_state_dict(found[source]())
        elif name in roles and source is None:
            raise FileNotFoundError(
                f"init_from {folder} holds no {' or '.join(sources)}, which the role {name} of "
                f"{trainer.method.info.name} comes from; it holds {', '.join(found)}"
            )
        elif name in roles:
            weights = found[source]()
            if source == "student" and "ema" in found:
                weights = _averaged(trainer, weights, found["ema"]())
            _give(trainer, name, weights, source)


def _averaged(trainer: Trainer, weights: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The student that the earlier run exported; averages are saved by number, in the order of its parameters."""
    roles = trainer.networks.roles
    names = [name for name, _ in roles.named_parameters("student")]
    if set(names) != set(weights):  # of another kind or rank: its own weights say what does not fit
        return weights
    return {name: average[str(number)] for number, name in enumerate(names)}


def _give(trainer: Trainer, role: str, weights: Mapping[str, Tensor], source: str) -> None:
    """Adapter weights carry the name of their role, which is changed to that of the role that takes them."""
    roles = trainer.networks.roles
    if role != source:
        adapter = roles.is_adapter(role)
        if adapter != any(".lora_" in name for name in weights) and role not in trainer.method.frozen():
            return  # an adapter cannot start from a full network, nor the reverse: the role starts as the teacher
        if adapter:
            old, new = f".{source}.weight", f".{role}.weight"
            weights = {name.removesuffix(old) + new: tensor for name, tensor in weights.items()}
    trainer.networks.load_state_dict(role, weights)
