"""What a distillation method is: a few losses over named roles, in an order that is data.

A method knows no optimizer, no device, no process group and no loop. The engine runs every update's loss over the
micro-batches of a step, calls backward at once and steps the optimizers of the groups the update trains.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastdiff.diffusion.randomness import Randomness
from fastdiff.diffusion.schedules import NoiseSchedule
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.sampler import SamplerSpec
from fastdiff.models.scorers import Scorer

Need = Literal["prompts", "images", "pairs"]
StudentKind = Literal["lora", "full"]


@dataclass(frozen=True)
class MethodInfo:
    """What `fastdiff methods` prints.

    Args:
        name: as flags and recipes call it.
        title: as papers call it.
        family: under which tables list it.
        paper, arxiv: title and number of the paper.
        needs: what the data must hold with the default config.
        student_kinds: what the student may be.
        steps: sampling steps it is made for.
    """

    name: str
    title: str
    family: str
    paper: str
    arxiv: str
    needs: Need
    student_kinds: tuple[StudentKind, ...]
    steps: str


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Args:
        indices: `(B,)` int64, global sample positions; randomness is drawn from them.
        cond: conditioning, `B` rows.
        null: the unconditional row.
        latent_shape: `(C, H, W)`.
        latents: clean latents `(B, C, H, W)` when the data has images.
        extra: further tensors of the data; a pair's noise is called `noise`.
        prompts: the captions, where the data has them.
    """

    indices: Tensor
    cond: Conditioning
    null: Conditioning
    latent_shape: tuple[int, int, int]
    latents: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)

    def images(self) -> Tensor:
        """The clean latents.

        Raises:
            ValueError: if the data set has prompts only.
        """
        if self.latents is None:
            raise ValueError(
                "this method trains on images, but the data holds prompts only: give images as --data (--train_data_dir)."
            )
        return self.latents

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Noise and the teacher's sample from it, each `(B, C, H, W)`.

        Raises:
            ValueError: if the data set is not one of pairs.
        """
        if self.latents is None or "noise" not in self.extra:
            raise ValueError(
                "this method trains on pairs of noise and the teacher's sample, but the data holds none. "
                "Make them with `fastdiff pairs` and give the folder as --data (--train_data_dir)."
            )
        return self.extra["noise"], self.latents


@dataclass
class Context:
    """What a loss may use besides its batch."""

    denoiser: Denoiser
    step: int
    random: Randomness
    modules: Mapping[str, nn.Module]
    store: dict[str, Any]
    """Passes what two updates of one step share, e.g. the student's sample; one store a micro-batch."""
    log: Callable[[str, Tensor], None]
    global_mean: Callable[[Tensor], Tensor] = lambda value: value
    decode: Callable[[Tensor], Tensor] = lambda latents: latents
    """The teacher's decoder, differentiable: latents `(B, C, h, w)` to images `(B, 3, H, W)` in [-1, 1]."""
    scorer: Scorer | None = None
    """Given to methods that say `needs_scorer()`."""


