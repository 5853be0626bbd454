"""Checkpoints: safetensors and JSON only, whole or absent, and exact to the bit on resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastdiff.engine.files import whole_folder, write_json

STATE = "state.json"


class Checkpointable(Protocol):
    """What can be saved: named groups of tensors, and JSON values."""

    def tensor_groups(self) -> dict[str, Mapping[str, Tensor]]: ...

    def json_state(self) -> dict[str, Any]: ...

    def load_state(self, tensors: dict[str, Mapping[str, Tensor]], values: dict[str, Any]) -> None: ...


class OnDisk(Mapping[str, Tensor]):
    """Tensors of a file, each read when it is asked for: a process that holds a part never has the whole."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, "pt")
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Checkpoints:
    """The `checkpoints/` folder of a run: `step-N/{student,fake_score,...}.safetensors` and `state.json`."""

    def __init__(self, folder: Path, total_limit: int | None) -> None:
        self.folder = folder
        self.total_limit = total_limit

    def save(self, run: Checkpointable, name: str) -> Path:
        """Writes `folder/name` and drops the oldest numbered checkpoints above the limit.

        Raises:
            OSError: if it cannot be written, e.g. on a full disk; earlier checkpoints stay.
        """
        target = self.folder / name
        groups = run.tensor_groups()
        with whole_folder(target) as aside:
            for group, tensors in groups.items():
                _save(tensors, aside / f"{group}.safetensors")
            write_json(aside / STATE, run.json_state() | {"groups": sorted(groups)})
        self._drop_old()
        return target

    def remove(self, name: str) -> None:
        """Deletes `folder/name`."""
        shutil.rmtree(self.folder / name)

    def load(self, run: Checkpointable, folder: Path) -> None:
        """Restores a run.

        Raises:
            FileNotFoundError: if the folder is not a complete checkpoint.
            ValueError: if it belongs to another method or teacher.
        """
        values = self.read_state(folder)
        missing = [group for group in values["groups"] if not (folder / f"{group}.safetensors").is_file()]
        if missing:
            raise FileNotFoundError(f"checkpoint {folder} lacks {missing[0]}.safetensors; resume from another one.")
        run.load_state({group: OnDisk(folder / f"{group}.safetensors") for group in values["groups"]}, values)

    def read_state(self, folder: Path) -> dict[str, Any]:
        """The JSON part of a checkpoint."""
        try:
            return json.loads((folder / STATE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{folder} is not a checkpoint of this program: it has no {STATE}. Give 'latest' or a folder "
                f"checkpoints/step-N of this run."
            ) from None

    def numbered(self) -> list[Path]:
        """Complete step checkpoints, oldest first."""
        found = [path for path in self.folder.glob("step-*") if path.name[5:].isdigit() and (path / STATE).is_file()]
        return sorted(found, key=lambda path: int(path.name[5:]))

    def find(self, wanted: str) -> Path | None:
        """The folder that `--resume_from_checkpoint` means; None for `latest` in a run without checkpoints."""
        if wanted == "latest":
            return self.numbered()[-1] if self.numbered() else None
        path = Path(wanted)
        return path if path.is_absolute() or path.exists() else self.folder / wanted

    def _drop_old(self) -> None:
        if self.total_limit is None:
            return
        for path in self.numbered()[: -self.total_limit or None]:
            shutil.rmtree(path)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(
            f"checkpoint {path.parent.name} could not be written ({error}). Free some space or give another "
            "--output_dir; earlier checkpoints are whole."
        ) from error
