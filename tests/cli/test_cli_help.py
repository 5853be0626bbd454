"""Help is fast, complete, and imports no torch."""

import json
import subprocess
import sys
import time

import pytest

from fastdiff.cli import VERBS, main
from fastdiff.methods import METHODS
from fastdiff.recipes import sections


def test_help_imports_no_torch_and_takes_no_time():
    code = (
        "import sys, fastdiff.cli as cli\n"
        "for verb in cli.VERBS: cli.main([verb.name, '--help'])\n"
        "cli.main(['--help'])\n"
        "heavy = {'torch', 'diffusers', 'numpy', 'transformers', 'accelerate'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    # All nine pages in one process; on a busy machine the limit leaves room.
    assert seconds < 1.5 * len(VERBS)


@pytest.mark.parametrize("method", [method.info.name for method in METHODS])
def test_help_of_distill_names_every_option(method, capsys):
    assert main(["distill", "--method", method, "--help"]) == 0
    shown = capsys.readouterr().out
    for section in sections(method):
        for option in section.options:
            assert f"--{option.name} " in shown


def test_overview_lists_the_verbs(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {verb.name} " in shown for verb in VERBS)
    assert main([]) == 2


def test_methods_as_json(capsys):
    assert main(["methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in found] == [method.info.name for method in METHODS]
    wanted = {"name", "family", "paper", "arxiv", "needs", "student_kinds", "steps"}
    assert all(wanted <= entry.keys() for entry in found)
    assert main(["methods"]) == 0
    assert "2405.14867" in capsys.readouterr().out


def test_env(capsys):
    assert main(["env"]) == 0
    assert "diffusers: " in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip().count(".") == 2
