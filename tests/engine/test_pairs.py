"""Pairs of noise and sample: what is written, that it is the teacher's sample, resuming, and what is refused."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from fastdiff.cli import main
from fastdiff.data import CacheMismatchError, ImageTransform, UnsuitableDataError, open_training_data
from fastdiff.data.cache import CacheError, CacheReader
from fastdiff.diffusion import Prediction, solve, teacher_times
from fastdiff.engine import Settings, pairs
from fastdiff.engine.batches import Batches
from fastdiff.engine.pairs import PairSettings, build_pairs
from fastdiff.models.analytic import AnalyticTeacher
from fastdiff.models.teacher import Teacher

TEACHER = AnalyticTeacher.gaussian(torch.tensor([1.3, -0.4]), torch.tensor([[0.49, 0.1], [0.1, 0.3]]))
SETTINGS = PairSettings(num_inference_steps=4, guidance_scale=1.0, solver="ddim", seed=7)


def make(folder, settings=SETTINGS, count=10, **changes):
    arguments = {"resolution": 1, "batch_size": 3, "shard_size": 4} | changes
    teacher = arguments.pop("teacher", TEACHER)
    prompts = arguments.pop("prompts", ["a sample"])
    return build_pairs(folder, teacher, prompts, settings, count, **arguments)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stored(folder) -> tuple[torch.Tensor, torch.Tensor]:
    reader = CacheReader(folder)
    rows = [reader[index].tensors for index in range(len(reader))]
    return tuple(torch.stack([row[name] for row in rows]) for name in ("noise", "latents"))


def test_a_pair_is_noise_and_the_teachers_solution_from_it(tmp_path):
    assert make(tmp_path) == 10
    noise, latents = stored(tmp_path)

    def exact(x, t):
        return Prediction.from_x0(TEACHER.law.denoise(x, t, TEACHER.schedule), x, t, TEACHER.schedule)

    expected = solve(exact, noise, teacher_times(TEACHER.schedule, 4))
    torch.testing.assert_close(latents, expected, rtol=0, atol=2e-5)
    assert noise.std().item() == pytest.approx(1, abs=0.3) and len(set(noise.flatten().tolist())) == 20


def test_a_killed_run_goes_on_and_leaves_the_same_files(tmp_path, monkeypatch):
    make(tmp_path / "straight")

    def dies(maker, positions, embeddings, original=pairs._Maker.make):
        if positions[0] >= 7:
            raise KeyboardInterrupt
        return original(maker, positions, embeddings)

    with monkeypatch.context() as patch:
        patch.setattr(pairs._Maker, "make", dies)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "killed")
    with pytest.raises(CacheError, match=r"interrupted after 4 records.*`fastdiff pairs`"):
        open_training_data(tmp_path / "killed", "pairs")
    assert make(tmp_path / "killed") == 10
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")
    make(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "straight")


def test_noise_depends_on_the_seed_and_not_on_the_batches(tmp_path):
    make(tmp_path / "a"), make(tmp_path / "b", batch_size=4)
    make(tmp_path / "c", PairSettings(num_inference_steps=4, guidance_scale=1.0, solver="ddim", seed=8))
    (a, _), (b, _), (c, _) = (stored(tmp_path / name) for name in "abc")
    assert torch.equal(a, b) and not torch.isclose(a, c).any()


def test_more_pairs_can_be_added_later(tmp_path):
    make(tmp_path / "all", count=8)
    make(tmp_path / "grown", count=4)
    assert make(tmp_path / "grown", count=8) == 8
    assert contents(tmp_path / "grown") == contents(tmp_path / "all")


@pytest.mark.parametrize("change", [{"num_inference_steps": 5}, {"seed": 8}, {"guidance_scale": 2.0}])
def test_a_folder_of_other_settings_is_refused(tmp_path, change):
    make(tmp_path)
    with pytest.raises(CacheMismatchError, match=next(iter(change))):
        make(
            tmp_path,
            PairSettings(**{"num_inference_steps": 4, "guidance_scale": 1.0, "solver": "ddim", "seed": 7} | change),
        )


def test_other_prompts_teachers_and_strange_folders_are_refused(tmp_path):
    make(tmp_path / "pairs")
    with pytest.raises(CacheMismatchError, match="prompts"):
        make(tmp_path / "pairs", prompts=["a sample", "a sample"])
    other = AnalyticTeacher.gaussian(torch.tensor([0.0, 0.0]), torch.eye(2))
    with pytest.raises(CacheMismatchError, match="teacher"):
        make(tmp_path / "pairs", teacher=other)
    with pytest.raises(CacheMismatchError, match="gaussian"):
        open_training_data(tmp_path / "pairs", "pairs", teacher=other.identity()["fingerprint"])
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "notes.txt").write_text("a red apple\n")
    with pytest.raises(CacheError, match=r"notes\.txt"):
        make(tmp_path / "strange")
    with pytest.raises(UnsuitableDataError, match="`fastdiff pairs`"):
        open_training_data(tmp_path / "strange", "pairs")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"real_share": 1.5}, "real_share"),
    ],
)
def test_bad_settings_are_named(change, named):
    with pytest.raises(ValueError, match=named):
        PairSettings(**change)


def test_batches_hold_pairs_whatever_the_type_they_are_stored_in(tmp_path, tiny_sd):
    teacher = Teacher(tiny_sd, "tiny")
    prompts = ["a red apple", "a dog"]
    for name, changes in {"whole": {}, "half": {"dtype": torch.float16, "embeddings": False}}.items():
        folder = tmp_path / name
        make(folder, count=3, teacher=teacher, prompts=prompts, resolution=32, **changes)
        data = open_training_data(folder, "pairs", teacher=teacher.identity()["fingerprint"])
        settings = Settings(train_batch_size=3, resolution=32)
        (batch,) = next(Batches(data, teacher, settings, torch.device("cpu"), 0, 1).steps(0))
        noise, latents = batch.pairs()
        assert noise.shape == latents.shape == (3, 4, 16, 16) and noise.dtype == latents.dtype == torch.float32
        assert sorted(batch.prompts) == ["a dog", "a red apple", "a red apple"]
        expected = teacher.encode(list(batch.prompts), 32).tensors["prompt_embeds"]
        torch.testing.assert_close(batch.cond.tensors["prompt_embeds"], expected, rtol=0, atol=1e-5)
    sizes = {name: (tmp_path / name / "shard-00000.safetensors").stat().st_size for name in ("whole", "half")}
    assert sizes["half"] < sizes["whole"] / 2
    assert not (tmp_path / "half" / "null.safetensors").exists()


@pytest.mark.parametrize("solver", ["ddim", "dpm++"])
def test_stock_pipelines_make_the_same_sample(tmp_path, tiny_sd, solver):
    """The stored sample is what the stock pipeline gives for the stored noise, guidance included."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    settings = PairSettings(num_inference_steps=4, guidance_scale=3.0, solver=solver)
    make(tmp_path, settings, 2, teacher=Teacher(tiny_sd, "tiny"), prompts=["a dog", "blue cat"], resolution=32)
    noise, latents = stored(tmp_path)
    config = tiny_sd.scheduler.config
    extra = {"timestep_spacing": "trailing", "steps_offset": 1}
    tiny_sd.scheduler = (
        DDIMScheduler.from_config(config, **extra, set_alpha_to_one=True, clip_sample=False)
        if solver == "ddim"
        else DPMSolverMultistepScheduler.from_config(config, **extra)
    )
    stock = tiny_sd(
        ["a dog", "blue cat"], latents=noise, num_inference_steps=4, guidance_scale=3.0, output_type="latent"
    ).images
    torch.testing.assert_close(latents, stock, rtol=1e-4, atol=2e-4 * stock.abs().max().item())


