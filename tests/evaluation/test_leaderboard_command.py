"""`eval/leaderboard.py`: which student of a run is scored, what it cost, and which rows are still wanted."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastdiff.evaluation.leaderboard import METRICS
from fastdiff.evaluation.row import Row
from fastdiff.recipes import resolve

ROOT = Path(__file__).resolve().parents[2]
EFFORTS = {
    "stage-1-first": {"network_passes": 100, "seconds": 10.0, "peak_memory_mib": 900.0},
    "stage-2-second": {"network_passes": 30, "seconds": 4.0, "peak_memory_mib": 700.0},
}
STAGED = "method: progressive\nstages:\n  - {name: first, num_inference_steps: 2}\n  - {name: second, num_inference_steps: 1}\n"


@pytest.fixture(scope="module")
def command():
    spec = importlib.util.spec_from_file_location("leaderboard_command", ROOT / "eval" / "leaderboard.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakeStudent:
    """A folder's record; its pipeline is its own name, so that a test sees who was sampled."""

    own = False

    def __init__(self, folder: Path):
        teacher = {"source": "embedded", "fingerprint": "f"}
        effort = EFFORTS[folder.parent.name]
        self.record = SimpleNamespace(method="progressive", kind="full", teacher=teacher, effort=effort)
        self.sampler = type(
            "Sampler", (), {"guidance_scale": 1.0, "__len__": lambda _: 2, "own_steps_only": self.own}
        )()
        self.name, self.folder = folder.parent.name, folder

    def pipeline(self, num_inference_steps):
        return self.name


def row(name: str, calls: float | None) -> Row:
    numbers = dict.fromkeys(METRICS, 1.0) | {"fid": 10.0 * (calls or 0.1)}
    return Row(name=name, network_calls=calls, settings={"protocol": "p"}, **numbers)


@pytest.fixture
def sampled(monkeypatch):
    """What was asked of `evaluate`, with the networks and the pictures left out."""
    asked = []

    def call_settings(folder, steps):
        return {"num_inference_steps": steps, "guidance_scale": 1.0, "eta": 0.3}

    def evaluate(pipeline, benchmark, steps, guidance_scale, name, route, extra):
        assert guidance_scale == 1.0 and extra == {
            "eta": 0.3
        }  # all that the student's sampler wants reaches the pipeline
        asked.append((route([]) if route else pipeline, steps))
        return row(name, float(steps))

    calls = {"floor": None, "teacher": 50.0, "undistilled-1-matched": 1.0, "undistilled-2-matched": 2.0}
    rows = [row(name, count) for name, count in calls.items()]
    monkeypatch.setattr("fastdiff.evaluation.evaluate", evaluate)
    monkeypatch.setattr("fastdiff.recipes.student.call_settings", call_settings)
    monkeypatch.setattr("fastdiff.evaluation.open_protocol", lambda name: name)
    monkeypatch.setattr("fastdiff.evaluation.baselines.load_rows", lambda *_: rows)
    monkeypatch.setattr("fastdiff.recipes.Student", FakeStudent)
    return asked


def entries(command, folders, steps, done=frozenset()):
    arguments = SimpleNamespace(protocol="p", baselines=None, steps=steps)
    return list(command.entries_of(folders, "matched", Path("a.yaml"), 0, ["fastdiff"], arguments, set(done)))


def test_a_staged_run_is_scored_at_its_last_student_and_costs_all_of_its_stages(command, sampled, tmp_path):
    (tmp_path / "a.yaml").write_text(STAGED)
    recipe = resolve({"output_dir": str(tmp_path / "run")}, tmp_path / "a.yaml")
    folders = command.students(recipe, tmp_path / "run")
    assert [folder.relative_to(tmp_path / "run").as_posix() for folder in folders] == [
        "stage-1-first/student",
        "stage-2-second/student",
    ]
    (found,) = entries(command, folders, None)
    assert sampled == [("stage-2-second", 2)]
    assert (found.train_network_passes, found.train_seconds, found.peak_memory_mib) == (130, 14.0, 900.0)


def test_an_earlier_stage_costs_what_led_to_it(command, sampled, tmp_path):
    (tmp_path / "a.yaml").write_text(STAGED)
    recipe = resolve({"output_dir": str(tmp_path / "run")}, tmp_path / "a.yaml")
    (found,) = entries(command, command.students(recipe, tmp_path / "run", "first"), [2])
    assert sampled == [("stage-1-first", 2)]
    assert (found.train_network_passes, found.train_seconds) == (100, 10.0)
    with pytest.raises(SystemExit, match="--stage third: the recipe's stages are first, second"):
        command.students(recipe, tmp_path / "run", "third")


def test_weights_that_hold_their_own_steps_are_exported_for_others(command, sampled, tmp_path, monkeypatch):
    def export_checkpoint(run, output, num_inference_steps):
        assert output == run / f"student-{num_inference_steps}-steps"
        return SimpleNamespace(
            folder=output, pipeline=lambda num_inference_steps: f"{run.name} exported for {num_inference_steps}"
        )

    monkeypatch.setattr(FakeStudent, "own", True)
    monkeypatch.setattr("fastdiff.recipes.reexport.export_checkpoint", export_checkpoint)
    entries(command, [tmp_path / "stage-1-first" / "student"], [1, 2])
    assert sampled == [("stage-1-first exported for 1", 1), ("stage-1-first", 2)]


def test_a_run_without_stages_has_one_student(command, tmp_path):
    recipe = resolve({"method": "dmd2", "output_dir": str(tmp_path)}, None)
    assert command.students(recipe, tmp_path) == [tmp_path / "student"]


def test_students_that_share_the_prompts_are_scored_together(command, sampled, tmp_path, monkeypatch):
    class FakeMixture:
        def __init__(self, folders):
            self.names = [folder.parent.name for folder in folders]

        def pipeline(self, number):
            return self.names[number]

        def pipelines(self, prompts):
            return self.names

    monkeypatch.setattr("fastdiff.recipes.mixture.StudentMixture", FakeMixture)
    folders = [tmp_path / name / "student" for name in EFFORTS]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "router.safetensors").touch()
    (found,) = entries(command, folders, [1])
    assert sampled == [(list(EFFORTS), 1)]
    assert found.train_network_passes == 130


def test_rows_that_are_there_are_not_scored_again(command, sampled, tmp_path):
    folders = [tmp_path / name / "student" for name in EFFORTS]
    found = entries(command, folders, [1, 2], done={("a", 0, 1)})
    assert [entry.network_calls for entry in found] == [2]
    assert sampled == [("stage-2-second", 2)]


@pytest.mark.parametrize(
    ("steps", "expected"), [(None, True), ([1], True), ([1, 4], False)], ids=["any", "there", "one is missing"]
)
def test_a_recipe_is_finished_when_all_wanted_rows_are_there(command, steps, expected):
    assert command.finished({("a", 0, 1)}, "a", 0, steps) is expected
    assert not command.finished({("a", 0, 1)}, "a", 1, steps)
