"""Our side: a trainer on the shared pipeline, stepped one batch at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from work import PROMPT, Work, disturb, fill_adapters, open_teacher

from fastdiff.data import PromptData
from fastdiff.diffusion import InjectedRandomness, Randomness
from fastdiff.engine import Settings, Trainer
from fastdiff.methods import Batch, Context, method_named
from fastdiff.planning.walk import PlannedProcess


class Ours:
    """A method with the peer's hyperparameters.

    Args:
        work: what both sides share.
        method, config: what is computed.
        settings: of the run, besides the batch and the peer's clipping.
        steps: training steps for one of the peer's, where ours splits turns.
    """

    def __init__(
        self, work: Work, method: str, config: Mapping[str, Any], settings: Mapping[str, Any], steps: int = 1
    ) -> None:
        built = method_named(method)(method_named(method).Config(**config))
        self.steps = steps
        settings = Settings(
            output_dir=tempfile.mkdtemp(prefix="fastdiff-peers-"),
            resolution=work.resolution,
            train_batch_size=work.batch,
            report_to="none",
            log_every=10**6,
            **settings,
        )
        teacher = open_teacher(work)
        self.trainer = Trainer(built, teacher, PromptData([PROMPT]), settings, accelerator=PlannedProcess())
        self.trainer.step = self.first = 2 * steps  # step 0 also weighs terms
        roles = self.trainer.networks.roles
        fill_adapters(roles.base)
        for role in built.groups():
            if not roles.is_adapter(role):
                disturb(roles.network(role), role)
        with torch.no_grad():
            latents = teacher.encode_images(work.images)
        self.batch = Batch(
            indices=torch.arange(work.batch),
            cond=teacher.encode([PROMPT] * work.batch, work.resolution),
            null=self.trainer.batches.null,
            latent_shape=self.trainer.batches.latent_shape,
            latents=latents,
        )

    def step(self) -> None:
        """What the peer's step does."""
        for _ in range(self.steps):
            self.trainer.train_step([self.batch])

    def losses(self, draws: Sequence[Mapping[str, Tensor]], latents: Tensor | None = None) -> dict[str, float]:
        """Losses of the first steps by update, with the draws given; no weight moves."""
        changed = {} if latents is None else {"latents": latents}
        batch = Batch(**{**vars(self.batch), **changed})
        found: dict[str, float] = {}
        for number, values in enumerate(draws):
            step = self.first + number
            random = InjectedRandomness(values, Randomness(0, step, batch.indices))
            denoiser, modules = self.trainer.networks.denoiser, self.trainer.networks.modules
            ctx = Context(denoiser, step, random, modules, {}, lambda name, value: None)
            for update in self.trainer.method.updates(step):
                with torch.no_grad():
                    found[update.name] = float(sum(update.loss(batch, ctx).values()))
        return found
