"""LADD: latent adversarial diffusion distillation (Sauer et al. 2024, arXiv 2403.12015)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastdiff.diffusion.tensors import DeviceTable, broadcast_to
from fastdiff.methods._adversarial import Adversary, FeatureBlocks, GanLoss, NoiseLaw
from fastdiff.methods._rollout import MultiStepInput, student_sample
from fastdiff.methods._routed_student import RoutedStudent, RoutedStudentConfig
from fastdiff.methods._unread import refuse_unread
from fastdiff.methods.base import (
    Batch,
    Context,
    Group,
    MethodInfo,
    Update,
    check_falling,
    check_not_negative,
    check_positive,
)
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.sampler import SamplerSpec


@dataclass(frozen=True)
class LADDConfig(RoutedStudentConfig):
    """The paper's choices where it names them.

    Args:
        timesteps: the student's times, noisiest first; one entry makes a one-step student.
        timestep_probabilities: how often each of them is trained; equally often if not given. Runs that start at the
            cleaner times, as a warm-up, are stages with other probabilities.
        multi_step_input: how later steps get their input: noise clean images, or simulate the student itself.
        gan_loss: `hinge` (the paper), `softplus` (FastGen), or `margin`, hinge with the generator relu(1 - logit).
        gan_blocks: one head on each block of the teacher, of its encoder, or on the middle block alone.
        noise_law: levels at which the discriminator compares: log(sigma/alpha) normal, which on a rectified flow is
            the paper's logit-normal law of t, or uniform times.
        noise_mean, noise_std: of that normal law; more noise judges the composition, less the texture.
        gan_r1_weight: weight of the approximate R1 penalty of the discriminator.
        gan_same_noise: judge sample and image of a row at one time and noise (an option of FastGen), not at two.
        update_rule: `exclusive` updates either the student or the heads in a step (FastGen); `every` updates the heads
            in each step.
        student_update_every: steps per student update.
        discriminator_learning_rate: learning rate of the heads; the student's if not given.
    """

    timesteps: tuple[int, ...] = (999, 749, 499, 249)
    timestep_probabilities: tuple[float, ...] = ()
    multi_step_input: MultiStepInput = "noised_data"
    gan_loss: GanLoss = "hinge"
    gan_blocks: FeatureBlocks = "all"
    noise_law: Literal["log_normal", "uniform"] = "log_normal"
    noise_mean: float = 1.0
    noise_std: float = 1.0
    gan_r1_weight: float = 0.0
    gan_same_noise: bool = False
    update_rule: Literal["every", "exclusive"] = "exclusive"
    student_update_every: int = 5
    discriminator_learning_rate: float | None = None

    def __post_init__(self) -> None:
        self.check_students()
        check_positive(noise_std=self.noise_std, student_update_every=self.student_update_every)
        check_not_negative(gan_r1_weight=self.gan_r1_weight)
        check_positive(discriminator_learning_rate=self.discriminator_learning_rate)
        check_falling(self.timesteps)
        if self.update_rule == "exclusive" and self.student_update_every == 1:
            raise ValueError("with update_rule exclusive, student_update_every 1 never trains the discriminator")
        if self.noise_law == "uniform":
            refuse_unread(self, ("noise_mean", "noise_std"), "with noise_law uniform")
        self._check_probabilities()

    def _check_probabilities(self) -> None:
        given = self.timestep_probabilities
        if not given:
            return
        if len(given) != len(self.timesteps) or min(given) < 0 or abs(sum(given) - 1) > 1e-6:
            raise ValueError(
                f"timestep_probabilities {given} must be one number of at least 0 for each of the "
                f"{len(self.timesteps)} timesteps, with sum 1"
            )
        if self.multi_step_input == "simulate":
            raise ValueError(
                "multi_step_input simulate draws one step for all samples, equally often, so that the rollout is "
                "shared: leave out timestep_probabilities, or take noised_data"
            )


class LADD(RoutedStudent):
    r"""A generative adversarial network on the features of the frozen teacher; no score is matched.

    With x the student's sample, k the teacher's blocks, x_t and y_t noised samples and images at independent times and
    noises, l_k = head_k(features_k(x_t, t, text)), means over samples and heads,

        L_student = -mean l_k(x_t),      L_heads = mean relu(1 + l_k(x_t)) + mean relu(1 - l_k(y_t)), x detached.

    The teacher's weights get no gradient; the student's passes through them into x. The data should be the teacher's
    own guided samples (`fastdiff pairs`), whose guidance the student then takes over. The heads see noise level and
    text through the teacher's features only; the paper's are told both. With softplus losses and optimal heads on the
    noised samples themselves, the student descends the softened reverse KL divergence of f-distill (h = 1 / (1 + r)).
    """

    info = MethodInfo(
        name="ladd",
        title="LADD",
        family="adversarial",
        paper="Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion Distillation",
        arxiv="2403.12015",
        needs="images",
        student_kinds=("lora", "full"),
        steps="1-4",
    )
    Config = LADDConfig
    config: LADDConfig

    def __init__(self, config: LADDConfig) -> None:
        super().__init__(config)
        law = NoiseLaw(config.noise_mean, config.noise_std) if config.noise_law == "log_normal" else None
        self.adversary = Adversary(
            loss=config.gan_loss, blocks=config.gan_blocks, times=law, r1_weight=config.gan_r1_weight
        )
        self._times = DeviceTable(torch.tensor(config.timesteps, device="cpu"))

    def groups(self) -> dict[str, Group]:
        return {"student": Group(), "discriminator": Group(self.config.discriminator_learning_rate)}

    def modules(self, denoiser: Denoiser) -> dict[str, nn.Module]:
        return self.adversary.modules(denoiser)

    def updates(self, step: int) -> Iterable[Update]:
        student_turn = step % self.config.student_update_every == 0
        if student_turn:
            yield Update("student", self.student_loss, ("student",))
        if not student_turn or self.config.update_rule == "every":
            yield Update("discriminator", self.discriminator_loss, ("discriminator",))

    def sampler(self) -> SamplerSpec:
        return SamplerSpec("lcm", self.config.timesteps)

    def student_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """The generator's loss."""
        x = self.sample(batch, ctx)
        ctx.store["x"] = x.detach()
        ctx.log("latent_std", x.detach().std())
        return {"gan": self.adversary.student_term(x, batch.cond, ctx)}

    def discriminator_loss(self, batch: Batch, ctx: Context) -> Mapping[str, Tensor]:
        """The heads' loss on this step's samples, or on new ones."""
        x = ctx.store.get("x")
        if x is None:
            with torch.no_grad():
                x = self.sample(batch, ctx)
        fake = self.adversary.noised(x, ctx, "critic/gan_fake")
        site = "critic/gan_fake" if self.config.gan_same_noise else "critic/gan_real"
        real = self.adversary.noised(batch.images(), ctx, site)
        return self.adversary.discriminator_terms(real, fake, batch.cond, ctx)

    def sample(self, batch: Batch, ctx: Context) -> Tensor:
        """The student's clean sample `(B, C, H, W)`, with its graph where gradients are on."""
        timesteps = self.config.timesteps
        if len(timesteps) == 1 or self.config.multi_step_input == "simulate":
            return student_sample(batch, ctx, timesteps, with_grad=torch.is_grad_enabled())
        t, x_t = self._noised_images(batch, ctx)
        return ctx.denoiser(x_t, t, batch.cond, "student").x0

    def _noised_images(self, batch: Batch, ctx: Context) -> tuple[Tensor, Tensor]:
        """One of the student's times for each sample; at the first of them plain noise, else a noised image."""
        schedule = ctx.denoiser.schedule
        position = self._positions(ctx.random.uniform("student/step"))
        t = schedule.time_of_index(self._times.on(position.device)[position])
        noise = ctx.random.normal("student/0", batch.latent_shape)
        noised = schedule.add_noise(batch.images(), noise, t)
        return t, torch.where(broadcast_to(position == 0, noised), noise.to(noised.dtype), noised)

    def _positions(self, u: Tensor) -> Tensor:
        """Which of the student's times each uniform draw stands for, as often as `timestep_probabilities` says."""
        count = len(self.config.timesteps)
        total, position = 0.0, torch.zeros_like(u, dtype=torch.int64)
        for probability in self.config.timestep_probabilities or (1 / count,) * count:
            total += probability
            position += u >= total
        return position.clamp_max(count - 1)
