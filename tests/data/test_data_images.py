import io
import json
import pickle
import shutil
import sys

import pytest
from data_helpers import CAPTIONS, COLOURS, noisy_png, png, tar_members, write_folder, write_parquet, write_tar
from PIL import Image

from fastdiff.data import RejectedImage, Rejects, TooManyRejects, open_images
from fastdiff.data.image_folder import ImageFolder
from fastdiff.data.image_parquet import ParquetImages
from fastdiff.data.images import decode_image


def _datasets_folder(path, images=None, captions=CAPTIONS):
    datasets = pytest.importorskip("datasets")
    images = images or [png(c) for c in COLOURS]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": b, "path": None} for b in images], "text": list(captions)}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(path))
    return path


def _make(kind, root):
    if kind == "folder":
        return write_folder(root / "folder")
    if kind == "tar":
        return write_tar(root / "a.tar", tar_members())
    if kind == "braces":
        write_tar(root / "s-0.tar", tar_members(range(3)))
        write_tar(root / "s-1.tar", tar_members(range(3, 5)))
        return f"{root}/s-{{0..1}}.tar"
    if kind == "parquet":
        return write_parquet(root / "a.parquet")
    if kind == "parquet bytes":
        return write_parquet(root / "a.parquet", structs=False)
    return _datasets_folder(root / "ds")


@pytest.mark.parametrize("kind", ["folder", "tar", "braces", "parquet", "parquet bytes", "datasets"])
def test_every_format_gives_the_same_examples_in_any_order_and_after_pickling(tmp_path, kind):
    source = open_images(_make(kind, tmp_path))
    assert len(source) == 5
    assert len(source.rejects) == 0
    source[0]
    for copy in (source, pickle.loads(pickle.dumps(source))):
        for i in (3, 0, 4, 1, 2, -1):
            example = copy[i]
            assert example.caption == copy.caption(i) == CAPTIONS[i]
            assert example.image.mode == "RGB"
            assert example.image.size == (12, 8)
            assert example.image.getpixel((5, 5)) == COLOURS[i]
        assert len({copy[i].key for i in range(5)}) == 5
        with pytest.raises(IndexError):
            copy[5]


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet", "datasets"])
def test_a_broken_image_is_rejected_by_name_and_the_others_survive(tmp_path, kind):
    broken = noisy_png()[:200]
    images = [png(COLOURS[0]), broken, png(COLOURS[2])]
    makers = {
        "folder": lambda: write_folder(tmp_path / "f", images),
        "tar": lambda: write_tar(
            tmp_path / "a.tar",
            [m for i, b in enumerate(images) for m in ((f"{i}.png", b), (f"{i}.txt", b"x"))],
        ),
        "parquet": lambda: write_parquet(tmp_path / "a.parquet", images=images, captions=CAPTIONS[:3]),
        "datasets": lambda: _datasets_folder(tmp_path / "ds", images, CAPTIONS[:3]),
    }
    source = open_images(makers[kind]())
    source[0], source[2]
    with pytest.raises(RejectedImage) as caught:
        source[1]
    assert caught.value.reject.key.rpartition("/")[2] in ("1.png", "1", "row 1")
    assert caught.value.reject.reason == "truncated"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # crosses from a worker


@pytest.mark.parametrize(
    "data, reason",
    [(b"", "empty"), (b"not an image at all", "not an image"), (png()[:50], "broken|truncated"), (b"GIF89a", "")],
)
def test_undecodable_bytes(data, reason):
    with pytest.raises(RejectedImage, match=f"k: .*({reason})"):
        decode_image(data, "k")


def test_a_flipped_bit_in_a_png_is_rejected():
    data = bytearray(noisy_png())
    data[len(data) // 2] ^= 1
    with pytest.raises(RejectedImage):
        decode_image(bytes(data), "k")


def test_transparency_becomes_white_and_rotation_is_undone():
    assert decode_image(png((255, 0, 0, 0), mode="RGBA"), "k").getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(png((0, 0, 0, 255), mode="RGBA"), "k").getpixel((0, 0)) == (0, 0, 0)
    assert decode_image(png(128, mode="L"), "k").getpixel((0, 0)) == (128, 128, 128)
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (12, 8)).save(buffer, "JPEG", exif=exif)
    assert decode_image(buffer.getvalue(), "k").size == (8, 12)


