"""An image folder with a metadata.jsonl (the `imagefolder` convention of the datasets library)."""

from pathlib import Path

from fastdiff.data.images import CAPTION_COLUMNS, ImageExample, check_index, check_member_name, decode_image
from fastdiff.data.prompts import PromptFileError, pick_column, read_json_lines
from fastdiff.data.rejects import Reject, Rejects

METADATA = "metadata.jsonl"
FILE_COLUMN = "file_name"


class ImageFolder:
    """Images of a folder; each line of its metadata.jsonl holds `file_name` (relative) and a caption column.

    The caption column is `caption_column`, or the first of text, caption, prompt in the first line. Lines without a
    caption and files that are missing are rejected. Raises FileNotFoundError without a metadata.jsonl, ValueError for
    an empty one, a missing column or a file name that leads out of the folder, TooManyRejects above `max_rejected`.
    """

    def __init__(self, folder: str | Path, *, caption_column: str | None = None, max_rejected: float = 0.05):
        self.folder = Path(folder)
        metadata = self.folder / METADATA
        if not metadata.is_file():
            raise FileNotFoundError(
                f'{self.folder} has no {METADATA}: expected a line such as {{"{FILE_COLUMN}": "0001.png", "text": '
                '"a red apple"}} for each image'
            )
        lines = read_json_lines(metadata)
        if not lines:
            raise PromptFileError(f"{metadata} is empty: expected a line for each image")
        column = pick_column(lines[0][1], caption_column, CAPTION_COLUMNS, f"{metadata} line {lines[0][0]}")
        self.rejects = Rejects(len(lines), max_rejected, str(self.folder))
        self._items: list[tuple[str, str]] = []
        checked = [self._add(line.get(FILE_COLUMN), line.get(column), f"{metadata} line {n}") for n, line in lines]
        self.rejects.absorb(reject for reject in checked if reject)

    def _add(self, name: object, caption: object, where: str) -> Reject | None:
        if not isinstance(name, str):
            raise PromptFileError(f"{where} has no string field {FILE_COLUMN!r}: expected the image's relative path")
        check_member_name(name, where)
        if not isinstance(caption, str):
            return Reject(name, "no caption")
        if not (self.folder / name).is_file():
            return Reject(name, "missing file")
        self._items.append((name, caption))
        return None

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> ImageExample:
        name, caption = self._items[check_index(index, len(self))]
        return ImageExample(decode_image((self.folder / name).read_bytes(), name), caption, name)

    def caption(self, index: int) -> str:
        return self._items[check_index(index, len(self))][1]
