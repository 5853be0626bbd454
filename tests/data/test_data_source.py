import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_helpers import CAPTIONS, COLOURS, noisy_png, png, tar_members, write_folder, write_parquet, write_tar
from torch.utils.data import DataLoader

from fastdiff.data import (
    CachedData,
    CacheMeta,
    CacheMismatchError,
    CacheReader,
    CacheWriter,
    DataKind,
    EpochPermutation,
    ImageTextData,
    ImageTransform,
    PromptData,
    StepBatches,
    TooManyRejects,
    UnsuitableDataError,
    Visit,
    open_images,
    open_training_data,
    recognise,
)

CENTRE = ImageTransform(8, center_crop=True)


def _cache(folder, *fields):
    with CacheWriter(folder, CacheMeta("t", 32, "float32"), 3) as writer:
        for i in range(5):
            writer.add({name: torch.full((2, 3), float(i)) for name in fields}, CAPTIONS[i])
    return folder


def _loader(data, workers, **settings):
    batches = StepBatches(EpochPermutation(len(data), 1), batch_size=3, first_step=0, last_step=6, **settings)
    return DataLoader(data, batch_sampler=batches, collate_fn=data.collate, num_workers=workers)


def test_prompts():
    data = PromptData(["a", "b", "c"])
    assert (len(data), data[1], data[Visit(2, 5)]) == (3, {"prompt": "b"}, {"prompt": "c"})
    assert data.collate([data[0], data[2]]) == {"prompt": ["a", "c"]}
    with pytest.raises(ValueError, match="no prompts"):
        PromptData([])


def test_images(tmp_path):
    data = ImageTextData(open_images(write_folder(tmp_path / "f")), CENTRE)
    batch = data.collate([data[0], data[2]])
    assert batch["prompt"] == ["red", "blue"]
    assert batch["image"].shape == (2, 3, 8, 8)
    assert batch["image"][:, :, 0, 0].tolist() == [[1, -1, -1], [-1, -1, 1]]
    assert batch["rejected"] == []
    assert len(list(data)) == 5


def test_cached_tensors(tmp_path):
    data = CachedData(CacheReader(_cache(tmp_path / "c", "latents", "prompt_embeds")))
    batch = data.collate([data[4], data[Visit(1, 2)]])
    assert batch["prompt"] == ["cyan", "green"]
    assert batch["latents"].shape == (2, 2, 3)
    assert batch["latents"][:, 0, 0].tolist() == [4, 1]
    assert len(list(data)) == 5


def test_a_broken_image_is_replaced_by_the_next_and_named(tmp_path):
    images = [png(c) for c in COLOURS]
    images[1] = noisy_png()[:200]
    data = ImageTextData(open_images(write_folder(tmp_path / "f", images), max_rejected=0.3), CENTRE)
    assert data[1]["prompt"] == "blue"
    batch = data.collate([data[0], data[1]])
    assert batch["prompt"] == ["red", "blue"]
    for _ in range(3):
        data.rejects.absorb(batch["rejected"])
    assert data.rejects.summary() == "1 of 5 rejected: 1.png (truncated)"
    strict = ImageTextData(open_images(write_folder(tmp_path / "f", images)), CENTRE)
    with pytest.raises(TooManyRejects, match=r"1.png \(truncated\)"):
        strict.rejects.absorb(strict[1]["rejected"])


def test_images_that_are_all_unreadable_stop_the_run_at_its_start(tmp_path):
    source = open_images(write_folder(tmp_path / "f", [b"junk"] * 5))
    with pytest.raises(TooManyRejects, match=r"5 images in a row cannot be read: 0.png \(not an image\)"):
        ImageTextData(source, CENTRE)


def test_random_crops_change_with_the_epoch_and_repeat_exactly(tmp_path):
    source = open_images(write_folder(tmp_path / "f", [noisy_png((40, 20))] * 5))
    transform = ImageTransform(8, random_flip=True)
    one, two = ImageTextData(source, transform, seed=1), ImageTextData(source, transform, seed=1)
    assert torch.equal(one[Visit(2, 3)]["image"], two[Visit(2, 3)]["image"])
    crops = {tuple(one[Visit(2, epoch)]["image"].flatten().tolist()) for epoch in range(8)}
    assert len(crops) > 4
    assert not torch.equal(one[Visit(2, 0)]["image"], ImageTextData(source, transform, seed=2)[Visit(2, 0)]["image"])