def test_real_images_are_mixed_in_with_the_noise_they_come_from(tmp_path):
    """One pixel of three colours is a sample of a closed-form teacher: the solver takes the noise back to it."""
    folder = tmp_path / "images"
    folder.mkdir()
    colours = {"a": (230, 90, 160), "b": (20, 140, 60)}
    for name, colour in colours.items():
        Image.new("RGB", (1, 1), colour).save(folder / f"{name}.png")
    lines = [f'{{"file_name": "{name}.png", "text": "a sample"}}' for name in colours]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    images = open_training_data(folder, "images", transform=ImageTransform(1, center_crop=True))
    teacher = AnalyticTeacher.gaussian(torch.tensor([0.2, 0.0, 0.1]), torch.diag(torch.tensor([0.3, 0.2, 0.4])))
    settings = PairSettings(num_inference_steps=20, guidance_scale=1.0, solver="ddim", real_share=0.5)
    make(tmp_path / "pairs", settings, 4, teacher=teacher, images=images)
    noise, latents = stored(tmp_path / "pairs")
    expected = torch.tensor([colours["a"], colours["b"]]) / 127.5 - 1
    torch.testing.assert_close(latents[[1, 3], :, 0, 0], expected, rtol=0, atol=1e-6)

    def exact(x, t):
        return Prediction.from_x0(teacher.law.denoise(x, t, teacher.schedule), x, t, teacher.schedule)

    back = solve(exact, noise, teacher_times(teacher.schedule, 20))
    torch.testing.assert_close(back, latents, rtol=0, atol=2e-3)
    with pytest.raises(ValueError, match="real_images"):
        make(tmp_path / "other", settings, 4)


def test_command_line(tmp_path, tiny_sd_folder, capsys):
    (tmp_path / "prompts.txt").write_text("a red apple\na dog\n")
    command = ["pairs", "--teacher", str(tiny_sd_folder), "--prompts", str(tmp_path / "prompts.txt")]
    command += ["--num_inference_steps", "2", "--count", "3", "--output"]
    assert main([*command, str(tmp_path / "pairs")]) == 0
    assert "3 pairs" in capsys.readouterr().out
    assert len(open_training_data(tmp_path / "pairs", "pairs")) == 3
    for wrong, named in (
        (["--count", "0"], "--count"),
        (["--real_share", "0.5"], "--real_images"),
        (["--solvr", "x"], "--solver"),
    ):
        assert main([*command, str(tmp_path / "no"), *wrong]) == 2
        assert named in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
