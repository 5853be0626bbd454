"""FastGen's DMD2 on Stable Diffusion 1.5: `NVlabs/FastGen`, Apache-2.0."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from stand_in import open_sources
from torch import Tensor
from work import GUIDANCE, PROMPT, RANK, Noisings, Seen, Work, disturb, open_teacher

FOLDER, COMMIT = "NVlabs+FastGen", "34f30e8"
SILENT = ("wandb", "wandb.util", "boto3", "botocore", "botocore.config", "botocore.exceptions")
METHOD = "dmd2"
OURS = {"guidance_scale": GUIDANCE, "student_update_every": 2, "update_rule": "exclusive", "min_timestep": 1} | {
    "max_timestep": 999
}
STEPS = 2
CHECKPOINTED = {"gradient_checkpointing": True, "max_grad_norm": 10.0}
SETTINGS = {"student": "full", "fake_score": "full", **CHECKPOINTED}
LORA = {"student": "lora", "fake_score": "lora", "lora_rank": RANK, **CHECKPOINTED}
LOSSES = {"vsd_loss": "student", "fake_score_loss": "fake_score"}
NOTE = (
    "its Trainer.preprocess_data and Trainer.train_step with the SD15 DMD2 config; no GAN, float32, the fake score in "
    "the network's own prediction type, times on the grid of indices, prompts not masked (stock pipelines mask none); "
    "one step is a student's and a critic's iteration, each of which makes its own sample"
)


def load(sources: Path) -> None:
    """Its packages."""
    os.environ.setdefault("HF_HOME", str(sources / "hub"))
    open_sources(sources / FOLDER, SILENT)
    from fastgen import trainer  # noqa: F401
    from fastgen.configs.experiments.SD15 import config_dmd2  # noqa: F401


class Peer:
    """Its model and `Trainer`; its network checkpoints always."""

    def __init__(self, sources: Path, work: Work) -> None:
        load(sources)
        from fastgen.configs.experiments.SD15.config_dmd2 import create_config
        from fastgen.methods import DMD2Model
        from fastgen.networks import noise_schedule
        from fastgen.trainer import Trainer

        config = create_config()
        changes = {
            "device": "cpu",
            "precision_amp": None,
            "fake_score_pred_type": None,
            "gan_loss_weight_gen": 0.0,
            "student_update_freq": 2,
            "guidance_scale": GUIDANCE,
            "input_shape": [4, work.resolution // 8, work.resolution // 8],
        }
        for name, value in changes.items():
            setattr(config.model, name, value)
        config.model.net.model_id = str(work.folder)
        config.trainer.fsdp = config.trainer.ddp = False
        config.trainer.callbacks = {"grad_clip": config.trainer.callbacks["grad_clip"]}
        with _local_scheduler(noise_schedule, work.folder):
            self.model = DMD2Model(config.model)
        disturb(self.model.net.unet, "student")
        disturb(self.model.fake_score.unet, "fake_score")
        self.model.on_train_begin()
        self.model.init_optimizers()
        self.trainer = Trainer(config)
        self._unmask()
        self._on_grid()
        self.prompts = [PROMPT] * work.batch
        self.null = [""] * work.batch
        with torch.no_grad():
            self.latents = open_teacher(work).encode_images(work.images)
        self.iteration = 2  # an even one is the student's

    def step(self) -> dict[str, float]:
        """A student's and a critic's iteration, as `Trainer.run` makes them."""
        found: dict[str, float] = {}
        for _ in range(STEPS):
            data = {"real": self.latents, "condition": self.prompts, "neg_condition": self.null}
            data = self.trainer.preprocess_data(self.model, data, None)
            losses, _ = self.trainer.train_step(self.model, self.model, data, self.iteration, 0)
            found |= {name: float(value) for name, value in losses.items()}
            self.iteration += 1
        return found

    def first(self) -> Seen:
        """One step, its draws written down."""
        schedule = type(self.model.net.noise_scheduler)
        noisings, starts = Noisings(), []
        own = schedule.latents

        def latents(scheduler: Any, noise: Tensor, t_init: Tensor | None = None) -> Tensor:
            starts.append(own(scheduler, noise, t_init))
            return starts[-1]

        for group in self.model.net_optimizer.param_groups:
            group["lr"] = 0.0  # the critic's iteration samples the student, which is to be that of the student's
        patched = {"forward_process": noisings.around(schedule.forward_process), "latents": latents}
        with mock.patch.multiple(schedule, **patched):
            losses = self.step()
        draws = [
            {"student/0": start, f"{site}/t": (t * 1000).floor().long(), f"{site}/eps": eps}
            for site, start, (_, eps, t) in zip(("student", "critic"), starts, noisings.calls, strict=True)
        ]
        return Seen({name: losses[name] for name in LOSSES}, draws)

    def _unmask(self) -> None:
        encoder = self.model.net.text_encoder
        own = encoder.encode

        def encode(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            embeds, mask = own(*args, **kwargs)
            return embeds, torch.ones_like(mask)

        encoder.encode = encode

    def _on_grid(self) -> None:
        """Times a hair above an index: the schedule rounds them down, the network is told them as they are."""
        for network in (self.model.net, self.model.teacher, self.model.fake_score):
            schedule = network.noise_scheduler
            own = schedule.sample_t

            def sample_t(*args: Any, own: Any = own, **kwargs: Any) -> Tensor:
                return ((own(*args, **kwargs) * 1000).floor() / 1000 + 1e-9).clamp(max=0.999)

            schedule.sample_t = sample_t


@contextlib.contextmanager
def _local_scheduler(module: Any, folder: Path) -> Iterator[None]:
    """Inside, the schedule of the Hub's Stable Diffusion is that of the folder, which is the same."""
    own = module.DDIMScheduler

    def read(_source: str, subfolder: str, **_: Any) -> Any:
        return own.from_pretrained(folder, subfolder=subfolder)

    with mock.patch.object(module, "DDIMScheduler", mock.Mock(from_pretrained=read)):
        yield
