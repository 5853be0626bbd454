"""Where the members of a tar file lie, so that they can be read by offset and never be extracted."""

import tarfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fastdiff.data.images import check_member_name

PICKLED = frozenset({"pyd", "pkl", "pickle", "pth", "pt"})
_BLOCK = tarfile.BLOCKSIZE


class ShardError(ValueError):
    """A tar shard that is damaged, or holds what is refused."""


class Member(NamedTuple):
    """Byte range of one file's contents in its shard."""

    offset: int
    size: int


def index_tar(path: Path) -> dict[str, dict[str, Member]]:
    """Samples of an uncompressed tar: key -> {extension: member}, in the order of the first members.

    As in webdataset, a name is split at the first dot of its last part: `dir/0001.seg.png` has the key `dir/0001` and
    the extension `seg.png` (lower case). Folders are skipped.

    Raises ShardError for a file that is not an uncompressed tar or is damaged or cut short, for links, devices, sparse
    and pickled members, for names that lead out of the archive, and for two members of one name.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            members = archive.getmembers()
    except (tarfile.TarError, EOFError) as error:
        raise ShardError(
            f"{path} is not a readable uncompressed tar file: {error}; download or pack it again"
        ) from error
    _check_end(path, members)
    samples: dict[str, dict[str, Member]] = {}
    for member in members:
        key, extension = _split(path, member)
        if member.isdir():
            continue
        sample = samples.setdefault(key, {})
        if extension in sample:
            raise ShardError(f"{path} holds {member.name!r} twice: pack it again with distinct names")
        sample[extension] = Member(member.offset_data, member.size)
    return samples


def read_member(path: Path, member: Member) -> bytes:
    """The member's bytes; ShardError if the file has become shorter than its index."""
    with path.open("rb") as file:
        file.seek(member.offset)
        data = file.read(member.size)
    if len(data) != member.size:
        raise ShardError(f"{path} changed while it was in use: {member.size} bytes at {member.offset} are gone")
    return data


def _check_end(path: Path, members: list[tarfile.TarInfo]) -> None:
    """tarfile takes a damaged or missing header in the middle for the end of the archive; here that is an error."""
    end = 0
    if members:
        size = members[-1].size if members[-1].isreg() else 0
        end = members[-1].offset_data + -(-size // _BLOCK) * _BLOCK
    with path.open("rb") as file:
        file.seek(end)
        block = file.read(_BLOCK)
    if len(block) < _BLOCK or any(block):
        raise ShardError(
            f"{path} is damaged or cut short: no member and no end mark at byte {end} of {path.stat().st_size}; "
            "download or pack it again"
        )


def _split(path: Path, member: tarfile.TarInfo) -> tuple[str, str]:
    try:
        check_member_name(member.name, str(path))
    except ValueError as error:
        raise ShardError(str(error)) from None
    if not member.isdir() and (not member.isreg() or member.issparse()):
        raise ShardError(f"{path}: member {member.name!r} is a link, device or sparse file: refused; pack plain files")
    name = PurePosixPath(member.name)
    stem, _, extension = name.name.partition(".")
    extension = extension.lower()
    if extension.rpartition(".")[2] in PICKLED:
        raise ShardError(
            f"{path}: member {member.name!r} is a pickle, which can run code when read: refused; store tensors as "
            ".npy or .safetensors"
        )
    return str(name.with_name(stem)) if stem else str(name), extension
