"""Scorers: what the perceptual distance is, where gradients go, and the tower that may not be trained on."""

from __future__ import annotations

import shutil

import pytest
import torch

from fastdiff.models.scorers import TowerScorer, open_scorer
from fastdiff.models.towers import SHIPPED, PixelPreprocess


@pytest.fixture(scope="module")
def scorer():
    return open_scorer("loss_tower")


def images(rows=3, side=32, seed=0):
    return 2 * torch.rand(rows, 3, side, side, generator=torch.Generator().manual_seed(seed)) - 1


def test_distance_is_the_mean_squared_difference_of_unit_activations(scorer):
    a, b = images(), images(seed=1)
    expected = torch.zeros(3)
    visual, pixels = scorer.tower.model.visual, scorer.tower.preprocess
    one, other = pixels.of_unit((a + 1) / 2), pixels.of_unit((b + 1) / 2)
    for block in (visual.stem, visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        one, other = block(one), block(other)
        units = [torch.nn.functional.normalize(x, dim=1) for x in (one, other)]
        expected += (units[0] - units[1]).square().sum(1).mean((1, 2))
    torch.testing.assert_close(scorer.distance(a, b), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scorer.distance(b, a), scorer.distance(a, b))
    assert scorer.distance(a, a).abs().max() == 0


def test_distance_grows_with_blur_and_each_pair_stands_alone(scorer):
    a = images(2)
    blurred = [torch.nn.functional.avg_pool2d(a, k, 1, k // 2, count_include_pad=False) for k in (1, 3, 7)]
    same, little, much = (scorer.distance(a, other) for other in blurred)
    assert (same < little).all() and (little < much).all()
    torch.testing.assert_close(scorer.distance(a[1:], blurred[2][1:]), much[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flat", [False, True])
def test_gradients_reach_the_images_and_nothing_else(scorer, flat):
    """Flat images leave units silent, where a plain norm has no gradient."""
    a = (torch.ones(2, 3, 32, 32) if flat else images(2)).requires_grad_()
    (scorer.distance(a, images(2, seed=1)) + scorer.image_embedding(a).sum(1)).sum().backward()
    assert torch.isfinite(a.grad).all() and a.grad.abs().max() > 0
    assert all(p.grad is None and not p.requires_grad for p in scorer.tower.model.parameters())
    assert not scorer.text_embedding(["a red apple"]).requires_grad


def test_embeddings_are_unit_vectors_of_one_space(scorer):
    image, text = scorer.image_embedding(images(2)), scorer.text_embedding(["a red apple", "a dog"])
    assert image.shape == text.shape == (2, 160)
    for embedding in (image, text):
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(2), rtol=1e-5, atol=1e-6)
    assert (text[0] - text[1]).abs().max() > 1e-3


def test_images_are_read_in_minus_one_to_one(scorer):
    """A scorer sees what the same tower measures of the image in 8 bits."""
    pixels = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    expected = scorer.tower.model.encode_image(scorer.tower.preprocess(pixels))
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(scorer.image_embedding(pixels / 127.5 - 1), expected, rtol=1e-3, atol=1e-4)


def test_other_sizes_are_resized_and_latents_refused(scorer):
    large = images(1).repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert scorer.distance(large, large.flip(-1)).item() > 0
    assert scorer.features(images(1, 64))[0].shape == scorer.features(images(1))[0].shape
    for wrong in (torch.zeros(2, 4, 8, 8), torch.zeros(2, 2, 1, 1)):
        with pytest.raises(ValueError, match="decode latents"):
            scorer.distance(wrong, wrong)


def test_the_measuring_tower_is_refused_under_any_name(tmp_path):
    shutil.copytree(SHIPPED / "measuring", tmp_path / "mine")
    for folder in (SHIPPED / "measuring", tmp_path / "mine"):
        with pytest.raises(ValueError, match="never measured with"):
            TowerScorer.from_folder(folder)


def test_a_folder_without_a_tower_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="open_clip_config"):
        open_scorer(str(tmp_path))


def test_preprocessing_of_bytes_and_of_unit_floats_agree():
    preprocess = PixelPreprocess([0.8, 0.7, 0.6], [0.3, 0.2, 0.1], 4, 2)
    pixels = torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4)
    out = preprocess(pixels)
    assert out.shape == (1, 3, 8, 8) and torch.equal(out, preprocess.of_unit(pixels.float() / 255))
    torch.testing.assert_close(out[0, 1, 0, 2], (torch.tensor(17.0) / 255 - 0.7) / 0.2)
