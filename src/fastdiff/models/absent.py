"""Text encoders that a saved pipeline does without."""

from __future__ import annotations

import json
from pathlib import Path


def absent_parts(folder: str | Path) -> dict[str, None]:
    """Arguments of `from_pretrained` for the text encoders that a pipeline folder's model_index.json has null for.

    diffusers saves SD3 without T5 but wants to be told so again when it loads it. Empty for what is no local folder.
    """
    index = Path(folder) / "model_index.json"
    if not index.is_file():
        return {}
    parts = json.loads(index.read_text(encoding="utf-8"))
    text = ("text_encoder", "tokenizer")
    return {name: None for name, part in parts.items() if name.startswith(text) and part == [None, None]}
