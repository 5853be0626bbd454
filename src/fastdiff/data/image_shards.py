"""Webdataset shards: tar files whose members with one key are one sample."""

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from fastdiff.data._extras import require
from fastdiff.data.images import CAPTION_COLUMNS, ImageExample, check_index, decode_image
from fastdiff.data.rejects import Reject, Rejects
from fastdiff.data.tar_index import Member, ShardError, index_tar, read_member

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif")


class _Sample(NamedTuple):
    shard: int
    key: str
    image: Member
    caption: str


class ImageShards:
    """Captioned images in local tar shards, by index; members are read by offset and never extracted.

    A sample has one image member (jpg, jpeg, png, webp, bmp, gif) and a caption: its `txt` member, or the
    field `caption_column` (default: text, caption or prompt) of its `json` member (with
    `caption_column`, only there).

    Args:
        pattern: a .tar file, a folder of them, or a brace pattern such as `data/{00000..00011}.tar`.
        max_rejected: largest allowed share of samples without image or caption.

    Raises FileNotFoundError for missing shards, ShardError for bad ones (see `index_tar`) and for a first shard
    without one usable sample, TooManyRejects above `max_rejected`.
    """

    def __init__(self, pattern: str | Path, *, caption_column: str | None = None, max_rejected: float = 0.05):
        self.shards = expand_shards(pattern)
        self._samples: list[_Sample] = []
        rejected: list[Reject] = []
        for shard in range(len(self.shards)):
            rejected += self._index(shard, caption_column)
        self.rejects = Rejects(len(self._samples) + len(rejected), max_rejected, str(pattern))
        self.rejects.absorb(rejected)

    def _index(self, shard: int, column: str | None) -> list[Reject]:
        path, rejected, before = self.shards[shard], [], len(self._samples)
        samples = index_tar(path)
        for key, members in samples.items():
            image = next((members[e] for e in IMAGE_EXTENSIONS if e in members), None)
            caption = _caption(path, members, column)
            if image is None or caption is None:
                rejected.append(Reject(f"{path.name}/{key}", "no image" if image is None else "no caption"))
            else:
                self._samples.append(_Sample(shard, key, image, caption))
        if shard == 0 and len(self._samples) == before:
            found = Counter(extension for members in samples.values() for extension in members)
            field = repr(column) if column else "text, caption or prompt"
            raise ShardError(
                f"{path}, the first shard, holds no captioned image. Found members "
                f"{', '.join(f'.{e} ({n})' for e, n in found.most_common(8)) or 'none'}; expected an image "
                f"({', '.join(IMAGE_EXTENSIONS)}) and a .txt, or a .json with the field {field}, of the same name"
            )
        return rejected

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> ImageExample:
        sample = self._samples[check_index(index, len(self))]
        path = self.shards[sample.shard]
        key = f"{path.name}/{sample.key}"
        return ImageExample(decode_image(read_member(path, sample.image), key), sample.caption, key)

    def caption(self, index: int) -> str:
        return self._samples[check_index(index, len(self))].caption


def expand_shards(pattern: str | Path) -> list[Path]:
    """The shards a path, folder or brace pattern stands for; FileNotFoundError names the first that is missing."""
    text = str(pattern)
    if text.startswith("pipe:") or "://" in text:
        raise ValueError(f"{text} is not a local path: download the shards first, random access needs local files")
    if Path(text).is_dir():
        paths = sorted(Path(text).glob("*.tar"))
    elif "{" in text:
        # webdataset's own expansion, from the package it uses for it.
        expand = require("braceexpand", "a brace pattern of shards").braceexpand
        paths = [Path(name) for name in expand(text)]
    else:
        paths = [Path(text)]
    if not paths:
        raise FileNotFoundError(f"no .tar file in the folder {text}")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} shards of {text} are missing, the first is {missing[0]}"
        )
    return paths


def _caption(path: Path, members: dict[str, Member], column: str | None) -> str | None:
    """The caption, or None when there is none to be read."""
    try:
        if "txt" in members and column is None:
            return read_member(path, members["txt"]).decode("utf-8").strip()
        if "json" not in members:
            return None
        fields = json.loads(read_member(path, members["json"]))
    except ValueError:  # not UTF-8 or not JSON
        return None
    names = (column,) if column else CAPTION_COLUMNS
    values = [fields[name] for name in names if name in fields] if isinstance(fields, dict) else []
    return values[0].strip() if values and isinstance(values[0], str) else None
