"""The adversarial block of all methods: small trainable heads on a network's features of noised samples.

A head gives a logit for (x_t, t, conditioning), real being positive. With softplus losses its optimum is
log p_real,t(x_t) / p_fake,t(x_t); with hinge losses it is not a log-ratio. Real and fake samples get independent noise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.diffusion.losses import (
    discriminator_hinge,
    discriminator_softplus,
    generator_hinge,
    generator_margin,
    generator_softplus,
    mse,
)
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.schedules import Terminal
from fastdiff.methods.base import Context, any_time
from fastdiff.models.conditioning import Conditioning
from fastdiff.models.denoiser import Denoiser, Taps
from fastdiff.models.discriminator import FeatureHeads
from fastdiff.models.roles import TEACHER

GanLoss = Literal["softplus", "hinge", "margin"]
FeatureBlocks = Literal["middle", "encoder", "all"]


class Noisy(NamedTuple):
    """Samples `(B, C, H, W)` at their times `(B,)`."""

    x_t: Tensor
    t: Tensor


@dataclass(frozen=True)
class NoiseLaw:
    """log(sigma / alpha) ~ N(mean, std^2) as the law of the discriminator's times, cut at the ends of the schedule.

    On a rectified flow, where sigma / alpha = t / (1 - t), this is the logit-normal law of Esser et al. 2024 (arXiv
    2403.03206, sec. 3.1); a positive mean favours noise. It means the same on any schedule.
    """

    mean: float = 0.0
    std: float = 1.0


class Players:
    """The losses of generator and discriminator on logits of any shape `(B, ...)`."""

    loss: GanLoss
    r1_weight: float
    r1_std: float

    def generator_loss(self, fake_logits: Tensor) -> Tensor:
        """What the student minimises."""
        match self.loss:
            case "softplus":
                return generator_softplus(fake_logits)
            case "hinge":
                return generator_hinge(fake_logits)
            case "margin":
                return generator_margin(fake_logits)

    def discriminator_loss(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """What the heads minimise."""
        loss = discriminator_softplus if self.loss == "softplus" else discriminator_hinge
        return loss(real_logits, fake_logits)

    def sides(self, real: Tensor, fake: Tensor, ctx: Context, site: str) -> Tensor:
        """What the discriminator is shown in one call: fake, real and, for the penalty, slightly moved real samples."""
        parts = [fake, real]
        if self.r1_weight:
            parts.append(real + self.r1_std * ctx.random.normal(f"{site}/r1", real.shape[1:]))
        return torch.cat(parts)

    def terms(self, logits: Tensor, rows: int, ctx: Context) -> dict[str, Tensor]:
        """The discriminator's losses on the logits of `sides` of `rows` samples each."""
        fake, real, *moved = logits.split(rows)
        ctx.log("logit_real", real.detach().mean())
        ctx.log("logit_fake", fake.detach().mean())
        terms = {"discriminator": self.discriminator_loss(real, fake)}
        return terms | ({"r1": self.r1_weight * mse(real, moved[0])} if moved else {})


