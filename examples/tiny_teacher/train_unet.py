"""Stage 5: the teacher's network on precomputed latents and text embeddings: a UNet that predicts noise, or with --flow
an SD3 transformer that predicts velocities.

    python train_unet.py --data emoji.parquet --autoencoder runs/autoencoder --text_encoder runs/text_encoder \
        --output runs/unet --minutes 75
    python train_unet.py --flow teacher --data emoji.parquet --output runs/flow --minutes 60

The caption level is drawn for each image and step; one caption in ten is empty, so that guidance works. SIGTERM ends
the run early and cleanly; ``--snapshot`` writes the moving average as a whole pipeline every few minutes.
"""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Callable
from pathlib import Path

import torch
from assemble import SCHEDULE, assemble, load_pipeline
from common import (
    LEVEL_PROBABILITIES,
    LEVELS,
    Progress,
    Rows,
    count_parameters,
    epochs,
    image_grid,
    parser,
    seed_everything,
    split_decay,
    write_record,
)
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.training_utils import EMAModel, compute_snr
from flow import Flow
from train_autoencoder import reconstruct
from train_text_encoder import tokenize
from transformers import CLIPTextModel, CLIPTokenizer

Inputs = dict[str, torch.Tensor]
"""Inputs of a network that stand for captions: (N, ...) by name."""

PREVIEW = (
    "red apple",
    "red apple, noto style",
    "an animal",
    "a fruit",
    "a smiling face",
    "flag of japan",
    "red heart",
)
PREVIEW += (
    "automobile, twemoji style",
    "dog face, noto style",
    "deciduous tree",
    "house, fluent flat style",
    "a person at work",
)
PREVIEW += ("blue circle", "banana, fluent 3d style", "a flower", "cat face, twemoji style")


def build(latent_channels: int, channels: list[int]) -> UNet2DConditionModel:
    """Three resolutions (8, 4, 2) with cross-attention at 4 x 4 and in the middle (2 x 2)."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=tuple(channels),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


@torch.no_grad()
def encode_latents(folder: Path, images: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Scaled latents (N, 8, 8, 8) of images in [0, 1], and the factor that gives them unit pooled deviation."""
    vae = AutoencoderTiny.from_pretrained(folder).eval()
    latents = reconstruct(vae, images)[1]
    if vae.config.scaling_factor != 1:  # that of an assembled pipeline
        return latents * vae.config.scaling_factor, vae.config.scaling_factor
    record = folder / "latents.json"
    if not record.exists():
        record.write_text(json.dumps({"scaling_factor": round(1 / latents.std().item(), 5)}) + "\n")
    factor = json.loads(record.read_text())["scaling_factor"]
    return latents * factor, factor


class Captions:
    """A table of embeddings of all different captions and, for each level, each image's row in it; row 0 is empty."""

    def __init__(self, embed: Callable[[list[str]], Inputs], captions: dict[str, list[str]]):
        unique = ["", *sorted({c for level in LEVELS for c in captions[level]})]
        number = {caption: i for i, caption in enumerate(unique)}
        self.rows = torch.tensor([[number[c] for c in captions[level]] for level in LEVELS])
        self.table = embed(unique)

    def draw(self, index: torch.Tensor, dropout: float, generator: torch.Generator) -> Inputs:
        """Embeddings of B captions at a random level for each image, empty with probability ``dropout``."""
        levels = torch.multinomial(
            torch.tensor(LEVEL_PROBABILITIES), len(index), replacement=True, generator=generator
        )
        rows = self.rows[levels, index]
        rows = rows.where(torch.rand(len(index), generator=generator) >= dropout, 0)
        return {name: values[rows] for name, values in self.table.items()}


def stratified_timesteps(count: int, generator: torch.Generator) -> torch.Tensor:
    """Timesteps 0..999, one from each of ``count`` equal strata, in random order."""
    offsets = torch.rand(count, generator=generator)
    steps = ((torch.arange(count) + offsets) / count * SCHEDULE["num_train_timesteps"]).long()
    return steps[torch.randperm(count, generator=generator)]


