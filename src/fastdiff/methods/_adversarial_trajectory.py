"""An adversarial term beside the consistency loss: heads on the frozen teacher's features tell end points apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fastdiff.methods._adversarial import Adversary, Noisy, weighted
from fastdiff.methods._trajectory import Pair, Trajectory, TrajectoryConfig
from fastdiff.methods.base import Batch, Context, Group, Update, check_not_negative, check_positive
from fastdiff.models.denoiser import Denoiser


@dataclass(frozen=True)
class AdversarialTrajectoryConfig(TrajectoryConfig):
    """A grid of solver steps with an adversarial term.

    Args:
        adversarial_weight: weight of the generator's term; 0 leaves the discriminator out.
        discriminator_learning_rate: learning rate of the heads; the student's if not given.
    """

    adversarial_weight: float = 0.0
    discriminator_learning_rate: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(adversarial_weight=self.adversarial_weight)
        check_positive(discriminator_learning_rate=self.discriminator_learning_rate)


class AdversarialTrajectory(Trajectory):
    """Consistency, and a discriminator on noised end points; the student steps first, then the heads on the same pair.

    By default the target's end point is real, the student's is fake, and both are noised within the next 1/`windows`
    of the indices above their end (Wang et al. 2024, arXiv 2405.18407, section 3.3).
    """

    adversary: ClassVar[Adversary] = Adversary(loss="hinge")
    config: AdversarialTrajectoryConfig

    @property
    def windows(self) -> int:
        """Noise of a comparison reaches over this part of the indices."""
        return 1

    def inherits(self) -> Mapping[str, tuple[str, ...]] | None:
        """A run that goes on from another keeps its discriminator too."""
        return {**super().inherits(), "discriminator": ("discriminator",)}

    def groups(self) -> dict[str, Group]:
        if not self.config.adversarial_weight:
            return super().groups()
        # The published heads are trained without momentum.
        return super().groups() | {"discriminator": Group(self.config.discriminator_learning_rate, (0.0, 0.999))}

    def modules(self, denoiser: Denoiser) -> dict[str, nn.Module]:
        return self.adversary.modules(denoiser) if self.config.adversarial_weight else {}

    def updates(self, step: int) -> Iterable[Update]:
        yield from super().updates(step)
        if self.config.adversarial_weight:
            yield Update("discriminator", self.discriminator_loss, ("discriminator",))

    def student_terms(self, pair: Pair, batch: Batch, ctx: Context) -> dict[str, Tensor]:
        if not self.config.adversarial_weight:
            return {}
        ctx.store["pair"] = Pair(pair.student.detach(), pair.target, pair.place)
        fake = self.compared(pair.student, pair, self.noise_time(pair, ctx, "gan"), ctx, "gan/fake")
        logits = self.adversary.logits(fake, batch.cond, ctx)
        return weighted({"gan": self.adversary.generator_loss(logits)}, self.config.adversarial_weight)

    def discriminator_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """The heads' loss on the pair of the student's update."""
        pair: Pair = ctx.store["pair"]
        t = self.noise_time(pair, ctx, "critic/gan")
        fake = self.compared(pair.student, pair, t, ctx, "critic/gan/fake")
        real = self.compared(self.real(pair, batch), pair, t, ctx, "critic/gan/real")
        return self.adversary.discriminator_terms(real, fake, batch.cond, ctx)

    def real(self, pair: Pair, batch: Batch) -> Tensor:
        """What the student's end points should be taken for."""
        return pair.target

    def noise_time(self, pair: Pair, ctx: Context, site: str) -> Tensor:
        """A time above the end of each map, within its window."""
        schedule = ctx.denoiser.schedule
        above = ctx.random.integers(f"{site}/t", 1, schedule.indices // self.windows + 1)
        return schedule.time_of_index((pair.place.end + above).clamp_max(schedule.indices - 1))

    def compared(self, x: Tensor, pair: Pair, t: Tensor, ctx: Context, site: str) -> Noisy:
        """End points noised to `t`."""
        start = ctx.denoiser.schedule.time_of_index(pair.place.end)
        return self.adversary.noised(x, ctx, site, t, start)
