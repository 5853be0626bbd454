"""index.json of a cache folder: what it says, how it is read and checked."""

import json
import re
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdiff.data.files import sha256_of, write_aside

INDEX = "index.json"
NULL = "null.safetensors"
CAPTIONS, CAPTION_ENDS = "__captions", "__caption_ends"
FORMAT, VERSION = "fastdiff-cache", 1


class CacheError(ValueError):
    """A cache that is incomplete, damaged or used wrongly."""


class CacheMismatchError(CacheError):
    """A cache made by another teacher or with other settings."""


@dataclass(frozen=True)
class CacheMeta:
    """Whose tensors a cache holds.

    Attributes:
        teacher: identity of the teacher whose codec and text encoders made them.
        resolution: side of the images in pixels.
        dtype: of the computation, such as "float32".
        details: anything else that must agree for the cache to be extended (JSON values), such as solver and guidance
            of generated pairs.
    """

    teacher: str
    resolution: int
    dtype: str
    details: dict[str, Any] = field(default_factory=dict)

    def check_against(self, stored: "CacheMeta", folder: Path) -> None:
        """Raises CacheMismatchError naming every setting in which `stored` differs."""
        mine, theirs = json.loads(json.dumps(asdict(self))), asdict(stored)
        differences = [f"{name}: {theirs[name]!r}, now {mine[name]!r}" for name in mine if mine[name] != theirs[name]]
        if differences:
            raise CacheMismatchError(
                f"the cache {folder} was begun with other settings ({'; '.join(differences)}): give a new folder, or "
                "the settings it was begun with"
            )


@dataclass(frozen=True)
class Field:
    """One tensor of a record: dtype by torch's name, and shape without the batch dimension."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Field":
        return cls(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


@dataclass(frozen=True)
class StoredFile:
    """A safetensors file of the cache: number of records (0 for the null conditioning), size and hash."""

    file: str
    count: int
    bytes: int
    sha256: str

    def check_size(self, folder: Path) -> None:
        """Raises CacheError when the file is missing or of another size."""
        path = folder / self.file
        if not path.is_file():
            raise CacheError(f"{path} is missing: copy the cache again, or delete the folder and make it again")
        size = path.stat().st_size
        if size != self.bytes:
            raise CacheError(
                f"{path} has {size} bytes, {INDEX} says {self.bytes} (cut short or altered): copy the cache again, or "
                "delete the folder and make it again"
            )

    def check_hash(self, folder: Path) -> None:
        """Raises CacheError when the file's bytes are not those that were written."""
        path = folder / self.file
        if sha256_of(path) != self.sha256:
            raise CacheError(
                f"{path} was altered (its sha256 is not that of {INDEX}): copy the cache again, or delete the folder "
                "and make it again"
            )


@dataclass
class CacheIndex:
    """The contents of index.json; `next_position` is the place in the source behind the last stored record."""

    meta: CacheMeta
    fields: dict[str, Field] = field(default_factory=dict)
    shards: list[StoredFile] = field(default_factory=list)
    null: StoredFile | None = None
    next_position: int = 0
    complete: bool = False

    @property
    def count(self) -> int:
        return sum(shard.count for shard in self.shards)

    def shard_ends(self) -> list[int]:
        """Index behind the last record of each shard."""
        return list(accumulate(shard.count for shard in self.shards))


def is_cache(folder: Path) -> bool:
    """Whether the folder has an index.json of this format (which may still be damaged otherwise)."""
    try:
        return json.loads((folder / INDEX).read_text(encoding="utf-8")).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def write_index(folder: Path, index: CacheIndex) -> None:
    """Writes index.json aside and renames it."""
    content = {"format": FORMAT, "version": VERSION, "count": index.count, **asdict(index)}
    with write_aside(folder / INDEX) as partial:
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_index(folder: Path) -> CacheIndex:
    """Reads index.json; FileNotFoundError without one, CacheError for one that is damaged or of another version."""
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a cache (no {INDEX}): make one with `fastdiff cache`")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise CacheError(
                f"{path} is {content['format']!r} version {content['version']}, expected {FORMAT} {VERSION}"
            )
        index = _parse(content)
    except CacheError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(
            f"{path} is damaged ({type(error).__name__}: {error}): delete the folder and make it again"
        ) from error
    for file in [*index.shards, *([index.null] if index.null else [])]:
        if not re.fullmatch(r"[\w-]+\.safetensors", file.file):
            raise CacheError(f"{path} names the file {file.file!r}, which no cache has: refused")
    if content["count"] != index.count:
        raise CacheError(f"{path} counts {content['count']} records but its shards {index.count}: make it again")
    return index


def _parse(content: dict[str, Any]) -> CacheIndex:
    null = content["null"]
    return CacheIndex(
        meta=CacheMeta(**content["meta"]),
        fields={name: Field(f["dtype"], tuple(f["shape"])) for name, f in content["fields"].items()},
        shards=[StoredFile(**shard) for shard in content["shards"]],
        null=StoredFile(**null) if null else None,
        next_position=int(content["next_position"]),
        complete=bool(content["complete"]),
    )