class Noise:
    """Training pairs of noise prediction, and text as Stable Diffusion's pipeline gives it."""

    stage = "unet"
    checked = (100, 300, 500, 700, 900)
    inputs = ("encoder_hidden_states",)

    def __init__(self, settings: argparse.Namespace):
        self.settings, self.scheduler = settings, DDIMScheduler(**SCHEDULE)

    def build(self, latent_channels: int) -> UNet2DConditionModel:
        if self.settings.init_from:
            return UNet2DConditionModel.from_pretrained(self.settings.init_from).float()
        return build(latent_channels, self.settings.channels)

    @torch.no_grad()
    def embed(self, captions: list[str]) -> Inputs:
        """Last hidden states (N, CONTEXT, 128)."""
        folder = self.settings.text_encoder
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        model = CLIPTextModel.from_pretrained(folder / "text_encoder").float().eval()
        parts = [model(tokenize(tokenizer, captions[i : i + 500])) for i in range(0, len(captions), 500)]
        return {"encoder_hidden_states": torch.cat([part.last_hidden_state for part in parts])}

    def pairs(self, clean, text: Inputs, generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noisy latents, timesteps, noise, and the weight (B,) of each error: min-SNR."""
        noise = torch.randn(clean.shape, generator=generator)
        steps = stratified_timesteps(len(clean), generator)
        weight = torch.ones(len(clean))
        if gamma := self.settings.snr_gamma:
            snr = compute_snr(self.scheduler, steps)
            weight = snr.clamp(max=gamma) / snr
        return *self.at(clean, noise, steps), weight

    def at(self, clean, noise, steps) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noisy latents at given timesteps, these, and what is to be said there."""
        return self.scheduler.add_noise(clean, noise, steps), steps, noise

    def assemble(self, model: UNet2DConditionModel, output: Path) -> None:
        assemble(self.settings.autoencoder, self.settings.text_encoder, model, output)


def answer(model: torch.nn.Module, process, noisy: torch.Tensor, steps: torch.Tensor, text: Inputs) -> torch.Tensor:
    told = {name: text[name] for name in process.inputs}
    return model(noisy, timestep=steps, **told, return_dict=False)[0].float()


@torch.no_grad()
def validation_loss(model, process, latents: torch.Tensor, text: Inputs) -> list[float]:
    """Mean squared error at the process's checked timesteps with fixed noise."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    rows = []
    for t in process.checked:
        noisy, steps, target = process.at(latents, noise, torch.full((len(latents),), t))
        rows.append(round((answer(model, process, noisy, steps, text) - target).square().mean().item(), 4))
    return rows


@torch.no_grad()
def preview(folder: Path, path: Path) -> None:
    """Grid of the preview captions, four samples each, w = 1 in the first two columns and 2 in the others."""
    pipeline, rows = load_pipeline(folder), []
    for w in (1.0, 2.0):
        generator = torch.Generator().manual_seed(0)
        prompts = [p for p in PREVIEW for _ in range(2)]
        out = pipeline(
            prompts,
            num_inference_steps=25,
            guidance_scale=w,
            generator=generator,
            height=32,
            width=32,
            output_type="pt",
        )
        rows.append(out.images.view(len(PREVIEW), 2, 3, 32, 32))
    image_grid(torch.cat(rows, 1).flatten(0, 1), 16, 3).save(path)


class Float32Attention(AttnProcessor2_0):
    """diffusers' attention, outside autocast."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        with torch.autocast("cpu", enabled=False):
            text = encoder_hidden_states
            text = text if text is None else text.float()
            return super().__call__(attn, hidden_states.float(), text, *args, **kwargs)


def main() -> None:
    flags = parser(__doc__, batch=128, lr=1.5e-3, minutes=75.0, weight_decay=0.01, ema=0.998, seed=404)
    flags.add_argument("--autoencoder", type=Path, help="folder of stage 1; not with --flow")
    flags.add_argument("--text_encoder", type=Path, help="folder of stage 2; not with --flow")
    flags.add_argument("--flow", type=Path, help="train the flow transformer on this assembled teacher's parts")
    flags.add_argument("--channels", type=int, nargs=3, default=(64, 112, 144))
    flags.add_argument("--caption_dropout", type=float, default=0.1)
    flags.add_argument("--snr_gamma", type=float, default=5.0, help="min-SNR weighting; 0 for plain noise loss")
    flags.add_argument(
        "--bf16", action="store_true", help="autocast; attention stays fp32, its CPU backward is slow in bf16"
    )
    flags.add_argument("--snapshot", type=Path, default=None, help="pipeline folder to renew while training")
    flags.add_argument("--snapshot_minutes", type=float, default=10.0)
    settings = flags.parse_args()
    generator = seed_everything(settings.seed, settings.threads)
    settings.output.mkdir(parents=True, exist_ok=True)

    train, held_out = Rows(settings.data, "train"), Rows(settings.data, "validation")
    process = Flow(settings) if settings.flow else Noise(settings)
    autoencoder = settings.flow / "vae" if settings.flow else settings.autoencoder
    latents, factor = encode_latents(autoencoder, train.unit())
    captions = Captions(process.embed, train.captions)
    check = encode_latents(autoencoder, held_out.unit(slice(0, 500)))[0]
    check_text = process.embed(held_out.captions["style"][:500])

    model = process.build(latents.shape[1])
    if settings.bf16 and not settings.flow:
        model.set_attn_processor(Float32Attention())
    model = model.to(memory_format=torch.channels_last).train()
    print(f"{count_parameters(model) / 1e6:.2f} M parameters, scaling factor {factor}", flush=True)
    optimizer = torch.optim.AdamW(split_decay(model, settings.weight_decay), lr=settings.lr, betas=(0.9, 0.99))
    average = EMAModel(model.parameters(), decay=settings.ema, use_ema_warmup=True, power=0.75)
    progress, batches = Progress(settings.minutes, settings.steps), epochs(len(train), settings.batch, generator)
    signal.signal(signal.SIGTERM, lambda *_: setattr(progress, "stopped", True))
    history, running, due = [], 0.0, 2.0 * 60

    def snapshot() -> None:
        average.store(model.parameters())
        average.copy_to(model.parameters())
        model.eval()
        error = validation_loss(model, process, check, check_text)
        history.append(
            {"step": progress.step, "seconds": round(progress.elapsed), "validation": error, "train": running}
        )
        print(history[-1], flush=True)
        model.save_pretrained(settings.output)
        if settings.snapshot:
            process.assemble(model, settings.snapshot)
            preview(settings.snapshot, settings.output / f"preview_{round(progress.elapsed / 60):03d}.png")
        average.restore(model.parameters())
        model.train()

    while not progress.done:
        index = next(batches)
        clean, text = latents[index], captions.draw(index, settings.caption_dropout, generator)
        noisy, steps, target, weight = process.pairs(clean, text, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
            prediction = answer(model, process, noisy.contiguous(memory_format=torch.channels_last), steps, text)
        loss = ((prediction - target).square().mean(dim=(1, 2, 3)) * weight).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        progress.advance(optimizer, settings.lr)
        optimizer.step()
        average.step(model.parameters())
        running = loss.item() if not running else 0.99 * running + 0.01 * loss.item()
        if progress.step % 100 == 0:
            print(f"{progress.elapsed:.0f} s, step {progress.step}, loss {running:.4f}", flush=True)
        if progress.elapsed > due:
            snapshot()
            due = progress.elapsed + 60 * settings.snapshot_minutes

    snapshot()
    average.copy_to(model.parameters())
    model.eval().half().save_pretrained(settings.output)
    write_record(
        settings.output,
        settings,
        stage=process.stage,
        parameters=count_parameters(model),
        steps=progress.step,
        epochs=round(progress.step * settings.batch / len(train), 1),
        seconds=round(progress.elapsed),
        scaling_factor=factor,
        history=history,
    )


if __name__ == "__main__":
    main()
