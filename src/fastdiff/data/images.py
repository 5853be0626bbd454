"""Captioned images as random-access sequences: what every image source is, and how bytes become an image."""

import io
import struct
import zlib
from pathlib import PurePosixPath
from typing import NamedTuple, Protocol

from PIL import Image, ImageOps

from fastdiff.data.rejects import RejectedImage, Rejects

CAPTION_COLUMNS = ("text", "caption", "prompt")

# What PIL raises for files that lie, besides OSError: broken PNG chunks, bad EXIF blocks, absurd sizes.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class ImageExample(NamedTuple):
    """An RGB image of any size with its caption; `key` names it in its source."""

    image: Image.Image
    caption: str
    key: str


class ImageSource(Protocol):
    """Images with captions by index. Picklable: files are opened where they are read.

    `source[i]` raises RejectedImage when image i cannot be decoded; items without a file or caption were left out when
    the source was opened and stand in `rejects`.
    """

    rejects: Rejects

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> ImageExample: ...

    def caption(self, index: int) -> str:
        """The caption alone, without decoding the image."""
        ...


def decode_image(data: bytes, key: str) -> Image.Image:
    """Encoded bytes to an upright RGB image; transparent parts become white.

    Raises RejectedImage with a short reason: empty, not an image, truncated or broken.
    """
    if not data:
        raise RejectedImage(key, "empty")
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return _on_white(ImageOps.exif_transpose(image))
    except Image.UnidentifiedImageError as error:
        raise RejectedImage(key, "not an image") from error
    except _UNREADABLE as error:
        truncated = "truncated" in str(error)
        raise RejectedImage(key, "truncated" if truncated else f"broken: {error}") from error


def check_member_name(name: str, where: str) -> None:
    """Raises ValueError for a file name inside an archive or metadata file that leads out of it."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or name[1:2] == ":":
        raise ValueError(f"{where} names the file {name!r}, which leads out of it: refused; use plain relative names")


def check_index(index: int, length: int) -> int:
    """A plain index in [0, length), negative ones counted from the end; IndexError otherwise."""
    if not -length <= index < length:
        raise IndexError(f"index {index} is out of range for {length} images")
    return index % length


def _on_white(image: Image.Image) -> Image.Image:
    # Dropping alpha would show whatever colour lies under transparent pixels, often black.
    if image.mode not in ("RGBA", "LA", "PA", "La", "RGBa") and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
