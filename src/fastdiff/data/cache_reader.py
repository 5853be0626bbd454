"""Reading a cache folder by index."""

from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fastdiff.data.cache_index import (
    CAPTION_ENDS,
    CAPTIONS,
    INDEX,
    NULL,
    CacheError,
    CacheMeta,
    CacheMismatchError,
    Field,
    read_index,
)


class CacheRecord(NamedTuple):
    """One cached sample: tensors by field, without batch dimension, and the caption."""

    tensors: dict[str, Tensor]
    caption: str


class CacheReader:
    """A complete cache as a sequence of `CacheRecord`; reads by memory map, opens shards on first use, picklable.

    Args:
        folder: what a CacheWriter completed.
        teacher: the teacher identity the tensors must come from; None accepts any.
        verify: compare every file's sha256 with the index now (reads everything once); sizes are compared always.

    Raises FileNotFoundError, CacheError for an incomplete, cut or altered cache (naming the file), and
    CacheMismatchError for another teacher's.
    """

    def __init__(self, folder: str | Path, teacher: str | None = None, verify: bool = True):
        self.folder = Path(folder)
        self._index = read_index(self.folder)
        verb = "pairs" if self.meta.details.get("kind") == "pairs" else "cache"
        if not self._index.complete:
            raise CacheError(
                f"the cache {self.folder} was interrupted after {self._index.count:,} records: run the same "
                f"`fastdiff {verb}` command again, it goes on from there"
            )
        if teacher is not None and teacher != self.meta.teacher:
            raise CacheMismatchError(
                f"the cache {self.folder} was made with the teacher {self.meta.teacher!r}, not {teacher!r}: its "
                f"tensors mean nothing to this one. Make this teacher a cache with `fastdiff {verb}`, or give that one"
            )
        files = [*self._index.shards, *([self._index.null] if self._index.null else [])]
        for file in files:
            file.check_size(self.folder)
        if verify:
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(lambda file: file.check_hash(self.folder), files))
        self._ends = self._index.shard_ends()
        self._handles: dict[int, Any] = {}

    @property
    def meta(self) -> CacheMeta:
        """Whose tensors these are."""
        return self._index.meta

    @property
    def fields(self) -> dict[str, Field]:
        """dtype and per-record shape by field."""
        return self._index.fields

    @property
    def null(self) -> dict[str, Tensor] | None:
        """The null conditioning (no batch dimension), or None if the cache has none."""
        return load_file(self.folder / NULL) if self._index.null else None

    def __len__(self) -> int:
        return self._index.count

    def __getitem__(self, index: int) -> CacheRecord:
        shard, row = self._locate(index)
        handle = self._shard(shard)
        return CacheRecord({name: handle.get_slice(name)[row] for name in self.fields}, self._text(handle, row))

    def caption(self, index: int) -> str:
        """The caption alone."""
        shard, row = self._locate(index)
        return self._text(self._shard(shard), row)

    def _locate(self, index: int) -> tuple[int, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} records")
        index %= len(self)
        shard = bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def _shard(self, number: int):
        if number not in self._handles:
            shard = self._index.shards[number]
            path = self.folder / shard.file
            try:
                handle = safe_open(path, framework="pt")
                shapes = {name: handle.get_slice(name).get_shape() for name in self.fields}
            except (SafetensorError, OSError) as error:
                raise CacheError(f"{path} is damaged: {error}; delete the cache folder and make it again") from error
            for name, field in self.fields.items():
                if shapes[name] != [shard.count, *field.shape]:
                    raise CacheError(f"{path}: field {name!r} has shape {shapes[name]}, unlike {INDEX}; make it again")
            self._handles[number] = handle
        return self._handles[number]

    @staticmethod
    def _text(handle, row: int) -> str:
        ends = handle.get_slice(CAPTION_ENDS)
        start = int(ends[row - 1]) if row else 0
        return bytes(handle.get_slice(CAPTIONS)[start : int(ends[row])].tolist()).decode()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handles": {}}