@dataclass(frozen=True)
class Adversary(Players):
    """Heads on the features of a role, and the losses of both players; means over samples and heads.

    Args:
        role: whose features. `teacher`'s are frozen, so that only heads learn; another role learns with its heads.
        loss: `softplus`; `hinge`, whose generator maximises the logit; `margin`, hinge with generator relu(1 - logit).
        blocks: which of the family's taps get a head; `encoder` is everything up to the middle.
        times: at which noise levels; None is uniform over the schedule's indices.
        r1_weight: weight of the squared change of real logits when `r1_std` noise is added to the *noised* input
            (approximate R1, Lin et al. 2025, arXiv 2501.08316).
        r1_std: standard deviation of that noise.
        name: name of the heads as a module and trainable group.
    """

    role: str = TEACHER
    loss: GanLoss = "softplus"
    blocks: FeatureBlocks = "all"
    times: NoiseLaw | None = None
    r1_weight: float = 0.0
    r1_std: float = 0.1
    name: str = "discriminator"

    def modules(self, denoiser: Denoiser) -> dict[str, nn.Module]:
        """The heads, for `Method.modules`."""
        return {self.name: FeatureHeads(self.taps(denoiser).values())}

    def taps(self, denoiser: Denoiser) -> dict[str, int]:
        """Name and channels of the activations that are read."""
        network = denoiser.roles.network(self.role)
        middle, every = denoiser.family.middle_taps(network), denoiser.family.feature_taps(network)
        if self.blocks == "middle":
            return middle
        names = list(every)
        last = names.index(list(middle)[-1]) if self.blocks == "encoder" else len(names)
        return {name: every[name] for name in names[: last + 1]}

    # Inputs

    def time(self, ctx: Context, site: str) -> Tensor:
        """A time for each sample, `(B,)`."""
        if self.times is None:
            return any_time(ctx, f"{site}/t")
        kappa = (self.times.mean + self.times.std * ctx.random.normal(f"{site}/t", ())).exp()
        schedule = ctx.denoiser.schedule
        indices = torch.arange(schedule.indices, device=kappa.device)
        # The next noisier index: some networks were trained on whole numbers only.
        index = torch.searchsorted(schedule.kappa(schedule.time_of_index(indices)), kappa)
        return schedule.time_of_index(index.clamp_max(schedule.indices - 1))

    def noised(
        self, x: Tensor, ctx: Context, site: str, t: Tensor | None = None, start: Tensor | Terminal | None = None
    ) -> Noisy:
        """`x` with fresh noise, at `t` (drawn if not given). `x` is clean, or a sample at times `start` <= `t`."""
        t = self.time(ctx, site) if t is None else t
        eps, schedule = ctx.random.normal(f"{site}/eps", x.shape[1:]), ctx.denoiser.schedule
        x_t = schedule.add_noise(x, eps, t) if start is None else schedule.transition(x, start, t, eps)
        return Noisy(x_t, t)

    # What the players are told

    def logits(self, noisy: Noisy, cond: Conditioning, ctx: Context) -> Tensor:
        """`(B, K)`, one for each head; differentiable in `x_t`."""
        names = tuple(self.taps(ctx.denoiser))
        return ctx.modules[self.name](*ctx.denoiser.features(noisy.x_t, noisy.t, cond, self.role, names))

    def student_term(self, x: Tensor, cond: Conditioning, ctx: Context, site: str = "student/gan") -> Tensor:
        """The generator's loss on clean samples `x` with their graph."""
        return self.generator_loss(self.logits(self.noised(x, ctx, site), cond, ctx))

    def discriminator_terms(
        self, real: Noisy, fake: Noisy, cond: Conditioning, ctx: Context, site: str = "critic/gan"
    ) -> dict[str, Tensor]:
        """The discriminator's losses on detached samples, in one call of the role."""
        noisy = self._rows(real, fake, ctx, site)
        frozen = torch.no_grad() if self.role == TEACHER else contextlib.nullcontext()
        names = tuple(self.taps(ctx.denoiser))
        with frozen:
            features = ctx.denoiser.features(*noisy, cond.cat([cond] * _blocks(noisy, cond)), self.role, names)
        return self.terms(ctx.modules[self.name](*features), len(cond), ctx)

    def terms_beside(
        self, noisy: Noisy, real: Noisy, fake: Noisy, cond: Conditioning, ctx: Context, site: str = "critic/gan"
    ) -> tuple[Prediction, dict[str, Tensor]]:
        """The role's prediction at `noisy` and the discriminator's losses, in one call of the role."""
        rows, others = len(cond), self._rows(real, fake, ctx, site)
        every = Noisy(torch.cat([noisy.x_t, others.x_t]), torch.cat([noisy.t, others.t]))
        taps = Taps(tuple(self.taps(ctx.denoiser)))
        prediction = ctx.denoiser(*every, cond.cat([cond] * _blocks(every, cond)), self.role, taps=taps)
        logits = ctx.modules[self.name](*(taps.features[name][rows:] for name in taps.names))
        own = Prediction(prediction.native[:rows], prediction.kind, noisy.x_t, noisy.t, prediction.schedule)
        return own, self.terms(logits, rows, ctx)

    def _rows(self, real: Noisy, fake: Noisy, ctx: Context, site: str) -> Noisy:
        samples = self.sides(real.x_t, fake.x_t, ctx, site)
        times = torch.cat([fake.t, real.t, real.t] if self.r1_weight else [fake.t, real.t])
        return Noisy(samples, times)


def check_discriminator(gan_weight: float, gan_discriminator_weight: float) -> None:
    """Refuses an adversarial term of a discriminator that never learns.

    Raises:
        ValueError: with the remedy.
    """
    if gan_weight > 0 and gan_discriminator_weight == 0:
        raise ValueError(
            f"gan_weight {gan_weight} asks a discriminator that gan_discriminator_weight 0 never trains: "
            "gan_discriminator_weight must be above 0, or gan_weight 0"
        )


def weighted(terms: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    """All terms times `weight`."""
    return {name: weight * term for name, term in terms.items()}


def _blocks(noisy: Noisy, cond: Conditioning) -> int:
    return len(noisy.t) // len(cond)
