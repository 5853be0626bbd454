"""Stages 3 and 4: an open_clip model trained on the emoji, as a measuring tower or as a loss tower.

    python train_tower.py --which measuring --data emoji.parquet --output runs/towers/measuring --minutes 12

The measuring tower scores (features of the Frechet distance, retrieval); nothing may be trained on it. The loss tower
is what methods may train on. They share neither seed nor width nor weights, nor anything with the teacher.

Preprocessing: RGB in [0, 1], 32 x 32, every pixel doubled (nearest) to 64 x 64, then (x - mean) / std per channel.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from common import (
    LEVELS,
    Rows,
    count_parameters,
    open_clip_tokenizer,
    parser,
    retrieval_at_1,
    seed_everything,
    sha256,
    train_contrastive,
    write_bpe,
    write_record,
)
from safetensors.torch import load_file, save_file

SEEDS = {"measuring": 101, "loss": 202}


def read_config(which: str) -> dict:
    return json.loads((Path(__file__).parent / f"tower_{which}.json").read_text())


def build(name: str, config: dict) -> torch.nn.Module:
    """The open_clip model of a config in open_clip's own format (its extra key ``preprocess`` is ours)."""
    model_config = {k: v for k, v in config.items() if k != "preprocess"}
    open_clip.factory._MODEL_CONFIGS[name] = model_config
    return open_clip.create_model(name, pretrained=None, force_image_size=None)


