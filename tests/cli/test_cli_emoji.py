"""The emoji set's training table is what image methods read."""

import io

from PIL import Image

from fastdiff.data import ImageTransform, open_training_data
from fastdiff.data.emoji import Entry, write_training_table


def test_training_table_holds_the_training_split(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(picture, "PNG")
    captions = {"caption_group": "a fruit", "caption_concept": "red apple", "caption_style": "red apple, noto style"}
    entry = Entry(svg="", **captions, concept="red apple", style="noto", group="food", keywords="")
    path = tmp_path / "emoji_train.parquet"
    write_training_table([entry] * 90, [picture.getvalue()] * 90, ["train", "test", "train"] * 30, path, seed=0)
    data = open_training_data(path, "images", transform=ImageTransform(32, center_crop=True))
    assert len(data) == 60
    assert {data[index]["prompt"] for index in range(60)} == set(captions.values())
