"""Loading teachers, refusing what is none, and recognising one again."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch

from fastdiff.models.roles import AdapterSpec, FullSpec, Roles
from fastdiff.models.teacher import Teacher, fingerprint


def test_a_saved_pipeline_loads(tiny_sd, tiny_sd_folder):
    teacher = Teacher.from_pretrained(tiny_sd_folder)
    assert teacher.default_resolution == 32 and teacher.prediction_type == "epsilon"
    assert teacher.latent_shape(32) == (4, 16, 16) and teacher.latent_shape(64) == (4, 32, 32)
    assert not any(p.requires_grad for p in teacher.network.parameters()) and not teacher.network.training
    for name, tensor in tiny_sd.unet.state_dict().items():
        assert torch.equal(teacher.network.state_dict()[name], tensor)
    assert float(teacher.schedule.alpha(torch.tensor(999.0))) == pytest.approx(0.0682649, abs=1e-6)
    copied = teacher.new_network()
    assert copied is not teacher.network
    with pytest.raises(ValueError, match="multiple of 2"):
        teacher.latent_shape(33)


def test_the_prediction_type_and_schedule_are_the_schedulers(tiny_sd):
    from diffusers import DDIMScheduler

    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    tiny_sd.scheduler = DDIMScheduler.from_config(tiny_sd.scheduler.config, **changes)
    teacher = Teacher(tiny_sd)
    assert teacher.prediction_type == "v_prediction"
    assert float(teacher.schedule.alpha(torch.tensor(999.0))) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "nowhere/at/all", "missing.safetensors"])
def test_missing_paths(name):
    with pytest.raises(FileNotFoundError, match=name):
        Teacher.from_pretrained(name)


def test_a_folder_that_is_no_pipeline(tiny_sd_folder):
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        Teacher.from_pretrained(tiny_sd_folder / "unet")


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "weights.bin", "model.pth"])
def test_pickled_files(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="pickled"):
        Teacher.from_pretrained(tmp_path / name)


def test_a_folder_with_pickled_weights_only(tiny_sd_folder, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_sd_folder, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match="safetensors"):
        Teacher.from_pretrained(folder)


def test_a_teacher_is_loaded_again_as_it_was(tiny_sd, tmp_path):
    folder = tmp_path / "half"
    tiny_sd.save_pretrained(folder, variant="fp16")
    teacher = Teacher.from_pretrained(folder, variant="fp16")
    again = teacher.reloaded()
    assert again.identity() == teacher.identity()
    assert again.identity()["variant"] == "fp16"
    torch.testing.assert_close(again.network.state_dict(), teacher.network.state_dict(), rtol=0, atol=0)


def test_another_autoencoder_is_the_codecs_too(tiny_sd):
    teacher = Teacher(tiny_sd)
    other = copy.deepcopy(tiny_sd.vae)
    teacher.replace_autoencoder(other)
    assert teacher.pipeline.vae is other and teacher.codec.autoencoder is other


def test_an_unsupported_pipeline_class(tiny_sd_folder, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(tiny_sd_folder, folder)
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "StableDiffusionImg2ImgPipeline"}))
    with pytest.raises(ValueError, match=r"StableDiffusionImg2ImgPipeline.*StableDiffusionPipeline"):
        Teacher.from_pretrained(folder)


def test_fingerprint_knows_weights_and_nothing_else(tiny_sd, tiny_sd_folder, tmp_path):
    first = fingerprint(tiny_sd.unet)
    for dtype in (torch.bfloat16, torch.float16):
        assert fingerprint(copy.deepcopy(tiny_sd.unet).to(dtype)) == first
    changed = copy.deepcopy(tiny_sd.unet)
    with torch.no_grad():
        changed.mid_block.resnets[0].conv1.weight.neg_()
    assert fingerprint(changed) != first

    folder = tmp_path / "elsewhere"
    shutil.copytree(tiny_sd_folder, folder)
    here, there = (Teacher.from_pretrained(place).identity()["fingerprint"] for place in (tiny_sd_folder, folder))
    assert here == there == first

    Roles(tiny_sd.unet, {"student": AdapterSpec(4, 4.0, ("to_q", "conv1")), "fake_score": FullSpec()})
    assert fingerprint(tiny_sd.unet) == first


def test_fingerprint_sees_light_fine_tuning(tiny_sd):
    tuned = copy.deepcopy(tiny_sd.unet)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.02 * parameter.std().nan_to_num() * torch.randn(parameter.shape, generator=generator)
    assert fingerprint(tuned) != fingerprint(tiny_sd.unet)
