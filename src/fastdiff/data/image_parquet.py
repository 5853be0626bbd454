"""Parquet files with encoded images in a column."""

import logging
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from fastdiff.data.images import CAPTION_COLUMNS, ImageExample, check_index, decode_image
from fastdiff.data.prompts import PromptFileError, pick_column
from fastdiff.data.rejects import Reject, RejectedImage, Rejects

KEPT_BYTES = 512 * 2**20

logger = logging.getLogger(__name__)


class _Group(NamedTuple):
    file: Path
    number: int
    first_row: int  # of the file, counted over all files


class ParquetImages:
    """Captioned images of a parquet file, or of all parquet files of a folder.

    The image column holds encoded bytes, or the {bytes, path} structs that the datasets library writes. Parquet can
    only be read by row groups, so up to 512 MB of them are kept a process; data that is much larger reads slowly in
    random order, and a warning says so.

    Raises FileNotFoundError, ValueError for a file that is not parquet, a missing column or one of another type, and
    TooManyRejects when more than `max_rejected` of the rows have no image or caption.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        image_column: str = "image",
        caption_column: str | None = None,
        max_rejected: float = 0.05,
    ):
        path = Path(path)
        self.files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not self.files or not self.files[0].exists():
            raise FileNotFoundError(f"no parquet file at {path}")
        self.image_column = image_column
        self._groups: list[_Group] = []
        self._kept: OrderedDict[int, list[bytes | None]] = OrderedDict()
        captions: list[Any] = []
        sizes: list[int] = []
        stored = 0
        for file in self.files:
            reader = open_parquet(file)
            check_image_column(reader.schema_arrow, image_column, file)
            first = len(captions)
            column = pick_column(reader.schema_arrow.names, caption_column, CAPTION_COLUMNS, str(file))
            captions += reader.read(columns=[column]).column(column).to_pylist()
            for group in range(reader.num_row_groups):
                self._groups.append(_Group(file, group, first))
                sizes.append(reader.metadata.row_group(group).num_rows)
                stored += reader.metadata.row_group(group).total_byte_size
        self._starts = [0, *accumulate(sizes)]
        self._bytes_per_group = max(1, stored // max(1, len(sizes)))
        self._select(captions, max_rejected, path)
        if stored > KEPT_BYTES:
            logger.warning(
                "%s holds %.1f GB of images: random access re-reads whole row groups. Precompute with `fastdiff "
                "cache`, or convert to webdataset shards or a datasets folder",
                path,
                stored / 2**30,
            )

    def _select(self, captions: list[Any], max_rejected: float, path: Path) -> None:
        if not captions:
            raise PromptFileError(f"{path} has no rows: expected at least one captioned image")
        self.rejects = Rejects(len(captions), max_rejected, str(path))
        self._rows = [(row, caption) for row, caption in enumerate(captions) if isinstance(caption, str)]
        missing = (row for row, caption in enumerate(captions) if not isinstance(caption, str))
        self.rejects.absorb(Reject(self._key(row), "no caption") for row in missing)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> ImageExample:
        row, caption = self._rows[check_index(index, len(self))]
        group = bisect_right(self._starts, row) - 1
        data = self._images(group)[row - self._starts[group]]
        key = self._key(row)
        if data is None:
            raise RejectedImage(key, "no image")
        return ImageExample(decode_image(data, key), caption, key)

    def caption(self, index: int) -> str:
        return self._rows[check_index(index, len(self))][1]

    def _key(self, row: int) -> str:
        group = self._groups[bisect_right(self._starts, row) - 1]
        return f"{group.file.name}/row {row - group.first_row}"

    def _images(self, group: int) -> list[bytes | None]:
        if group not in self._kept:
            file, number, _ = self._groups[group]
            table = open_parquet(file).read_row_group(number, columns=[self.image_column], use_threads=False)
            values = table.column(self.image_column).to_pylist()
            self._kept[group] = [value["bytes"] if isinstance(value, dict) else value for value in values]
            while len(self._kept) > max(1, KEPT_BYTES // self._bytes_per_group):
                self._kept.popitem(last=False)
        self._kept.move_to_end(group)
        return self._kept[group]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept": OrderedDict()}


def open_parquet(path: Path):
    """A pyarrow ParquetFile; ValueError when the file is not parquet or is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise PromptFileError(f"{path} is not a readable parquet file: {error}") from error


def is_image_type(kind) -> bool:
    """Whether an arrow type can hold encoded images: binary, or a struct with a binary field `bytes`."""
    import pyarrow.types as types

    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and is_image_type(kind.field("bytes").type)
    return types.is_binary(kind) or types.is_large_binary(kind)


def check_image_column(schema, column: str, path: Path) -> None:
    """Raises ValueError when the arrow schema has no image column of that name, naming the columns there are."""
    kinds = ", ".join(f"{field.name} ({field.type})" for field in schema)
    if column not in schema.names:
        raise PromptFileError(f"{path} has no image column {column!r}: it has {kinds}; name the column")
    if not is_image_type(schema.field(column).type):
        raise PromptFileError(f"{path}: column {column!r} does not hold encoded images (bytes): it has {kinds}")
