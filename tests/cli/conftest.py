"""Runs the command in-process, and makes small data."""

import json
import logging

import pytest
from cli_helpers import SHORT
from PIL import Image

from fastdiff.cli import main


@pytest.fixture(autouse=True)
def _own_logging():
    """The command sets levels of the libraries' loggers; other tests must not notice."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    own = logging.getLogger("fastdiff").level
    yield
    logging.getLogger("fastdiff").setLevel(own)
    for library, level in zip(libraries, levels):
        library.set_verbosity(level)
        library.enable_progress_bar()


@pytest.fixture
def fails(capsys):
    """fails(arguments...) runs a command that must exit with 2 and one line on stderr, which it returns."""

    def run(*arguments, code=2):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == code
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastdiff: error:")]
        assert len(lines) == 1
        return lines[0]

    return run


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red apple\na dog\nblue cat\n")
    return path


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    with (folder / "metadata.jsonl").open("w") as lines:
        for index in range(5):
            Image.new("RGB", (40, 34), (index * 50, 90, 200 - index * 30)).save(folder / f"{index}.png")
            lines.write(json.dumps({"file_name": f"{index}.png", "text": f"thing {index}"}) + "\n")
    return folder


@pytest.fixture(scope="session")
def lora_run(tiny_sd_folder, prompts_file, tmp_path_factory):
    """A finished two-step DMD2 run with LoRA student and fake score."""
    folder = tmp_path_factory.mktemp("runs") / "lora"
    arguments = ["distill", "--teacher", str(tiny_sd_folder), "--prompts", str(prompts_file), "--rank", "4"]
    assert main([*arguments, "--output_dir", str(folder), "--timesteps", "399", *SHORT]) == 0
    return folder
