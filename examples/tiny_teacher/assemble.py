"""Put autoencoder, text encoder and UNet together as a StableDiffusionPipeline folder in fp16 safetensors.

python assemble.py --autoencoder runs/autoencoder --text_encoder runs/text --unet runs/unet --output teacher
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from common import replace_folder
from diffusers import AutoencoderTiny, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}


def assemble(autoencoder: Path, text_encoder: Path, unet: Path | UNet2DConditionModel, output: Path) -> None:
    """Write the pipeline aside, then move it into place. ``unet`` is a folder or a model to copy from."""
    vae = AutoencoderTiny.from_pretrained(autoencoder)
    vae.register_to_config(scaling_factor=json.loads((autoencoder / "latents.json").read_text())["scaling_factor"])
    if isinstance(unet, UNet2DConditionModel):
        model = UNet2DConditionModel.from_config(unet.config)
        model.load_state_dict(unet.state_dict())
    else:
        model = UNet2DConditionModel.from_pretrained(unet)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(text_encoder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(text_encoder / "tokenizer"),
        unet=model,
        scheduler=DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    aside = output.with_name(f".{output.name}.new")
    pipeline.to(torch.float16).save_pretrained(aside, safe_serialization=True)
    carry_records({"vae": autoencoder, "text_encoder": text_encoder, "unet": unet}, aside)
    replace_folder(aside, output)


def carry_records(sources: dict[str, Path | UNet2DConditionModel], pipeline: Path) -> None:
    """Copy each stage's ``training.json`` beside its weights in the pipeline, and drop machine paths from configs."""
    for part, source in sources.items():
        if isinstance(source, Path) and (source / "training.json").exists():
            shutil.copyfile(source / "training.json", pipeline / part / "training.json")
        config = json.loads((pipeline / part / "config.json").read_text())
        config.pop("_name_or_path", None)
        (pipeline / part / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for file in pipeline.rglob("*"):
        if file.is_file():
            file.chmod(0o644)


def load_pipeline(folder: Path) -> DiffusionPipeline:
    """The assembled teacher in fp32 without progress bars."""
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    for name in ("autoencoder", "text_encoder", "unet", "output"):
        flags.add_argument(f"--{name}", type=Path, required=True)
    settings = flags.parse_args()
    assemble(settings.autoencoder, settings.text_encoder, settings.unet, settings.output)
    size = sum(f.stat().st_size for f in settings.output.rglob("*") if f.is_file())
    print(f"{settings.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
