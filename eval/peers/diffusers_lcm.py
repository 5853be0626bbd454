"""diffusers' LCM-LoRA script, run as it is but for its data set: `huggingface/diffusers`, Apache-2.0."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from turns import Turns
from work import PROMPT, RANK, Noisings, Seen, Work, fill_adapters

SCRIPT = "huggingface+diffusers/examples/consistency_distillation/train_lcm_distill_lora_sd_wds.py"
COMMIT = "58eb52c"
METHOD = "lcm"
GUIDANCE = 8.0
"""Imagen's form; the script's `w` is one less."""
OURS = {"guidance_scale": GUIDANCE, "target_decay": 0.0}
STEPS = 1
SETTINGS = {"student": "lora", "lora_rank": RANK, "max_grad_norm": 1.0}
LOSSES = {"loss": "student"}
NOTE = "the whole script with its data set replaced; autocast off, which on a CPU would make the targets bfloat16"


class Peer:
    """The script's `main`, in a thread, one batch at a time."""

    def __init__(self, sources: Path, work: Work) -> None:
        script = load(sources)
        self.logged: list[dict[str, float]] = []
        self.turns = Turns((work.images, [PROMPT] * work.batch))
        patches = contextlib.ExitStack()
        for name, value in self._replaced(script, self.turns).items():
            patches.enter_context(mock.patch.object(script, name, value))
        patches.enter_context(mock.patch.object(torch, "autocast", lambda *a, **k: contextlib.nullcontext()))
        self.scheduler = script.DDPMScheduler
        with mock.patch.object(sys, "argv", ["script", *_flags(work)]):
            flags = script.parse_args()
        self.turns.start(lambda: script.main(flags))

    def step(self) -> None:
        self.turns.step()

    def first(self) -> Seen:
        """One step, its draws written down."""
        noisings = Noisings()
        with mock.patch.object(self.scheduler, "add_noise", noisings.around(self.scheduler.add_noise)):
            self.step()
        ((latents, eps, start),) = noisings.calls
        stride = 1000 // 50
        draws = {"pair": (start + 1) // stride - 1, "eps": eps}
        return Seen({"loss": self.logged[-1]["loss"]}, [draws], latents)

    def _replaced(self, script: Any, turns: Turns) -> dict[str, Any]:
        logged = self.logged

        class Loud(script.Accelerator):
            def log(self, values: dict[str, float], **kwargs: Any) -> None:
                logged.append(values)
                super().log(values, **kwargs)

        def adapted(network: Any, config: Any) -> Any:
            wrapped = own(network, config)
            fill_adapters(wrapped, "base_model.model.")
            return wrapped

        own = script.get_peft_model
        data = mock.Mock(train_dataloader=turns)
        return {"SDText2ImageDataset": lambda **_: data, "Accelerator": Loud, "get_peft_model": adapted}


def _flags(work: Work) -> list[str]:
    folder = tempfile.mkdtemp(prefix="diffusers-lcm-")
    values = {
        "pretrained_teacher_model": work.folder,
        "output_dir": folder,
        "resolution": work.resolution,
        "train_batch_size": work.batch,
        "max_train_steps": 10**8,
        "max_train_samples": 10**9,
        "checkpointing_steps": 10**9,
        "validation_steps": 10**9,
        "loss_type": "huber",
        "lora_rank": RANK,
        "lora_alpha": RANK,
        "w_min": GUIDANCE - 1,
        "w_max": GUIDANCE - 1,
        "lr_warmup_steps": 0,
        "mixed_precision": "no",
        "train_shards_path_or_url": "unused",
    }
    return [f"--{name}={value}" for name, value in values.items()]


def load(sources: Path) -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("diffusers_lcm_script", sources / SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
