"""Folders written by `Dataset.save_to_disk` of the datasets library."""

from pathlib import Path
from typing import Any

from fastdiff.data._extras import require
from fastdiff.data.images import CAPTION_COLUMNS, ImageExample, check_index, decode_image
from fastdiff.data.prompts import PromptFileError, pick_column
from fastdiff.data.rejects import Reject, RejectedImage, Rejects


class DatasetsImages:
    """Captioned images of a `datasets` folder, memory mapped; of several splits, `train` is read.

    Raises ImportError naming the extra when datasets is not installed, ValueError for a folder that does not load, a
    missing column or split, and TooManyRejects when more than `max_rejected` rows have no caption.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        image_column: str = "image",
        caption_column: str | None = None,
        max_rejected: float = 0.05,
    ):
        self.folder = Path(folder)
        self.image_column = image_column
        self._opened: Any = None
        dataset = self._dataset()
        column = pick_column(dataset.column_names, caption_column, CAPTION_COLUMNS, str(self.folder))
        captions = list(dataset[column])
        if not captions:
            raise PromptFileError(f"{self.folder} has no rows: expected at least one captioned image")
        self.rejects = Rejects(len(captions), max_rejected, str(self.folder))
        self._rows = [(row, caption) for row, caption in enumerate(captions) if isinstance(caption, str)]
        missing = (row for row, caption in enumerate(captions) if not isinstance(caption, str))
        self.rejects.absorb(Reject(f"row {row}", "no caption") for row in missing)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> ImageExample:
        row, caption = self._rows[check_index(index, len(self))]
        key = f"row {row}"
        return ImageExample(decode_image(_encoded(self._dataset()[row][self.image_column], key), key), caption, key)

    def caption(self, index: int) -> str:
        return self._rows[check_index(index, len(self))][1]

    def _dataset(self):
        if self._opened is None:
            self._opened = _open(self.folder, self.image_column)
        return self._opened

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_opened": None}


def _open(folder: Path, image_column: str):
    datasets = require("datasets", f"reading the datasets folder {folder}")
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise PromptFileError(f"{folder} does not load as a datasets folder: {error}; save it again") from error
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded and len(loaded) != 1:
            raise PromptFileError(f"{folder} has no split 'train' but {', '.join(loaded)}: give one split's folder")
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    if image_column not in loaded.column_names:
        raise PromptFileError(
            f"{folder} has no image column {image_column!r}: it has {', '.join(loaded.column_names)}"
        )
    # Not decoded by the library, so that a broken image is rejected like in every other source.
    if isinstance(loaded.features[image_column], datasets.Image):
        loaded = loaded.cast_column(image_column, datasets.Image(decode=False))
    return loaded.with_format(None)


def _encoded(value: Any, key: str) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict) and value.get("bytes"):
        return value["bytes"]
    if isinstance(value, dict) and value.get("path"):
        try:
            return Path(value["path"]).read_bytes()
        except OSError as error:
            raise RejectedImage(key, "missing file") from error
    if value is None or isinstance(value, dict):
        raise RejectedImage(key, "no image")
    raise PromptFileError(f"{key}: expected an image column (encoded bytes), got {type(value).__name__}")
