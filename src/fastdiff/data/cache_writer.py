"""Writing a cache folder, going on where a killed writer stopped."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fastdiff.data.cache_index import (
    CAPTION_ENDS,
    CAPTIONS,
    INDEX,
    NULL,
    CacheError,
    CacheIndex,
    CacheMeta,
    Field,
    StoredFile,
    read_index,
    write_index,
)
from fastdiff.data.cache_reader import CacheRecord
from fastdiff.data.files import sha256_of, write_aside


class CacheWriter:
    """Appends records to a cache folder; a context manager that completes the cache on a clean exit.

    Opening a folder that an earlier writer left behind goes on after its last whole shard: feed the source from
    `next_position` on. Files of a shard that was never entered in the index are removed.

    Args:
        folder: made if missing; otherwise empty, or a cache with the same `meta`.
        meta: whose tensors these are.
        shard_size: records a shard.

    Raises CacheMismatchError for a cache of another teacher or setting, CacheError for a folder with other things in
    it, OSError when writing fails.
    """

    def __init__(self, folder: str | Path, meta: CacheMeta, shard_size: int = 1024):
        if shard_size < 1:
            raise ValueError(f"a shard holds at least one record, got shard_size={shard_size}")
        self.folder = Path(folder)
        self.shard_size = shard_size
        self.folder.mkdir(parents=True, exist_ok=True)
        self._index = self._resume(meta)
        self._waiting: list[CacheRecord] = []
        self.next_position = self._index.next_position

    @property
    def count(self) -> int:
        """Records added so far, those not yet on disk included."""
        return self._index.count + len(self._waiting)

    def add(self, tensors: Mapping[str, Tensor], caption: str, position: int | None = None) -> None:
        """Adds one record; tensors have no batch dimension and are copied to the CPU.

        `position` is the record's place in the source and must grow (default: the next one); places left out, such as
        rejected images, are not asked for again on resuming. Raises CacheError for fields, shapes or dtypes unlike the
        first record's and for non-finite values.
        """
        position = self.next_position if position is None else position
        if position < self.next_position:
            raise CacheError(f"position {position} comes after {self.next_position - 1}: add records in order")
        self._check(tensors, position)
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        self._waiting.append(CacheRecord(copies, caption))
        self.next_position = position + 1
        if len(self._waiting) >= self.shard_size:
            self._flush()

    def write_null(self, tensors: Mapping[str, Tensor]) -> None:
        """Stores the null conditioning (no batch dimension); writing it again replaces it."""
        for name, tensor in tensors.items():
            _check_finite(tensor, f"the null conditioning's {name!r}")
        self._index.null = self._save(
            {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}, NULL
        )
        self._index.complete = False
        write_index(self.folder, self._index)

    def close(self) -> None:
        """Writes what waits and marks the cache as complete. Raises CacheError for a cache without a record."""
        if not self.count:
            raise CacheError(f"{self.folder}: no record was added, so there is no cache to complete")
        if self._waiting:
            self._flush()
        self._index.complete = True
        write_index(self.folder, self._index)

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.close()

    def _resume(self, meta: CacheMeta) -> CacheIndex:
        strangers = [p.name for p in self.folder.iterdir() if not _is_ours(p.name)]
        if not (self.folder / INDEX).exists():
            if strangers:
                raise CacheError(
                    f"{self.folder} is not a cache but holds {strangers[0]!r}: give an empty or new folder"
                )
            index = CacheIndex(meta)
        else:
            index = read_index(self.folder)
            meta.check_against(index.meta, self.folder)
        known = {shard.file for shard in index.shards} | {NULL, INDEX}
        for path in self.folder.iterdir():
            if _is_ours(path.name) and path.name not in known:
                path.unlink()
        for shard in index.shards:
            shard.check_size(self.folder)
        return index

    def _check(self, tensors: Mapping[str, Tensor], position: int) -> None:
        fields = {name: Field.of(tensor) for name, tensor in tensors.items()}
        if not fields or any(name.startswith("__") for name in fields):
            raise CacheError(f"a record needs named tensors, not starting with '__', got {list(fields)}")
        if not self._index.fields:
            self._index.fields = fields
        if fields != self._index.fields:
            raise CacheError(
                f"record at position {position} has {_named(fields)}, but the cache holds {_named(self._index.fields)}"
            )
        for name, tensor in tensors.items():
            _check_finite(tensor, f"record at position {position}: field {name!r}")

    def _flush(self) -> None:
        texts = [record.caption.encode() for record in self._waiting]
        tensors = {name: torch.stack([r.tensors[name] for r in self._waiting]) for name in self._index.fields}
        tensors[CAPTIONS] = torch.frombuffer(bytearray(b"".join(texts) + b"\0"), dtype=torch.uint8)
        tensors[CAPTION_ENDS] = torch.tensor([len(text) for text in texts]).cumsum(0)
        stored = self._save(tensors, f"shard-{len(self._index.shards):05d}.safetensors", len(texts))
        self._index.shards.append(stored)
        self._index.next_position = self.next_position
        self._index.complete = False
        self._waiting = []
        write_index(self.folder, self._index)

    def _save(self, tensors: dict[str, Tensor], name: str, count: int = 0) -> StoredFile:
        try:
            with write_aside(self.folder / name) as partial:
                save_file(tensors, partial)
                return StoredFile(name, count, partial.stat().st_size, sha256_of(partial))
        except SafetensorError as error:
            raise OSError(f"could not write {self.folder / name}: {error}") from error


def _is_ours(name: str) -> bool:
    return re.fullmatch(r"(shard-\d{5,}\.safetensors|null\.safetensors|index\.json)(\.partial)?", name) is not None


def _named(fields: Mapping[str, Field]) -> str:
    return ", ".join(f"{name} {field.dtype} {list(field.shape)}" for name, field in sorted(fields.items()))


def _check_finite(tensor: Tensor, what: str) -> None:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise CacheError(
            f"{what} is not finite (NaN or infinity). In fp16 this is often the autoencoder: encode in fp32 or bf16"
        )
