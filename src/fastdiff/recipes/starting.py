"""Starts a run from an earlier student: a checkpoint of a run, or a student folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from fastdiff.engine.checkpoints import STATE, Checkpoints

if TYPE_CHECKING:
    from fastdiff.engine import Trainer

_GUIDANCE_OFF = "time_embedding.cond_proj.weight"


def start_from(trainer: Trainer, source: str | None) -> None:
    """Copies weights into a new run; optimizers start afresh.

    Args:
        trainer: a run that has not begun.
        source: a checkpoint `checkpoints/step-N` (all roles and modules it shares with this run are taken), a run
            folder (its last checkpoint), a student folder (the student alone is taken), or None.

    Raises:
        FileNotFoundError: if it is none of these.
        ValueError: if the weights do not fit, e.g. a LoRA of another rank or a full student for a LoRA run.
    """
    if source is None:
        return
    folder = Path(source)
    checkpoint = folder if (folder / STATE).is_file() else last_checkpoint(folder)
    if checkpoint is not None:
        _from_checkpoint(trainer, checkpoint)
        return
    trainer.networks.roles.load_state_dict("student", student_weights(trainer, folder))


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
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    own = roles.state_dict("student")
    if _GUIDANCE_OFF not in own and not weights.get(_GUIDANCE_OFF, Tensor([])).any():
        weights.pop(_GUIDANCE_OFF, None)  # zeros that the export adds to switch guidance off
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

    roles, modules = trainer.networks.roles, trainer.networks.modules
    names = [path.stem for path in folder.glob("*.safetensors")]
    for name in names:
        if name in roles:
            roles.load_state_dict(name, load_file(folder / f"{name}.safetensors"))
        elif name in modules:
            modules[name].load_state_dict(load_file(folder / f"{name}.safetensors"))
    if "student" not in names:
        raise FileNotFoundError(f"checkpoint {folder} holds no student.safetensors")
