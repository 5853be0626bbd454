"""Bad input: exit code 2, one line that names the thing, and nothing half-written."""

import io
import json
import shutil
import tarfile

import pytest
from cli_helpers import SHORT
from PIL import Image

from fastdiff.cli import main


@pytest.fixture
def refuses(fails, tiny_sd_folder, prompts_file, tmp_path):
    """refuses(word, flags...) runs `distill` and wants the word in the message, and no run folder."""

    def run(words, *flags, teacher=tiny_sd_folder, data=prompts_file):
        output = tmp_path / "run"
        message = fails("distill", "--teacher", teacher, "--data", data, "--output_dir", output, *SHORT, *flags)
        for word in [words] if isinstance(words, str) else words:
            assert word in message
        assert not output.exists()
        return message

    return run


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ("Did you mean 'learning_rate'", ["--learing_rate", "1"]),
        ("Did you mean 'dmd2'", ["--method", "dmdd2"]),
        (["huber_c", "belongs to method ", "lcm"], ["--huber_c", "1"]),
        (["scale_lr", "multiply --learning_rate"], ["--scale_lr"]),
        (["learning_rate", "positive"], ["--learning_rate", "-1"]),
        (["learning_rate", "finite"], ["--learning_rate", "nan"]),
        (["guidance_scale", "at least 0"], ["--guidance_scale", "-2"]),
        (["student_update_every", "positive"], ["--student_update_every", "0"]),
        (["lora_alpha", "positive"], ["--lora_alpha", "-4"]),
        (["fake_score_learning_rate", "positive"], ["--fake_score_learning_rate", "-4"]),
        (["checkpoints_total_limit", "positive"], ["--checkpoints_total_limit", "-1"]),
        (["resolution", "multiple of 2"], ["--resolution", "33"]),
        (["timesteps", "fall strictly"], ["--timesteps", "249", "999"]),
        (["lr_scheduler", "nope", "cosine"], ["--lr_scheduler", "nope"]),
        (["report_to", "nope"], ["--report_to", "nope"]),
        (["target modules", "nope"], ["--lora_target_modules", "nope"]),
        (["init_from", "nothing/here"], ["--init_from", "nothing/here"]),
        (["needs images", "prompts only"], ["--gan_weight", "1"]),
        (["mixed_precision", "bf16"], ["--cast_teacher_unet"]),
        ("stray", ["stray"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("-") else "",
)
def test_flags(refuses, words, flags):
    refuses(words, *flags)


def test_nothing_given(fails, tiny_sd_folder):
    assert "--teacher" in fails("distill", "--data", "x")
    assert "--data" in fails("distill", "--teacher", tiny_sd_folder)


def test_unknown_yaml_key(fails, tmp_path):
    (tmp_path / "r.yaml").write_text("gan_wieght: 1\n")
    assert "r.yaml" in (message := fails("distill", "--config", tmp_path / "r.yaml"))
    assert "Did you mean 'gan_weight'" in message


def test_missing_yaml(fails, tmp_path):
    assert "no recipe at" in fails("distill", "--config", tmp_path / "none.yaml")


def test_wrong_teacher_path(refuses, tmp_path):
    refuses(["does not exist", "folder"], teacher=tmp_path / "none" / "pipeline")


def test_folder_that_is_no_pipeline(refuses, tiny_sd_folder):
    refuses("model_index.json", teacher=tiny_sd_folder / "unet")


def test_unsupported_pipeline_class(refuses, tiny_sd_folder, tmp_path):
    folder = shutil.copytree(tiny_sd_folder, tmp_path / "teacher")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionImg2ImgPipeline"}))
    refuses(["StableDiffusionImg2ImgPipeline", "StableDiffusionPipeline"], teacher=folder)


def test_pickled_weights(refuses, tiny_sd_folder, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"x")
    refuses("pickled weights", teacher=tmp_path / "model.ckpt")
    folder = shutil.copytree(tiny_sd_folder, tmp_path / "teacher")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    refuses("pickled weights", teacher=folder)


@pytest.mark.parametrize(
    ("content", "word"), [(b"", "no prompt"), (b"\n  \n", "no prompt"), (b"\xff\xfe\x00\x9f", "UTF-8")]
)
def test_prompt_files(refuses, tmp_path, content, word):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    refuses([word, "prompts.txt"], data=path)


def test_missing_data(refuses, tmp_path):
    refuses("none.txt", data=tmp_path / "none.txt")


def test_corrupt_images(refuses, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n')
    (folder / "a.png").write_bytes(b"\x89PNG broken")
    refuses("a.png", "--method", "lcm", data=folder)


def test_corrupt_shard(refuses, tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    refuses("a.tar", "--method", "lcm", data=tmp_path / "a.tar")


def test_tar_member_that_climbs_out(refuses, tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (32, 32)).save(picture, "PNG")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("../../evil.png", picture.getvalue()), ("../../evil.txt", b"evil")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    refuses("evil", "--method", "lcm", data=tmp_path / "a.tar")
    assert not (tmp_path.parent / "evil.png").exists()


def test_output_that_cannot_be_written(fails, tiny_sd_folder, prompts_file, tmp_path):
    (tmp_path / "file").write_text("")
    message = fails(
        *("distill", "--teacher", tiny_sd_folder, "--data", prompts_file, "--output_dir", tmp_path / "file" / "run")
    )
    assert "cannot be written" in message
    assert "--output_dir" in message


def test_full_disk(fails, tiny_sd_folder, prompts_file, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    from fastdiff.engine import checkpoints

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoints, "save_file", full)
    run = tmp_path / "run"
    message = fails("distill", "--teacher", tiny_sd_folder, "--data", prompts_file, "--output_dir", run, *SHORT)
    assert "No space left" in message
    assert list((run / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["distil"], "Did you mean 'distill'"),
        (["sample", "nowhere", "--prompt", "x"], "no folder nowhere"),
        (["evaluate", "nowhere"], "no folder nowhere"),
        (["evaluate", "nowhere", "--protokol", "x"], "Did you mean '--protocol'"),
        (["export", "nowhere", "--output", "out"], "neither a run folder nor a checkpoint"),
        (["cache", "--data", "x", "--output", "out", "--encode_batch_size", "0"], "encode_batch_size"),
        (["data", "emoji", "--packages", "nowhere", "--output", "out"], "@iconify-json"),
        (["data", "faces", "--packages", "x", "--output", "out"], "emoji"),
        (["methods", "--yaml"], "--yaml"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_other_verbs(fails, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in fails(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_that_is_no_student_needs_steps(fails, tiny_sd_folder):
    assert "--num_inference_steps" in fails("sample", tiny_sd_folder, "--prompt", "x")


def test_traceback_on_demand(monkeypatch):
    monkeypatch.setenv("FASTDIFF_DEBUG", "1")
    with pytest.raises(ValueError, match="learing_rate"):
        main(["distill", "--learing_rate", "1"])
