import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from fastdiff.data import ImageTransform
from fastdiff.data.transform import visit_rng


def _noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(40, 30), (30, 41), (32, 32), (16, 16), (101, 33)])
@pytest.mark.parametrize("name", ["bilinear", "bicubic", "lanczos", "nearest"])
def test_the_centre_crop_is_torchvisions(size, name):
    image = _noise(*size)
    mode = v2.InterpolationMode[name.upper()]
    expected = v2.functional.resize(image, [16], interpolation=mode)
    ours = ImageTransform(16, center_crop=True, interpolation=name)(image)
    # An odd rest has two middles; torchvision rounds half to even.
    crops = []
    for dx in (0, 1):
        for dy in (0, 1):
            left, top = (expected.width - 16) // 2 + dx, (expected.height - 16) // 2 + dy
            crop = v2.functional.pil_to_tensor(expected.crop((left, top, left + 16, top + 16)))
            crops.append(crop.float() / 127.5 - 1)
    assert any(torch.equal(ours, crop) for crop in crops)


def test_range_shape_dtype():
    out = ImageTransform(8, center_crop=True)(Image.new("RGB", (8, 8), (0, 255, 51)))
    assert (out.shape, out.dtype) == ((3, 8, 8), torch.float32)
    assert out[:, 0, 0].tolist() == pytest.approx([-1.0, 1.0, -0.6])


def test_random_crops_reach_every_place_and_flips_half_of_the_time():
    image = Image.new("RGB", (6, 4))
    for x in range(6):
        for y in range(4):
            image.putpixel((x, y), (x * 40, y, 0))
    transform = ImageTransform(4, random_flip=True)
    lefts, flips = [], 0
    for item in range(400):
        red = ((transform(image, visit_rng(0, 0, item))[0, 0] + 1) * 127.5).round() / 40
        flips += int(red[0] > red[-1])
        lefts.append(int(red.min()))
    assert 150 < flips < 250
    assert all(90 < lefts.count(left) < 180 for left in (0, 1, 2))


def test_draws_depend_on_seed_epoch_and_item_only():
    draws = {tuple(visit_rng(s, e, i).random(2)) for s in range(3) for e in range(3) for i in range(3)}
    assert len(draws) == 27
    assert visit_rng(-1, 2, 3).random() == visit_rng(-1, 2, 3).random()


def test_bad_settings():
    with pytest.raises(ValueError, match="resolution"):
        ImageTransform(0)
    with pytest.raises(ValueError, match="'cubic': expected one of nearest"):
        ImageTransform(8, interpolation="cubic")
    with pytest.raises(ValueError, match="rng"):
        ImageTransform(8)(Image.new("RGB", (8, 8)))
