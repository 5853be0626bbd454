"""Exports of a finished run with another decoder."""

import json
import shutil

import pytest
import torch

from fastdiff.cli import main


def tiny_autoencoder(folder, levels=2, **config):
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    shape = {f"{side}_block_out_channels": (8,) * levels for side in ("encoder", "decoder")}
    shape |= {f"num_{side}_blocks": (1,) * levels for side in ("encoder", "decoder")}
    AutoencoderTiny(**shape, latent_channels=4, **config).save_pretrained(folder)
    return folder


def test_a_tiny_decoder_takes_the_autoencoders_place(lora_run, tmp_path):
    from diffusers import DiffusionPipeline

    tiny, output = tiny_autoencoder(tmp_path / "tiny"), tmp_path / "out"
    assert main(["export", str(lora_run), "--output", str(output), "--tiny_decoder", str(tiny)]) == 0
    load_back = json.loads((output / "fastdiff.json").read_text())["load_back"]
    assert load_back["checks"][0]["name"] == "pipeline" and load_back["checks"][0]["sample_error"] < 1e-5
    pipeline, plain = (DiffusionPipeline.from_pretrained(folder) for folder in (output, lora_run / "student"))
    assert type(pipeline.vae).__name__ == "AutoencoderTiny" and type(plain.vae).__name__ == "AutoencoderKL"
    latents, pictures = [], []
    for one in (pipeline, plain):
        one.set_progress_bar_config(disable=True)
        for kind, into in (("latent", latents), ("pt", pictures)):
            generator = torch.Generator().manual_seed(1)
            into.append(one("a dog", num_inference_steps=1, generator=generator, output_type=kind).images)
    torch.testing.assert_close(*latents, rtol=0, atol=1e-5)
    assert pictures[0].shape == pictures[1].shape
    own = type(pipeline.vae).from_pretrained(tiny)
    with torch.no_grad():
        expected = own.decode(latents[0] / (own.config.scaling_factor or 1)).sample
    torch.testing.assert_close(pictures[0], (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "more", "message"),
    [
        (lambda folder: folder.mkdir(), (), "is not a folder of an AutoencoderTiny"),
        (lambda folder: tiny_autoencoder(folder, levels=3), (), "with factor 4, this teacher's have 2"),
        (tiny_autoencoder, ("--format", "lora"), "LoRA files have none"),
    ],
)
def test_decoders_that_do_not_fit_are_refused(lora_run, fails, tmp_path, make, more, message):
    make(tmp_path / "tiny")
    error = fails("export", lora_run, "--output", tmp_path / "out", "--tiny_decoder", tmp_path / "tiny", *more)
    assert message in error and not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "tiny")
