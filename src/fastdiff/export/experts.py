"""Students of several adapters, each for an interval of noise levels: their files, and stock pipelines that switch."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastdiff.data.images import check_member_name
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.engine.files import write_json
from fastdiff.export.lora import DIFFUSERS_FILE, LoraFiles, save_lora
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.sampler import SamplerSpec

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from fastdiff.export.pipeline import Student

EXPERTS_FILE = "experts.json"
NEWEST = "student"
Predict = Callable[[Tensor, Tensor, Conditioning], Prediction]


@dataclass(frozen=True)
class Experts:
    """The adapters of a student that is several.

    Args:
        by_step: the adapter that serves each step of the sampler, `student` being the newest.
        predict: what the trainer's own adapters answer, by name: (x_t, t, conditioning) -> prediction.
    """

    by_step: tuple[str, ...]
    predict: Mapping[str, Predict]

    def names(self) -> list[str]:
        """All adapters in the order of their steps."""
        return list(dict.fromkeys(self.by_step))

    def in_turn(self, sampler: SamplerSpec, schedule: NoiseSchedule) -> Predict:
        """One prediction function that asks the adapter whose time it is."""
        times = torch.tensor(sampler.schedule_times(schedule), dtype=torch.float64)

        def predict(x_t: Tensor, t: Tensor, cond: Conditioning) -> Prediction:
            step = int((times - t[0].double().cpu()).abs().argmin())
            return self.predict[self.by_step[step]](x_t, t, cond)

        return predict


def write_experts(
    folder: Path, student: Student, experts: Experts, schedule: NoiseSchedule, dtype: torch.dtype
) -> dict[str, LoraFiles]:
    """Writes every adapter but the newest into a folder of its own name, and `experts.json`.

    `experts.json` lists, noisiest first, each expert's LoRA file, the network times it was trained to be called at, and
    `above`: it serves all network times above that number, and below those of the expert before it.
    """
    times = [float(schedule.network_time(t)) for t in student.sampler.schedule_times(schedule)]
    files, listed = {}, []
    for name in experts.names():
        own = [time for time, served_by in zip(times, experts.by_step, strict=True) if served_by == name]
        later = [time for time in times if time < own[-1]]
        place = Path() if name == NEWEST else Path(name)
        if name != NEWEST:
            files[name] = save_lora(
                folder / place, student.network, {name: 1.0}, student.component, dtype, student.family.kohya_file
            )
        weights = (place / DIFFUSERS_FILE).as_posix()
        listed.append({"weights": weights, "times": own, "above": later[0] if later else -1.0})
    write_json(folder / EXPERTS_FILE, {"format": 1, "experts": listed})
    return files


def load_experts(pipeline: DiffusionPipeline, folder: str | Path, component: str = "unet") -> None:
    """Loads all adapters of a student folder into a stock pipeline of its teacher, which then switches by itself.

    A hook on the network reads the time it is called with, so that the pipeline is used like any other, with any number
    of steps.

    Raises:
        FileNotFoundError, ValueError: if `experts.json` or a file it names is missing or damaged.
    """
    folder = Path(folder)
    experts = read_experts(folder)
    for number, expert in enumerate(experts):
        path = folder / expert["weights"]
        with warnings.catch_warnings():
            # Several adapters on one network are the point here; peft warns about the second one.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            pipeline.load_lora_weights(
                str(path.parent), weight_name=path.name, adapter_name=_adapter(number), local_files_only=True
            )
    network: nn.Module = getattr(pipeline, component)
    network.register_forward_pre_hook(_Switch([expert["above"] for expert in experts]), with_kwargs=True)


def read_experts(folder: str | Path) -> list[dict[str, Any]]:
    """The entries of `experts.json`, noisiest first.

    Raises:
        FileNotFoundError: if there is none, or a file it names is missing.
        ValueError: if it is damaged.
    """
    path = Path(folder) / EXPERTS_FILE
    try:
        experts = json.loads(path.read_text(encoding="utf-8"))["experts"]
        missing = [expert["weights"] for expert in experts if not (path.parent / expert["weights"]).is_file()]
        bounds = [float(expert["above"]) for expert in experts]
        for expert in experts:
            _check_weights(expert["weights"], path)
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): export the student again") from error
    if missing:
        raise FileNotFoundError(f"{path} names {missing[0]}, which is not there: copy the whole student folder")
    if not bounds or bounds != sorted(set(bounds), reverse=True):
        raise ValueError(f"{path} lists intervals from {bounds}, which must fall: export the student again")
    return experts


def _check_weights(name: str, where: Path) -> None:
    check_member_name(name, str(where))
    if not name.endswith(".safetensors"):
        raise ValueError(f"{where} names {name!r}, which is no safetensors file: nothing else is read")


class _Switch:
    """Makes the adapter active that serves the time a network is called with."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = list(bounds)
        self.active: int | None = None

    def __call__(self, network: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        time = kwargs["timestep"] if "timestep" in kwargs else args[1]
        now = float(torch.as_tensor(time).flatten()[0])
        # A bound is the first time of the next expert, which may have been rounded on its way here.
        number = next((n for n, bound in enumerate(self.bounds) if now > bound + 1e-3), len(self.bounds) - 1)
        if number != self.active:
            network.set_adapters(_adapter(number))
            self.active = number


def _adapter(number: int) -> str:
    return f"expert_{number + 1}"