Loss = Callable[[Batch, Context], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Update:
    """One optimizer step: `loss` returns named terms that are summed; `trains` names the groups that step."""

    name: str
    loss: Loss
    trains: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Optimizer settings of a trainable role or module; `None` inherits the run's setting."""

    learning_rate: float | None = None
    betas: tuple[float, float] | None = None


@dataclass(frozen=True)
class TargetNetwork:
    """A role that follows another as an exponential moving average inside training (not for evaluation).

    Args:
        role: what moves; a role that is trained as well is pulled towards the other.
        source: what it moves to.
        decay: the share of its own weights that stays.
        after: the group whose step is followed by this one; the source if not given.
    """

    role: str
    source: str
    decay: float
    after: str | None = None


class Method(ABC):
    """Base of all methods. Subclasses set `info` and `Config`, and wire the shared objects.

    Args:
        config: an instance of the subclass's `Config`.
    """

    info: ClassVar[MethodInfo]
    Config: ClassVar[type]
    critics: ClassVar[tuple[str, ...]] = ()
    """Roles besides the student that start as the teacher and are trained, e.g. the fake score."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def groups(self) -> dict[str, Group]:
        """Trainable roles and modules by name; `student` is always one of them."""
        return {"student": Group()}

    def updates(self, step: int) -> Iterable[Update]:
        """The updates of one step, in order."""
        yield Update("student", self.student_loss, ("student",))

    @abstractmethod
    def student_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """The named terms of the student's loss on one micro-batch."""

    @abstractmethod
    def sampler(self) -> SamplerSpec:
        """How the student is to be sampled; previews, evaluation and export all use this one."""

    def needs(self) -> Need:
        """What the data must hold with this config; what `info` says unless a term asks for more."""
        return self.info.needs

    def random_stream(self) -> int:
        """Which stream of a seed's draws a run has, e.g. by the number of one of several students; 0 is the seed's own."""
        return 0

    def needs_scorer(self) -> bool:
        """Whether a term with this config asks `ctx.scorer`."""
        return False

    def compares_with_null(self) -> bool:
        """Whether this config asks a role without a prompt by itself, and not only for the sake of guidance: a network
        that embeds guidance has no such answer."""
        return False

    def modules(self, denoiser: Denoiser) -> dict[str, nn.Module]:
        """Trainable modules that are not denoisers, e.g. discriminator heads."""
        return {}

    def scorer_modules(self, scorer: Scorer) -> dict[str, nn.Module]:
        """Trainable modules on the scorer's features, e.g. heads of a discriminator of images; asked with a scorer."""
        return {}

    @property
    def own_network(self) -> bool:
        """Whether the student is another network than the teacher's (`student_network`), which no adapter can be."""
        return False

    @property
    def least_batch(self) -> int:
        """Samples a micro-batch must hold."""
        return 1

    def student_network(self, network: nn.Module) -> nn.Module | None:
        """The student's network when it needs inputs the teacher lacks, made from a copy of the teacher; else None."""
        return None

    def critic_network(self, network: nn.Module) -> nn.Module | None:
        """The network of full critics when it is not a copy of the teacher's; else None."""
        return None

    def choose(self, prompts: Sequence[str], encode: Callable[[Sequence[str]], Conditioning]) -> Sequence[int] | None:
        """The numbers of the samples this run trains on, of all the data's captions; None for all of them."""
        return None

    def check_ready(self) -> None:
        """Refuses to train when what must come first has not; asked before the first step.

        Raises:
            ValueError: naming what is missing.
        """

    def sampling_inputs(self, denoiser: Denoiser, batch_size: int, device: torch.device) -> dict[str, Tensor]:
        """Extra network inputs of the student when it is sampled, e.g. a guidance embedding."""
        return {}

    def step_inputs(self, denoiser: Denoiser, t: Tensor, s: Tensor) -> dict[str, Tensor]:
        """Extra network inputs of one sampling step from the times `t` to `s`, `(B,)`, e.g. an embedding of `s`."""
        return {}

    def experts(self) -> tuple[str, ...]:
        """The role that serves each step of `sampler()`: the student, unless it has frozen experts beside it."""
        return ("student",) * len(self.sampler())

    def targets(self) -> tuple[TargetNetwork, ...]:
        """Roles that follow others inside training."""
        return ()

    def frozen(self) -> Mapping[str, str]:
        """Roles that no update trains, each with the role whose kind (adapter or full) it has.

        They start as the teacher, and hold e.g. a recorded score or an earlier expert.
        """
        return {}

    def inherits(self) -> Mapping[str, tuple[str, ...]] | None:
        """What `init_from` gives to which role or module; None takes everything by its own name.

        Own name -> names in the earlier run, of which the first that is there counts.
        """
        return None

    def export_files(self) -> dict[str, dict[str, Tensor]]:
        """Tensors that belong beside the exported student, by the name of their file."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """What the method remembers between steps, besides weights."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores `state_dict()`."""


def check_positive(**values: float | None) -> None:
    """Refuses zero, negative and non-finite hyperparameters by name; None is inherited."""
    for name, value in values.items():
        if value is not None and not (value > 0 and value < float("inf")):
            raise ValueError(f"{name} must be a positive finite number, got {value}")


def check_not_negative(**values: float) -> None:
    """Refuses negative and non-finite hyperparameters by name."""
    for name, value in values.items():
        if not (value >= 0 and value < float("inf")):
            raise ValueError(f"{name} must be a finite number of at least 0, got {value}")


def check_falling(timesteps: tuple[int, ...]) -> None:
    """Refuses sampling times that do not go from noise to data."""
    if not timesteps or list(timesteps) != sorted(set(timesteps), reverse=True):
        raise ValueError(f"timesteps must fall strictly, noisiest first, got {timesteps}")


def any_time(ctx: Context, site: str, low: int = 0, high: int | None = None) -> Tensor:
    """A random time for each sample, `(B,)` float32, among the indices `low..high` (all of the teacher's by default)."""
    schedule = ctx.denoiser.schedule
    last = schedule.indices - 1 if high is None else high
    return schedule.time_of_index(ctx.random.integers(site, low, last + 1))


def log_normal_time(ctx: Context, site: str, mean: float, std: float) -> Tensor:
    """`(B,)` times at which ln(sigma / alpha) is normal, held inside the range the teacher knows.

    In flow matching's time this is the logit-normal law, in TrigFlow's ln tan(angle) is normal.
    """
    return ctx.denoiser.schedule.time_of_kappa((mean + std * ctx.random.normal(site, ())).exp())


def time_at(index: float | int, like: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The schedule time numbered `index` for every sample of `like`, `(B,)`, made without touching the host."""
    return schedule.time_of_index(torch.full((len(like),), float(index), device=like.device))