def preprocess(images: torch.Tensor, config: dict) -> torch.Tensor:
    """Images (B, 3, 32, 32) in [0, 1] -> the tower's input (B, 3, 64, 64)."""
    settings = config["preprocess"]
    mean, std = (torch.tensor(settings[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    return torch.nn.functional.interpolate((images - mean) / std, scale_factor=settings["upsample"], mode="nearest")


@torch.no_grad()
def image_features(model, config: dict, images: torch.Tensor) -> torch.Tensor:
    """Unnormalised features (N, D) of images in [0, 1]."""
    model.eval()
    return torch.cat([model.encode_image(preprocess(chunk, config)) for chunk in images.split(250)])


@torch.no_grad()
def text_features(model, tokens: torch.Tensor) -> torch.Tensor:
    model.eval()
    return torch.cat([model.encode_text(chunk) for chunk in tokens.split(250)])


def frechet(first: torch.Tensor, second: torch.Tensor) -> float:
    """Frechet distance between two sets of features (N, D), by torch-fidelity."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(x.double()) for x in (first, second)]
    value = fid_statistics_to_metric(*statistics, verbose=False)
    return float(next(iter(value.values())) if isinstance(value, dict) else value)


def blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    from torchvision.transforms.functional import gaussian_blur

    return gaussian_blur(images, kernel_size=7, sigma=sigma)


def saturate(images: torch.Tensor, factor: float) -> torch.Tensor:
    grey = images.mean(1, keepdim=True)
    return (grey + factor * (images - grey)).clamp(0, 1)


def check(model, config: dict, tokenizer, test: Rows, validation: Rows) -> dict:
    """Retrieval among 1,000 held-out images, and how the Frechet distance answers to known damage.

    Damage is done to one held-out half and compared with the other half, both of 2,000 images.
    """
    features = image_features(model, config, validation.unit())
    texts = text_features(model, tokenizer(validation.captions["style"]))
    generator = torch.Generator().manual_seed(0)
    images, reference = validation.unit(), image_features(model, config, test.unit())
    noise = torch.randn(images.shape, generator=generator)
    rows = {"clean": images}
    rows |= {f"blur_{s}": blur(images, s) for s in (0.5, 1.0, 2.0)}
    rows |= {f"noise_{s}": (images + s * noise).clamp(0, 1) for s in (0.05, 0.1, 0.2)}
    rows |= {f"saturation_{s}": saturate(images, s) for s in (0.75, 0.5, 0.0, 1.25, 1.5)}
    names = sorted(set(validation.captions["concept"]))
    kept = set(names[::2])
    half = torch.tensor([i for i, c in enumerate(validation.captions["concept"]) if c in kept])
    rows["half_of_concepts"] = images[half[torch.arange(len(images)) % len(half)]]
    groups = sorted(set(validation.captions["group"]))[::2]
    half = torch.tensor([i for i, c in enumerate(validation.captions["group"]) if c in groups])
    rows["half_of_groups"] = images[half[torch.arange(len(images)) % len(half)]]
    return {
        "r1_image_to_text_1000": retrieval_at_1(features[:1000], texts[:1000]),
        "r1_text_to_image_1000": retrieval_at_1(texts[:1000], features[:1000]),
        "frechet": {k: round(frechet(image_features(model, config, x), reference), 5) for k, x in rows.items()},
    }


def save_half(model, folder: Path) -> None:
    save_file(
        {k: v.half().contiguous() if v.is_floating_point() else v for k, v in model.state_dict().items()},
        folder / "model.safetensors",
    )


def load_tower(folder: Path):
    """Model (fp32, from fp16 weights), config and tokenizer of a tower's folder."""
    config = json.loads((folder / "open_clip_config.json").read_text())
    model = build(f"tiny_{folder.name}", config)
    state = load_file(folder / "model.safetensors")
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return model.eval(), config, open_clip_tokenizer(folder / "bpe_4096.txt.gz")


def main() -> None:
    flags = parser(__doc__, batch=256, lr=1.5e-3, minutes=12.0, weight_decay=0.1, ema=0.99, seed=None)
    flags.add_argument("--which", choices=SEEDS, required=True)
    flags.add_argument(
        "--levels", type=float, nargs=3, default=(0.08, 0.22, 0.70), help="weights of the caption levels"
    )
    flags.add_argument("--shift", type=int, default=2)
    flags.add_argument("--jitter", type=float, default=0.1)
    settings = flags.parse_args()
    settings.seed = SEEDS[settings.which] if settings.seed is None else settings.seed
    seed_everything(settings.seed, settings.threads)
    settings.output.mkdir(parents=True, exist_ok=True)

    config = read_config(settings.which)
    (settings.output / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer = open_clip_tokenizer(write_bpe(settings.output / "bpe_4096.txt.gz"))
    train = Rows(settings.data, "train")
    tokens = {level: tokenizer(train.captions[level]) for level in LEVELS}
    model = load_tower(settings.init_from)[0] if settings.init_from else build(f"tiny_{settings.which}", config)
    model = model.to(memory_format=torch.channels_last)

    scale = model.logit_scale
    parts = torch.nn.ModuleList([m for m in model.children()])
    loose = torch.nn.ParameterList([p for n, p in model.named_parameters(recurse=False) if n != "logit_scale"])
    average, progress = train_contrastive(
        settings,
        lambda x: model.encode_image(preprocess(x, config), normalize=True),
        lambda ids: model.encode_text(ids, normalize=True),
        torch.nn.ModuleList([parts, loose]),
        scale,
        train,
        tokens,
    )
    average.copy_to([*parts.parameters(), *loose.parameters(), scale])
    save_half(model, settings.output)
    model, config, tokenizer = load_tower(settings.output)
    metrics = check(model, config, tokenizer, Rows(settings.data, "test"), Rows(settings.data, "validation"))
    print(json.dumps(metrics, indent=1), flush=True)
    write_record(
        settings.output,
        settings,
        stage=f"{settings.which} tower",
        parameters=count_parameters(model),
        steps=progress.step,
        seconds=round(progress.elapsed),
        metrics=metrics,
        sha256=sha256(settings.output / "model.safetensors"),
        feature_width=int(np.prod(image_features(model, config, train.unit(slice(0, 2))).shape[1:])),
    )


if __name__ == "__main__":
    main()
