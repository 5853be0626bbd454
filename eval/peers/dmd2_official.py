"""DMD2's own trainer on Stable Diffusion 1.5: `tianweiy/DMD2`, CC BY-NC-SA, run here and not copied from."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from stand_in import open_sources
from work import GUIDANCE, PROMPT, RANK, Noisings, Seen, Work, disturb

FOLDER, COMMIT = "tianweiy+DMD2", "8d8fa55"
SILENT = ("wandb", "lmdb", "imageio", "imageio.v2")
METHOD = "dmd2"
OURS = {"guidance_scale": GUIDANCE, "student_update_every": 1}
STEPS = 1
CHECKPOINTED = {"gradient_checkpointing": True, "max_grad_norm": 10.0}
SETTINGS = {"student": "full", "fake_score": "full", **CHECKPOINTED}
LORA = {"student": "lora", "fake_score": "lora", "lora_rank": RANK, **CHECKPOINTED}
LOSSES = {"loss_dm": "student", "loss_fake_mean": "fake_score"}
NOTE = (
    "its Trainer.train_one_step with the flags of its SD1.5 run (no GAN, gradient checkpointing), float32, both turns in "
    "every step; the tracker is silent and its image data set, which this run never reads, is empty"
)


def load(sources: Path) -> Any:
    """Its training module."""
    open_sources(sources / FOLDER, SILENT)
    from main import train_sd

    return train_sd


class Peer:
    """Its `Trainer`."""

    def __init__(self, sources: Path, work: Work) -> None:
        train_sd = load(sources)
        self.logged: list[dict[str, float]] = []
        folder = Path(tempfile.mkdtemp(prefix="dmd2-"))
        tracker = mock.MagicMock()
        tracker.init.return_value.dir = str(folder / "tracker")
        tracker.log = lambda values, step: self.logged.append(values)
        own = train_sd.Accelerator

        def accelerator(dispatch_batches: bool, **kwargs: Any) -> Any:  # which newer versions take elsewhere
            return own(**kwargs)

        replaced = {"wandb": tracker, "Accelerator": accelerator, "SDImageDatasetLMDB": lambda *a, **k: _nothing(work)}
        with mock.patch.multiple(train_sd, **replaced), mock.patch.object(sys, "argv", ["x", *_flags(work, folder)]):
            self.trainer = train_sd.Trainer(train_sd.parse_args())
        train_sd.wandb = tracker
        self.trainer.step = 1  # at 0 it also draws pictures
        disturb(self.trainer.model.feedforward_model, "student")
        disturb(self.trainer.model.guidance_model.fake_unet, "fake_score")

    def step(self) -> None:
        self.trainer.train_one_step()

    def first(self) -> Seen:
        """One step, its draws written down."""
        noisings, starts = Noisings(), []
        model = self.trainer.model
        scheduler = type(model.noise_scheduler)
        hook = model.register_forward_pre_hook(lambda _, args: starts.append(args[0].clone()))
        with mock.patch.object(scheduler, "add_noise", noisings.around(scheduler.add_noise)):
            self.step()
        hook.remove()
        (_, eps, t), (_, critic_eps, critic_t) = noisings.calls
        draws = {"student/0": starts[0], "student/t": t, "student/eps": eps}
        draws |= {"critic/t": critic_t, "critic/eps": critic_eps}
        return Seen({name: self.logged[-1][name] for name in LOSSES}, [draws])


def _nothing(work: Work) -> torch.utils.data.Dataset:
    return torch.utils.data.TensorDataset(torch.zeros(work.batch, 1))


def _flags(work: Work, folder: Path) -> list[str]:
    prompts = folder / "prompts.txt"
    prompts.write_text(f"{PROMPT}\n" * work.batch, encoding="utf-8")
    side = work.resolution // 8
    values = {
        "model_id": work.folder,
        "output_path": folder / "out",
        "cache_dir": folder / "cache",
        "log_path": folder / "log",
        "train_prompt_path": prompts,
        "batch_size": work.batch,
        "resolution": work.resolution,
        "latent_resolution": side,
        "real_guidance_scale": GUIDANCE,
        "generator_lr": 1e-5,
        "guidance_lr": 1e-5,
        "warmup_step": 0,
        "max_grad_norm": 10.0,
        "wandb_iters": 10**9,
        "wandb_name": "x",
        "num_workers": 0,
        "dfake_gen_update_ratio": 1,
        "real_image_path": "unused",
    }
    switches = ("initialie_generator", "log_loss", "no_save", "gradient_checkpointing")
    return [*(f"--{name}={value}" for name, value in values.items()), *(f"--{name}" for name in switches)]
