"""What a training run reads: prompts, captioned images, or cached tensors, behind one small protocol."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch.utils.data import default_collate

from fastdiff.data.cache import CacheReader
from fastdiff.data.images import ImageExample, ImageSource, check_index
from fastdiff.data.rejects import Reject, RejectedImage, Rejects, TooManyRejects
from fastdiff.data.sampler import Visit
from fastdiff.data.transform import ImageTransform, visit_rng

_TRIES = 64


class TrainingData(Protocol):
    """A dataset for torch's DataLoader: `DataLoader(data, batch_sampler=StepBatches(...), collate_fn=data.collate)`.

    `data[i]` takes an item number or a `Visit` (random crops differ from epoch to epoch) and gives a dict with at
    least `prompt: str`; `collate` turns a list of these into a batch with `prompt: list[str]`. Picklable for workers.
    """

    rejects: Rejects

    def __len__(self) -> int: ...

    def __getitem__(self, index: int | Visit) -> dict[str, Any]: ...

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]: ...

    def caption(self, index: int) -> str:
        """The prompt alone, without reading what belongs to it."""
        ...


class PromptData:
    """Prompts only. Item: {prompt}. Raises ValueError when there are none."""

    def __init__(self, prompts: Sequence[str]):
        if not len(prompts):
            raise ValueError("no prompts were given: expected at least one")
        self.prompts = prompts
        self.rejects = Rejects(len(prompts), source="the prompts")

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int | Visit) -> dict[str, Any]:
        return {"prompt": self.prompts[_visit(index).item]}

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """{prompt: list of B strings}."""
        return _collate(items)

    def caption(self, index: int) -> str:
        """The prompt."""
        return self.prompts[index]


class ImageTextData:
    """Captioned images. Item: {image: float32 (3, H, W) in [-1, 1], prompt, rejected}.

    An image that cannot be decoded is replaced by the next readable one, always the same, and named in `rejected`;
    worker processes cannot count for the main one, so the loop calls `data.rejects.absorb(batch["rejected"])`, which
    raises TooManyRejects above the source's share. Crops and flips follow from (seed, epoch, item) alone.

    Raises TooManyRejects at once when none of the first images is readable.
    """

    def __init__(self, images: ImageSource, transform: ImageTransform, seed: int = 0):
        self.images = images
        self.transform = transform
        self.seed = seed
        self.rejects = images.rejects
        if not len(images):
            raise TooManyRejects(f"no usable image is left: {self.rejects.summary()}")
        self._readable(0)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int | Visit) -> dict[str, Any]:
        item, epoch = _visit(index)
        item = check_index(item, len(self))
        example, rejected = self._readable(item)
        image = self.transform(example.image, visit_rng(self.seed, epoch, item))
        return {"image": image, "prompt": example.caption, "rejected": rejected}

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """{image: (B, 3, H, W), prompt: list of B strings, rejected: list of Reject}."""
        rejected = [reject for item in items for reject in item["rejected"]]
        kept = [{name: value for name, value in item.items() if name != "rejected"} for item in items]
        return {**_collate(kept), "rejected": rejected}

    def caption(self, index: int) -> str:
        """The caption of the image, which is not read."""
        return self.images.caption(index)

    def _readable(self, item: int) -> tuple[ImageExample, list[Reject]]:
        rejected: list[Reject] = []
        for ahead in range(min(_TRIES, len(self))):
            try:
                return self.images[(item + ahead) % len(self)], rejected
            except RejectedImage as error:
                rejected.append(error.reject)
        named = ", ".join(f"{key} ({reason})" for key, reason in rejected[:5])
        raise TooManyRejects(f"{len(rejected)} images in a row cannot be read: {named}, ...; repair or remove them")


class CachedData:
    """Precomputed tensors. Item: {prompt, and the cache's fields such as latents, prompt_embeds, noise}."""

    def __init__(self, reader: CacheReader):
        self.reader = reader
        self.rejects = Rejects(len(reader), source=str(reader.folder))

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int | Visit) -> dict[str, Any]:
        record = self.reader[_visit(index).item]
        return {**record.tensors, "prompt": record.caption}

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """{prompt: list of B strings, each field: (B, *shape)}."""
        return _collate(items)

    def caption(self, index: int) -> str:
        """The caption."""
        return self.reader.caption(index)


class ChosenData:
    """Some samples of other data, by their numbers. Raises ValueError when there are none."""

    def __init__(self, data: TrainingData, items: Sequence[int]):
        if not len(items):
            raise ValueError(f"none of the {len(data)} samples is left to train on")
        self.data = data
        self.items = items
        self.rejects = data.rejects
        self.collate = data.collate

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int | Visit) -> dict[str, Any]:
        visit = _visit(index)
        return self.data[Visit(self.items[visit.item], visit.epoch)]

    def caption(self, index: int) -> str:
        """The prompt."""
        return self.data.caption(self.items[index])


class Captions(Sequence):
    """The captions of an image source as prompts; no image is decoded."""

    def __init__(self, images: ImageSource):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> str:
        return self.images.caption(index)


def _visit(index: int | Visit) -> Visit:
    return index if isinstance(index, Visit) else Visit(index, 0)


def _collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    # torch's own collation: in a worker it stacks straight into shared memory; strings stay lists.
    return default_collate(items)


__all__ = ["CachedData", "Captions", "ChosenData", "ImageTextData", "PromptData", "TrainingData"]
