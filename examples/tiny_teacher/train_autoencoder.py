"""Stage 1: AutoencoderTiny, 32 x 32 pixels <-> 8 x 8 latents of 8 channels near zero mean and unit variance.

    python train_autoencoder.py --data emoji.parquet --output runs/autoencoder --minutes 35

Reconstruction is L1 + MSE + gradient loss. The decoder sees slightly noisy latents, which makes it smooth; a soft
penalty pulls every latent channel to zero mean and unit deviation, which lets the diffusion model use them unscaled.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import (
    Progress,
    Rows,
    count_parameters,
    epochs,
    image_grid,
    parser,
    psnr,
    seed_everything,
    split_decay,
    write_record,
)
from diffusers import AutoencoderTiny
from diffusers.training_utils import EMAModel


def build(width: int, latent_channels: int) -> AutoencoderTiny:
    """Blocks sit mostly at 16 x 16 and 8 x 8, where they are cheap; only the decoder has one at full resolution."""
    return AutoencoderTiny(
        encoder_block_out_channels=(width,) * 3,
        decoder_block_out_channels=(width,) * 3,
        num_encoder_blocks=(0, 2, 4),
        num_decoder_blocks=(4, 2, 1),
        latent_channels=latent_channels,
        scaling_factor=1.0,
        force_upcast=False,
    )


def gradient_loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """L1 between horizontal and vertical differences of two batches (B, C, H, W)."""
    return F.l1_loss(x.diff(dim=-1), y.diff(dim=-1)) + F.l1_loss(x.diff(dim=-2), y.diff(dim=-2))


def losses(model: AutoencoderTiny, images: torch.Tensor, settings) -> tuple[torch.Tensor, dict]:
    """Total loss and its terms for images in [-1, 1]."""
    latents = model.encoder(images)
    decoded = model.decoder(latents + settings.latent_noise * torch.randn_like(latents))
    deviation, mean = torch.std_mean(latents, dim=(0, 2, 3))
    moments = (deviation - 1).square().mean() + mean.square().mean()
    terms = {
        "l1": F.l1_loss(decoded, images),
        "mse": F.mse_loss(decoded, images),
        "grad": gradient_loss(decoded, images),
    }
    total = settings.l1 * terms["l1"] + settings.mse * terms["mse"] + settings.grad * terms["grad"]
    return total + settings.moments * moments, terms


@torch.no_grad()
def reconstruct(model: AutoencoderTiny, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reconstructions in [0, 1] of images in [0, 1], and their latents."""
    latents = torch.cat([model.encoder(chunk * 2 - 1) for chunk in images.split(250)])
    decoded = torch.cat([model.decoder(chunk) for chunk in latents.split(250)])
    return (decoded / 2 + 0.5).clamp(0, 1), latents


def evaluate(model: AutoencoderTiny, images: torch.Tensor) -> dict:
    """Held-out numbers; ``psnr`` is that of the squared error pooled over all images."""
    model.eval()
    decoded, latents = reconstruct(model, images)
    deviation, mean = torch.std_mean(latents, dim=(0, 2, 3))
    sharpness = [sum(x.diff(dim=d).square().mean() for d in (-1, -2)).item() for x in (decoded, images)]
    model.train()
    return {
        "psnr": psnr(F.mse_loss(decoded, images).item()),
        "gradient_energy_ratio": sharpness[0] / sharpness[1],
        "latent_std": [round(v, 3) for v in deviation.tolist()],
        "latent_mean": [round(v, 3) for v in mean.tolist()],
        "latent_abs_max": latents.abs().max().item(),
    }


def main() -> None:
    flags = parser(__doc__, batch=32, lr=1.5e-3, minutes=35.0, weight_decay=1e-4)
    flags.add_argument("--width", type=int, default=48)
    flags.add_argument("--latent_channels", type=int, default=8)
    flags.add_argument("--latent_noise", type=float, default=0.05)
    for name, weight in (("l1", 0.5), ("mse", 2.0), ("grad", 0.25), ("moments", 0.02)):
        flags.add_argument(f"--{name}", type=float, default=weight, help="weight of this term")
    settings = flags.parse_args()
    generator = seed_everything(settings.seed, settings.threads)
    settings.output.mkdir(parents=True, exist_ok=True)

    train, held_out = Rows(settings.data, "train"), Rows(settings.data, "validation").unit()
    model = build(settings.width, settings.latent_channels)
    if settings.init_from:
        model = AutoencoderTiny.from_pretrained(settings.init_from).float()
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(split_decay(model, settings.weight_decay), lr=settings.lr, betas=(0.9, 0.99))
    average = EMAModel(model.parameters(), decay=settings.ema)
    progress, batches, history = (
        Progress(settings.minutes, settings.steps),
        epochs(len(train), settings.batch, generator),
        [],
    )

    def snapshot() -> dict:
        average.store(model.parameters())
        average.copy_to(model.parameters())
        facts = {"step": progress.step, "seconds": round(progress.elapsed), **evaluate(model, held_out)}
        model.save_pretrained(settings.output)
        average.restore(model.parameters())
        return facts

    while not progress.done:
        images = train.unit(next(batches)).mul_(2).sub_(1).to(memory_format=torch.channels_last)
        loss, terms = losses(model, images, settings)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        progress.advance(optimizer, settings.lr)
        optimizer.step()
        average.step(model.parameters())
        if progress.step % 500 == 0:
            history.append(snapshot())
            fast = {k: round(v.item(), 4) for k, v in terms.items()}
            print(
                history[-1]["seconds"],
                progress.step,
                fast,
                {k: history[-1][k] for k in ("psnr", "latent_std")},
                flush=True,
            )

    final = snapshot()
    average.copy_to(model.parameters())
    model.half().float().save_pretrained(settings.output)
    final["psnr_fp16_weights"] = evaluate(model, held_out)["psnr"]
    print(final, flush=True)
    write_record(
        settings.output,
        settings,
        stage="autoencoder",
        parameters=count_parameters(model),
        metrics=final,
        history=[{k: h[k] for k in ("step", "seconds", "psnr", "gradient_energy_ratio")} for h in history],
    )
    pairs = torch.stack([held_out[:64], reconstruct(model, held_out[:64])[0]], 1).flatten(0, 1)
    image_grid(pairs, 16).save(settings.output / "reconstructions.png")


if __name__ == "__main__":
    main()
