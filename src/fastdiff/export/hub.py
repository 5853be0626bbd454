"""Uploads a student folder to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from fastdiff.export.card import CARD_FILE

IGNORED = ("step_*", "epoch_*", "checkpoint-*", "checkpoints/*", "logs/*", ".*.partial*")


def push_to_hub(
    folder: str | Path, repo_id: str, token: str | None = None, private: bool = False, endpoint: str | None = None
) -> str:
    """Creates the repository if needed and uploads the folder in one commit.

    Args:
        folder: a student folder with its README.md.
        repo_id: "user/name" on the Hub.
        token: access token; None uses the one that is logged in.
        private: visibility of a repository that is created now.
        endpoint: of another Hub than huggingface.co.

    Returns:
        The URL of the commit.

    Raises:
        FileNotFoundError: if there is no card.
        ValueError: if the card names no licence, or the Hub finds its metadata invalid; nothing is uploaded then.
    """
    from huggingface_hub import HfApi, ModelCard

    folder = Path(folder)
    if not (folder / CARD_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no {CARD_FILE}; write the model card before pushing.")
    card = ModelCard.load(folder / CARD_FILE)
    if not card.data.license:
        raise ValueError(
            f"{folder / CARD_FILE} names no licence, and the teacher's could not be found. Students are derivatives of "
            "their teacher: give the licence (--license), then push again."
        )
    api = HfApi(endpoint=endpoint, token=token)
    repository = api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        folder_path=folder,
        repo_id=repository.repo_id,
        commit_message="End of training",
        ignore_patterns=list(IGNORED),
    )
    return commit.commit_url
