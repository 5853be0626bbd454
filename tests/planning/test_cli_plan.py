"""`fastdiff plan`: text, JSON, advice, and errors that say what to do."""

import json
from pathlib import Path

import pytest

from fastdiff.cli import main
from fastdiff.cli.plan import read_size
from fastdiff.planning.blueprint import blueprint_of

RECIPES = Path(__file__).resolve().parents[2] / "training" / "recipes"
RECIPE = """
method: dmd2
pretrained_teacher_model: {teacher}
output_dir: {output}
student: full
fake_score: full
lora_rank: 4
train_batch_size: 2
"""


@pytest.fixture
def recipe(tiny_sd_folder, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(teacher=tiny_sd_folder, output=tmp_path / "run"))
    return path


@pytest.mark.slow
def test_a_plan_that_does_not_fit_says_what_to_change(recipe, capsys, tmp_path):
    assert main(["plan", str(recipe), "--memory", "520MB", "--json"]) == 1
    values = json.loads(capsys.readouterr().out)
    (plan,) = values["plans"]
    assert plan["needed"] > values["memory"]
    assert plan["peak_tensors"] == sum(plan["split"].values())
    saved = [step["saves_about"] for step in values["advice"]]
    assert len(saved) > 1 and saved[0] == max(saved)
    assert values["with_advice"]["needed"] < plan["needed"]
    assert not (tmp_path / "run").exists()  # planning writes nothing


def test_a_plan_that_fits_is_a_table(recipe, capsys):
    assert main(["plan", str(recipe), "--gpus", "4", "--memory", "24GB", "train_batch_size=1"]) == 0
    out = capsys.readouterr().out
    assert "batch 1, 4 device(s)" in out and "fits into 22.35 GiB" in out
    for word in ("frozen weights", "gradients", "optimizer", "activations", "gradient exchange", "student"):
        assert word in out


def test_a_run_on_images_encodes_them_unless_they_are_cached(capsys):
    recipe = str(RECIPES / "embedded" / "lcm.yaml")
    assert main(["plan", recipe, "train_batch_size=2"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-1] == "encode"  # the table's last phase
    assert main(["plan", recipe, "train_batch_size=2", "--cached"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-1] != "encode"


def test_the_flow_teacher_is_planned_from_its_own_network_and_the_other_parts():
    blueprint = blueprint_of("embedded-flow")
    assert blueprint.network["_class_name"] == "SD3Transformer2DModel" and len(blueprint.text_encoders) == 2
    assert blueprint.autoencoder == blueprint_of("embedded").autoencoder


def test_sizes_are_read_in_both_units():
    assert read_size("24GB") == 24 * 10**9
    assert read_size("22.5 GiB") == 22.5 * 2**30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "24"], "such as 24GB"),
        (["--gpus", "0"], "at least 1"),
        (["train_batch_size"], "unknown argument 'train_batch_size'"),
        (["train_batch_sise=1"], "Did you mean 'train_batch_size'"),
        (["--like", "sd9"], "--like flux1dev|pixart_sigma|sd15|sd21|sd35m|sdxl"),
    ],
)
def test_errors_say_what_to_do(recipe, capsys, arguments, message):
    assert main(["plan", str(recipe), *arguments]) == 2
    assert message in capsys.readouterr().err