class TestFolder:
    def test_needs_its_metadata(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r'no metadata.jsonl: expected a line such as \{"file_name"'):
            ImageFolder(tmp_path)

    def test_lines_without_file_or_caption_are_rejected_and_named(self, tmp_path):
        folder = write_folder(tmp_path / "f")
        with (folder / "metadata.jsonl").open("a") as file:
            file.write('{"file_name": "gone.png", "text": "x"}\n{"file_name": "0.png", "text": null}\n')
        source = ImageFolder(folder, max_rejected=0.5)
        assert len(source) == 5
        assert source.rejects.summary() == "2 of 7 rejected: gone.png (missing file), 0.png (no caption)"
        with pytest.raises(TooManyRejects, match=r"2 of 7.*At most 5.0%"):
            ImageFolder(folder)

    @pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a/../../x.png", "..\\x.png", "C:\\x.png"])
    def test_names_that_lead_out_are_refused(self, tmp_path, name):
        folder = write_folder(tmp_path / "f")
        (tmp_path / "x.png").write_bytes(png())
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
        with pytest.raises(ValueError, match="leads out of it"):
            ImageFolder(folder)

    @pytest.mark.parametrize(
        "text, message",
        [("", "is empty"), ('{"file_name": "0.png"}', "no column"), ("{", "JSON")],
    )
    def test_bad_metadata(self, tmp_path, text, message):
        folder = write_folder(tmp_path / "f")
        (folder / "metadata.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            ImageFolder(folder)


class TestParquet:
    def test_a_folder_of_files_is_one_sequence(self, tmp_path):
        for i in (0, 1):
            write_parquet(tmp_path / f"{i}.parquet")
        source = ParquetImages(tmp_path)
        assert [source[i].caption for i in range(10)] == CAPTIONS * 2
        assert [source[i].image.getpixel((0, 0)) for i in range(10)] == COLOURS * 2
        assert source[7].key == "1.parquet/row 2"

    def test_few_groups_are_kept_when_memory_is_short(self, tmp_path, monkeypatch, caplog):
        write_parquet(tmp_path / "a.parquet", group=1)
        monkeypatch.setattr("fastdiff.data.image_parquet.KEPT_BYTES", 1)
        source = ParquetImages(tmp_path / "a.parquet")
        assert "random access re-reads whole row groups" in caplog.text
        assert [source[i].caption for i in (4, 2, 0)] == ["cyan", "blue", "red"]
        assert len(source._kept) == 1

    def test_columns_are_checked(self, tmp_path):
        path = write_parquet(tmp_path / "a.parquet", column="picture")
        with pytest.raises(ValueError, match=r"no image column 'image': it has picture \(struct.*text \(string"):
            ParquetImages(path)
        with pytest.raises(ValueError, match="'text' does not hold encoded images"):
            ParquetImages(path, image_column="text")
        with pytest.raises(ValueError, match="no column 'long'"):
            ParquetImages(path, image_column="picture", caption_column="long")
        assert len(ParquetImages(path, image_column="picture")) == 5

    def test_null_image_and_null_caption(self, tmp_path):
        path = write_parquet(
            tmp_path / "a.parquet", images=[png(), None, png()], captions=["a", "b", None], structs=False
        )
        source = ParquetImages(path, max_rejected=0.5)
        assert source.rejects.summary() == "1 of 3 rejected: a.parquet/row 2 (no caption)"
        with pytest.raises(RejectedImage, match="row 1: no image"):
            source[1]

    def test_cut_file(self, tmp_path):
        path = write_parquet(tmp_path / "a.parquet")
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(ValueError, match="not a readable parquet"):
            ParquetImages(path)


class TestDatasets:
    def test_the_extra_is_named_when_datasets_is_missing(self, tmp_path, monkeypatch):
        folder = _datasets_folder(tmp_path / "ds")
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ImportError, match=r"fastdiff-diffusers\[data\]"):
            open_images(folder)

    def test_the_train_split_is_taken_and_columns_are_checked(self, tmp_path):
        datasets = pytest.importorskip("datasets")
        one = datasets.load_from_disk(str(_datasets_folder(tmp_path / "one")))
        datasets.DatasetDict({"test": one.select([0]), "train": one.select([4, 2])}).save_to_disk(
            str(tmp_path / "all")
        )
        source = open_images(tmp_path / "all")
        assert [source[i].caption for i in range(len(source))] == ["cyan", "blue"]
        assert source[1].image.getpixel((0, 0)) == COLOURS[2]
        with pytest.raises(ValueError, match="no image column 'photo': it has image, text"):
            open_images(tmp_path / "all", image_column="photo")
        datasets.DatasetDict({"a": one, "b": one}).save_to_disk(str(tmp_path / "ab"))
        with pytest.raises(ValueError, match="no split 'train' but a, b"):
            open_images(tmp_path / "ab")

    def test_a_damaged_folder(self, tmp_path):
        folder = _datasets_folder(tmp_path / "ds")
        (folder / "state.json").write_text("{")
        with pytest.raises(ValueError, match="does not load as a datasets folder"):
            open_images(folder)
        shutil.rmtree(folder)
        with pytest.raises(FileNotFoundError):
            open_images(folder)


class TestRejects:
    def test_the_summary_names_the_first_and_counts_the_rest(self):
        rejects = Rejects(5000)
        for i in range(12):
            rejects.add(f"{i}.png", "truncated")
        assert rejects.summary() == (
            "12 of 5,000 rejected: 0.png (truncated), 1.png (truncated), 2.png (truncated), 3.png (truncated), "
            "4.png (truncated), ... and 7 more"
        )

    def test_one_item_counts_once_and_the_share_is_the_limit(self):
        rejects = Rejects(20, max_share=0.1, source="there")
        for _ in range(5):
            rejects.add("a", "broken")
        rejects.add("b", "broken")
        with pytest.raises(TooManyRejects, match="there: 3 of 20 rejected: a"):
            rejects.absorb([("c", "broken")])

    @pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
    def test_a_share_is_a_share(self, share):
        with pytest.raises(ValueError, match="share"):
            Rejects(1, share)
