"""Feature files and extractors."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

from fastdiff.evaluation.extractors import ClipTower, InceptionFeatures
from fastdiff.evaluation.features import FeatureFileError, ImageFeatures
from fastdiff.evaluation.resizing import Resize, to_pil


def random_images(count=6, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


@pytest.fixture
def saved(tower, tmp_path):
    return ImageFeatures.of(random_images(), tower, source="test").save(tmp_path / "reference.npz")


def test_round_trip_is_exact(tower, saved):
    fresh, loaded = ImageFeatures.of(random_images(), tower), ImageFeatures.load(saved, tower, Resize(), n=6)
    assert torch.equal(fresh.features, loaded.features) and torch.equal(fresh.sharpness, loaded.sharpness)
    assert loaded.manifest["source"] == "test" and loaded.manifest["n"] == 6
    assert np.load(saved)["features"].dtype == np.float16
    assert sorted(p.name for p in saved.parent.iterdir()) == ["reference.json", "reference.npz"]


def test_another_tower_is_refused(saved, tmp_path, write_tower):
    other = ClipTower.from_folder(write_tower(tmp_path / "other", seed=1))
    with pytest.raises(FeatureFileError, match="extractor_sha256"):
        ImageFeatures.load(saved, other)


@pytest.mark.parametrize(
    ("expected", "message"), [({"n": 7}, "n = 6, expected 7"), ({"resize": Resize(8)}, "expected lanczos-8")]
)
def test_other_settings_are_refused(saved, expected, message):
    with pytest.raises(FeatureFileError, match=message):
        ImageFeatures.load(saved, **expected)


def test_a_changed_file_is_refused(saved):
    saved.write_bytes(saved.read_bytes() + b"x")
    with pytest.raises(FeatureFileError, match="its manifest says"):
        ImageFeatures.load(saved)


def test_pickled_objects_are_refused(saved):
    np.savez(saved, features=np.array([{"a": 1}], dtype=object), sharpness=np.zeros(1))
    manifest = saved.with_suffix(".json")
    content = {**json.loads(manifest.read_text()), "sha256": hashlib.sha256(saved.read_bytes()).hexdigest()}
    manifest.write_text(json.dumps(content))
    with pytest.raises(FeatureFileError, match="allow_pickle"):
        ImageFeatures.load(saved)


def test_a_missing_manifest_is_named(saved):
    saved.with_suffix(".json").unlink()
    with pytest.raises(FileNotFoundError, match=r"reference\.json"):
        ImageFeatures.load(saved)


def test_a_folder_of_images_gives_the_same_features(tower, tmp_path):
    images = random_images()
    for index, image in enumerate(images):
        to_pil(image).save(tmp_path / f"{index:02}.png")
    assert torch.equal(ImageFeatures.of_folder(tmp_path, tower).features, ImageFeatures.of(images, tower).features)
    with pytest.raises(FileNotFoundError, match="no PNG"):
        ImageFeatures.of_folder(tmp_path / "nothing", tower)


def test_tower_is_open_clips_model(tower, tower_folder):
    import open_clip

    images = random_images()
    pixels = (images.float() / 255 - 0.5) / 0.5
    assert torch.equal(tower.image_features(images), tower.model.encode_image(pixels))
    tokens = open_clip.SimpleTokenizer(str(tower_folder / "bpe.txt.gz"), context_length=12)(["abc de"])
    assert torch.equal(tower.text_features(["abc de"]), tower.model.encode_text(tokens))
    assert tokens.max() == tower.model.vocab_size - 1  # the end token comes last, where open_clip pools


def test_wrong_image_size_is_refused(tower):
    with pytest.raises(ValueError, match=r"takes \(32, 32\)"):
        tower.image_features(random_images(size=16))


def test_a_folder_without_weights_is_refused(tower_folder, tmp_path):
    (tmp_path / "open_clip_config.json").write_text((tower_folder / "open_clip_config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"expected one \*.txt.gz"):
        ClipTower.from_folder(tmp_path)


def test_named_models_need_a_known_name_and_a_file(tmp_path):
    with pytest.raises(ValueError, match="ViT-g-14"):
        ClipTower.from_open_clip("ViT-g14", tmp_path)
    with pytest.raises(FileNotFoundError, match="download the open_clip checkpoint"):
        ClipTower.from_open_clip("ViT-g-14", tmp_path / "none.pt")


def test_inception_without_weights_says_where_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="torch-fidelity/releases"):
        InceptionFeatures(tmp_path / "none.pth")


def test_inception_refuses_pickled_code(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save(Evil(), tmp_path / "weights.pth")
    with pytest.raises(pickle.UnpicklingError):
        InceptionFeatures(tmp_path / "weights.pth")
    assert not (tmp_path / "owned").exists()


def test_resize_crops_the_centre_and_keeps_constants():
    image = torch.zeros(1, 3, 16, 32, dtype=torch.uint8)
    image[..., 8:24] = 137  # the centre square
    small = Resize(lanczos=8, bicubic=5)(image)
    assert small.shape == (1, 3, 5, 5) and (small == 137).all()
    assert Resize(lanczos=8, bicubic=5).name == "lanczos-8+clean-5" and Resize().name == "none"
