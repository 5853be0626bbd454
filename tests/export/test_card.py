"""The card: complete, parsed by the Hub's own reader, its snippets run, its licence that of the teacher."""

import json
import re

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

from fastdiff.export.card import License, teacher_license, write_card
from fastdiff.export.lora import save_lora
from fastdiff.export.pipeline import save_pipeline
from fastdiff.export.student import StudentRecord, read_record, write_record
from fastdiff.models.sampler import SamplerSpec

RAIL = License("creativeml-openrail-m")
METRICS = {
    "protocol": "emoji-2k/tower-v1",
    "rows": [
        {"name": "teacher", "steps": 50, "network_calls": 100, "guidance_scale": 3.0, "fid": 11.5},
        {
            "name": "student",
            "steps": 2,
            "network_calls": 2,
            "fid": 12.25,
            "clip": 0.31,
            "interval": {"fid": [12.0, 12.5]},
        },
    ],
}


def record(**changes):
    values = {
        "method": "dmd2",
        "kind": "lora",
        "teacher": {"source": "someone/teacher", "revision": "abc123", "fingerprint": "00ff"},
        "sampler": SamplerSpec.trailing("lcm", 2),
        "recipe": {"method": "dmd2", "steps": 10},
        "metrics": METRICS,
    }
    return StudentRecord(**(values | changes))


def card_of(folder, **options):
    settings = {"record": record(), "pipeline_class": "StableDiffusionPipeline", "license": RAIL} | options
    return ModelCard.load(write_card(folder, **settings))


def test_metadata(tmp_path):
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    (tmp_path / "grid.png").touch()
    data = card_of(tmp_path, repo_id="me/fast", datasets=["me/data"]).data
    assert (data.license, data.base_model, data.base_model_relation) == (RAIL.identifier, "someone/teacher", "adapter")
    assert (data.library_name, data.pipeline_tag, data.datasets) == ("diffusers", "text-to-image", ["me/data"])
    assert {"stable-diffusion", "lora", "template:sd-lora", "dmd2"} <= set(data.tags)
    results = {result.metric_type: result for result in data.eval_results}
    assert results["fid"].metric_value == 12.25
    assert "emoji-2k/tower-v1" in results["fid"].metric_name
    assert set(results) == {"fid", "clip"}


def test_text_has_facts_and_no_gaps(tmp_path):
    for name in ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors", "grid.png"):
        (tmp_path / name).touch()
    text = card_of(tmp_path).text
    for fact in ("2 steps", "abc123", "![Samples](grid.png)", "| lcm | sgm_uniform |", "12.25 [12, 12.5]", "999, 499"):
        assert fact in text
    assert not re.search(r"TODO|None|more information needed|\[\s*\]", text, re.IGNORECASE)
    assert not re.search(r"\bFID\b", text)


def test_full_student_is_a_finetune_and_a_local_teacher_is_no_base_model(tmp_path):
    (tmp_path / "model_index.json").write_text("{}", encoding="utf-8")
    data = card_of(tmp_path, record=record(kind="full")).data
    assert data.base_model_relation == "finetune"
    data = card_of(tmp_path, record=record(teacher={"source": str(tmp_path)})).data
    assert data.base_model is None
    assert "base_model_relation" not in data.to_dict()
    assert str(tmp_path.parent) not in (tmp_path / "README.md").read_text()


def test_unscaled_start_is_said_in_the_comfyui_section(tmp_path):
    (tmp_path / "pytorch_lora_weights_kohya.safetensors").touch()
    text = card_of(tmp_path, record=record(sampler=SamplerSpec("lcm", (399,)))).text
    assert "use diffusers" in text and "sgm_uniform" not in text


def test_licence_is_inherited(tmp_path, tiny_sd_folder, monkeypatch):
    assert teacher_license(tiny_sd_folder) is None
    assert teacher_license("nobody/no-such-teacher") is None
    monkeypatch.setattr("fastdiff.export.card.SHIPPED", {"embedded": tmp_path / "teacher"})
    assert teacher_license("embedded") is None
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: own\nlicense_link: https://x.y/l\n---\n\nHi\n"
    )
    found = teacher_license(tmp_path)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "README.md").write_text("---\nlicense: other\n---\n\nHi\n")
    assert teacher_license(tmp_path / "half") is None  # without a name and a link it says nothing
    assert found == License("other", "own", "https://x.y/l")
    (tmp_path / "teacher").mkdir()
    (tmp_path / "README.md").rename(tmp_path / "teacher" / "README.md")
    assert teacher_license("embedded") == found
    (tmp_path / "student").mkdir()
    data = card_of(tmp_path / "student", license=found).data
    assert (data.license, data.license_name, data.license_link) == ("other", "own", "https://x.y/l")
    with pytest.raises(ValueError, match="license_name and license_link"):
        License("other")


def test_card_without_licence_is_still_written(tmp_path):
    assert card_of(tmp_path, license=None).data.license is None


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        card_of(tmp_path / "nowhere")


def test_snippets_run(trained_sd, tiny_sd_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(DiffusionPipeline, "to", lambda self, *args, **kwargs: self)
    folder = save_pipeline(trained_sd.student, tmp_path / "student")
    save_lora(folder, trained_sd.student.network, {"student": 1.0})
    known = record(sampler=trained_sd.sampler, teacher={"source": str(tiny_sd_folder)})
    text = card_of(folder, record=known, repo_id=str(folder), prompt='a "b" c').text
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 2
    images = []
    for snippet in snippets:
        torch.manual_seed(0)
        scope: dict = {}
        snippet = snippet.replace("torch.bfloat16", "torch.float32").replace("path/to/sd", str(tiny_sd_folder))
        exec(snippet, scope)
        images.append(scope["image"])
    assert images[0].size == (32, 32)
    difference = max(abs(a - b) for a, b in zip(images[0].tobytes(), images[1].tobytes()))
    assert difference <= 1  # merged and separate weights give one picture, up to rounding to bytes


def test_record_round_trip(tmp_path):
    written = record(load_back={"ok": True})
    path = write_record(tmp_path, written)
    assert read_record(tmp_path) == written
    assert json.loads(path.read_text())["versions"]["diffusers"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["fastdiff.json"]


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 99}', '{"format": 1, "sampler": {"kind": "lcm"}}'])
def test_damaged_records_are_refused(tmp_path, content):
    (tmp_path / "fastdiff.json").write_text(content)
    with pytest.raises(ValueError, match=r"fastdiff\.json cannot be read"):
        read_record(tmp_path)


def test_missing_record_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a student folder"):
        read_record(tmp_path)


def test_a_pipeline_without_a_text_encoder_is_loaded_as_diffusers_wants(tmp_path):
    parts = {"_class_name": "StableDiffusion3Pipeline", "text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(parts), encoding="utf-8")
    text = card_of(tmp_path, record=record(kind="full"), repo_id="me/fast").text
    assert "torch_dtype=torch.bfloat16, text_encoder_3=None, tokenizer_3=None)" in text
