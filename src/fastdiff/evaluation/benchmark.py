"""An opened protocol: prompts, extractors and references, loaded and checked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.evaluation.extractors import ClipTower, Extractor, InceptionFeatures
from fastdiff.evaluation.features import ImageFeatures
from fastdiff.evaluation.protocol import Protocol, get_protocol

ASSETS = Path(__file__).resolve().parents[1] / "assets"
MEASURING_TOWER = ASSETS / "towers" / "measuring"
REFERENCES = ASSETS / "references"


@dataclass(frozen=True)
class Benchmark:
    """An opened protocol: everything loaded and checked, ready to score models.

    prompts: n captions; retrieval: (indices into prompts, block of each) or None; diversity: captions or ();
    groups: group caption behind each prompt, for the floor's diversity.
    """

    protocol: Protocol
    prompts: tuple[str, ...]
    extractor: Extractor
    clip: ClipTower | None
    reference: ImageFeatures
    floor: ImageFeatures | None = None
    teacher: ImageFeatures | None = None
    retrieval: tuple[Tensor, Tensor] | None = None
    diversity: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()

    def settings(self) -> dict:
        """What a row stores about its protocol."""
        p = self.protocol
        return {
            "protocol": p.name,
            "n": p.n,
            "resolution": p.resolution,
            "resize": p.resize.name,
            "prompts": p.prompts,
            "extractor": self.extractor.name,
            "extractor_sha256": self.extractor.sha256,
            "clip": self.clip.name if self.clip else None,
            "clip_sha256": self.clip.sha256 if self.clip else None,
            "clip_prefix": p.clip_prefix,
            "reference": p.reference,
            "reference_n": len(self.reference),
            "reference_sha256": self.reference.manifest.get("sha256"),
            "teacher_sha256": self.teacher.manifest.get("sha256") if self.teacher else None,
            "seed": p.seed,
        }


def open_protocol(
    protocol: Protocol | str,
    *,
    prompts: str | Path | None = None,
    reference: str | Path | None = None,
    extractor_weights: str | Path | None = None,
    clip_weights: str | Path | None = None,
    teacher: str | Path | None = None,
) -> Benchmark:
    """Loads what a protocol needs; the arguments give (or replace) files that do not ship with fastdiff.

    Args:
        protocol: a protocol or its name.
        prompts: .txt (one caption a line) or .jsonl (key ``prompt``).
        reference: features (.npz) or a folder of images.
        extractor_weights: Inception weights, or the folder of another measuring tower.
        clip_weights: open_clip checkpoint of ``protocol.clip``; without it there is no CLIP score.
        teacher: features of the teacher's own samples (``teacher_features(...).save``), for ``fid_to_teacher``.

    Raises:
        FileNotFoundError: a needed file was not given or does not exist; the message says what to fetch.
        ValueError: too few prompts, or features made under other settings.
    """
    p = get_protocol(protocol) if isinstance(protocol, str) else protocol
    folder = prompts_folder() if prompts is None and p.prompts else None
    listed = read_prompts(_needed(prompts or (folder and folder / p.prompts), "prompts", p))[: p.n]
    if len(listed) < p.n:
        raise ValueError(
            f"{p.name} needs {p.n} prompts, the list has {len(listed)}; distances at another n do not compare"
        )
    extractor: Extractor
    if p.extractor == "inception":
        extractor = InceptionFeatures(_needed(extractor_weights, "extractor_weights", p))
    else:
        extractor = ClipTower.from_folder(extractor_weights or MEASURING_TOWER)
    if p.extractor_sha256 not in (None, extractor.sha256):
        raise ValueError(
            f"{p.name} is defined by extractor weights {p.extractor_sha256}, got {extractor.sha256}; "
            "other weights make another protocol, which needs another name"
        )
    clip: ClipTower | None = None
    if p.clip == "measuring-tower" and isinstance(extractor, ClipTower):
        clip = extractor
    elif clip_weights is not None:
        clip = ClipTower.from_open_clip(p.clip, clip_weights)
    texts = tuple(line["prompt"] for line in listed)
    return Benchmark(
        protocol=p,
        prompts=texts,
        extractor=extractor,
        clip=clip,
        reference=_reference(_needed(reference or _shipped(p.reference), "reference", p), extractor, p),
        floor=_optional(p.floor, extractor, p),
        teacher=_reference(Path(teacher), extractor, p) if teacher else _optional(p.teacher, extractor, p),
        retrieval=_retrieval(listed, read_prompts(folder / p.retrieval)) if folder and p.retrieval else None,
        diversity=tuple(line["prompt"] for line in read_prompts(folder / p.diversity))
        if folder and p.diversity
        else (),
        groups=tuple(line.get("group", "") for line in listed),
    )


def prompts_folder() -> Path:
    """The prompt lists: inside an installed package, or ``eval/prompts`` of a source tree."""
    packaged = ASSETS / "prompts"
    return packaged if packaged.is_dir() else ASSETS.parents[2] / "eval" / "prompts"


def read_prompts(path: str | Path) -> list[dict]:
    """Lines of a .txt or .jsonl prompt list as dictionaries with the key ``prompt``.

    Raises:
        ValueError: a line that is not JSON with a prompt, or an empty file.
    """
    path, lines = Path(path), []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            lines.append({"prompt": line.strip()})
            continue
        try:
            record = json.loads(line)
            lines.append({**record, "prompt": str(record["prompt"])})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{path}, line {number}: expected JSON with the key "prompt" ({error})') from error
    if not lines:
        raise ValueError(f"{path} holds no prompts; expected one a line")
    return lines


def _needed(value: str | Path | None, argument: str, protocol: Protocol) -> Path:
    if value is None:
        raise FileNotFoundError(f"{protocol.name} needs {argument}, which does not ship. Fetch: {protocol.fetch}")
    if not Path(value).exists():
        raise FileNotFoundError(f"{protocol.name}: {argument} not found at {value}. {protocol.fetch}".strip())
    return Path(value)


def _shipped(name: str | None) -> Path | None:
    return REFERENCES / name if name else None


def _optional(name: str | None, extractor: Extractor, protocol: Protocol) -> ImageFeatures | None:
    """Shipped extra features; absent ones only leave their columns empty."""
    path = _shipped(name)
    return _reference(path, extractor, protocol) if path and path.exists() else None


def _reference(path: Path, extractor: Extractor, protocol: Protocol) -> ImageFeatures:
    if path.is_dir():
        return ImageFeatures.of_folder(path, extractor, protocol.resize)
    return ImageFeatures.load(path, extractor, protocol.resize)


def _retrieval(listed: list[dict], candidates: list[dict]) -> tuple[Tensor, Tensor]:
    """Where each retrieval prompt stands in the main list, and its block: no image is generated twice."""
    position = {_identity(line): index for index, line in enumerate(listed)}
    pairs = [(position[_identity(c)], c["block"]) for c in candidates if _identity(c) in position]
    if len(pairs) < len(candidates):
        raise ValueError(
            f"{len(candidates) - len(pairs)} retrieval prompts are not in the main list; make both lists again"
        )
    indices, blocks = zip(*pairs)
    return torch.tensor(indices), torch.tensor(blocks)


def _identity(line: dict) -> tuple:
    return line["prompt"], line.get("concept"), line.get("style")
