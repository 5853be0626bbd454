"""The single-file pipeline is loaded by diffusers as users load it and takes its defaults from the student."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from fastdiff.export import StudentRecord, save_pipeline, write_record

FILE = Path(__file__).resolve().parents[2] / "pipelines" / "fastdiff_few_step.py"


@pytest.fixture
def folder(trained_sd, tmp_path):
    folder = save_pipeline(trained_sd.student, tmp_path / "student", guidance_free=False)
    write_record(folder, StudentRecord("dmd2", "lora", {}, trained_sd.sampler))
    return folder


@pytest.fixture(autouse=True)
def modules_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def load(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(FILE), trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipeline, **call):
    generator = torch.Generator().manual_seed(0)
    return pipeline("ab", generator=generator, output_type="pt", **call).images


def test_defaults_are_the_trained_ones(folder):
    stock = DiffusionPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    plain, few = run(stock, num_inference_steps=2, guidance_scale=0), load(folder)
    assert type(few).__name__ == "FastdiffFewStepPipeline"
    assert torch.equal(run(few), plain)
    assert torch.equal(run(few, num_inference_steps=1), run(stock, num_inference_steps=1, guidance_scale=0))
    assert torch.equal(run(few, guidance_scale=3.0), run(stock, num_inference_steps=2, guidance_scale=3.0))
    assert torch.equal(run(few, timesteps=[999, 499]), plain)


def test_without_a_record_the_caller_is_told_what_to_pass(folder):
    (folder / "fastdiff.json").unlink()
    with pytest.raises(ValueError, match="num_inference_steps"):
        run(load(folder))


def test_the_file_needs_nothing_of_fastdiff():
    imports = [line for line in FILE.read_text().splitlines() if line.startswith(("import", "from"))]
    assert not any("fastdiff" in line for line in imports)