@pytest.mark.parametrize("kind", ["tar", "parquet", "cache"])
def test_worker_processes_give_what_the_main_process_gives(tmp_path, kind):
    path = {
        "tar": lambda: write_tar(tmp_path / "a.tar", tar_members()),
        "parquet": lambda: write_parquet(tmp_path / "a.parquet"),
        "cache": lambda: _cache(tmp_path / "c", "latents"),
    }[kind]()
    data = open_training_data(path, "images", transform=ImageTransform(6, random_flip=True))
    data[0]  # handles of this process must not travel
    name = "latents" if kind == "cache" else "image"
    alone, shared = list(_loader(data, 0)), list(_loader(data, 2))
    assert len(alone) == len(shared) == 6
    for a, b in zip(alone, shared):
        assert a["prompt"] == b["prompt"]
        assert torch.equal(a[name], b[name])


def test_paths_are_recognised_by_what_lies_there(tmp_path):
    (tmp_path / "p.txt").write_text("a\n")
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/p.jsonl").write_text('{"prompt": "a"}\n')
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "p.parquet")
    (tmp_path / "shards").mkdir()
    write_parquet(tmp_path / "i.parquet")
    expected = {
        tmp_path / "p.txt": DataKind.PROMPTS,
        tmp_path / "prompts": DataKind.PROMPTS,
        tmp_path / "p.parquet": DataKind.PROMPTS,
        tmp_path / "i.parquet": DataKind.PARQUET_IMAGES,
        write_folder(tmp_path / "f"): DataKind.IMAGE_FOLDER,
        write_tar(tmp_path / "shards/a.tar", tar_members()): DataKind.SHARDS,
        tmp_path / "shards": DataKind.SHARDS,
        f"{tmp_path}/shards/{{a,b}}.tar": DataKind.SHARDS,
        _cache(tmp_path / "c", "latents"): DataKind.CACHE,
    }
    assert {path: recognise(path) for path in expected} == expected
    (tmp_path / "x.doc").write_text("x")
    (tmp_path / "empty").mkdir()
    for bad in ("x.doc", "empty"):
        with pytest.raises(ValueError, match=f"{bad} is no known data"):
            recognise(tmp_path / bad)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        recognise(tmp_path / "nowhere")


def test_prompts_do_not_serve_a_method_that_needs_images(tmp_path):
    (tmp_path / "p.txt").write_text("a\n")
    with pytest.raises(UnsuitableDataError, match=r"needs images, but .*p.txt holds prompts only: give a folder with"):
        open_training_data(tmp_path / "p.txt", "images", transform=CENTRE)
    with pytest.raises(UnsuitableDataError, match="needs pairs"):
        open_training_data(tmp_path / "p.txt", "pairs")
    assert isinstance(open_training_data(tmp_path / "p.txt", "prompts"), PromptData)


def test_a_cache_must_hold_the_fields_that_are_needed(tmp_path):
    text = _cache(tmp_path / "text", "prompt_embeds")
    latents = _cache(tmp_path / "latents", "latents", "prompt_embeds")
    pairs = _cache(tmp_path / "pairs", "latents", "noise")
    for path, needs, missing in ((text, "images", "latents"), (text, "pairs", "noise"), (latents, "pairs", "noise")):
        with pytest.raises(UnsuitableDataError, match=f"needs {needs}, but the cache .* lacks .*{missing}"):
            open_training_data(path, needs)
    for path, needs in ((text, "prompts"), (latents, "images"), (pairs, "pairs"), (pairs, "images")):
        assert len(open_training_data(path, needs, teacher="t")) == 5
    with pytest.raises(CacheMismatchError):
        open_training_data(latents, "images", teacher="other")


def test_a_cache_of_another_size_is_refused_where_its_tensors_know_it(tmp_path):
    latents = _cache(tmp_path / "latents", "latents", "prompt_embeds")
    sized = _cache(tmp_path / "sized", "prompt_embeds", "time_ids")
    for path, needs in ((latents, "images"), (sized, "prompts")):
        assert len(open_training_data(path, needs, resolution=32)) == 5
        with pytest.raises(CacheMismatchError, match=r"made at 32 px.*--resolution 32.*--resolution 64"):
            open_training_data(path, needs, resolution=64)
    assert len(open_training_data(latents, "prompts", resolution=64)) == 5  # texts have no size


def test_the_captions_of_images_serve_as_prompts_without_decoding(tmp_path):
    folder = write_folder(tmp_path / "f", [b"junk"] * 5)
    data = open_training_data(folder, "prompts")
    assert [data[i]["prompt"] for i in range(5)] == CAPTIONS
    assert len(list(data)) == 5


def test_the_caption_column_is_passed_on(tmp_path):
    folder = write_folder(tmp_path / "f")
    lines = [{"file_name": f"{i}.png", "text": "no", "long": f"long {i}"} for i in range(5)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = open_training_data(folder, "images", transform=CENTRE, caption_column="long")
    assert data[3]["prompt"] == "long 3"
    with pytest.raises(ValueError, match="transform"):
        open_training_data(folder, "images")
