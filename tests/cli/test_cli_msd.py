"""Two students as stages of one recipe, and the mixture they are at inference."""

import pytest
import yaml

from fastdiff.cli import main
from fastdiff.recipes.mixture import StudentMixture

pytestmark = pytest.mark.slow


def test_students_are_trained_in_turn_and_serve_their_prompts(tiny_sd_folder, tmp_path):
    words = ["a red apple", "a dog", "blue cat", "one house", "two trees", "x"]
    (tmp_path / "prompts.txt").write_text("\n".join(words) + "\n")
    recipe = {
        "method": "msd",
        "pretrained_teacher_model": str(tiny_sd_folder),
        "data": str(tmp_path / "prompts.txt"),
        "output_dir": str(tmp_path / "out"),
        "students": 2,
        "guidance_scale": 1.0,
        "student_update_every": 1,
        "lora_rank": 2,
        "lora_target_modules": ["to_q"],
        "learning_rate": 1.0e-2,
        "train_batch_size": 2,
        "max_train_steps": 1,
        "validation_samples": 0,
        "report_to": "none",
        "stages": [{"name": f"student-{k}", "student_number": k} for k in range(2)],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["distill", "--config", str(tmp_path / "recipe.yaml")]) == 0
    folders = [tmp_path / "out" / f"stage-{k + 1}-student-{k}" / "student" for k in (1, 0)]
    mixture = StudentMixture(folders, device="cpu")
    served_by = mixture.route(words)
    assert sorted(served_by) == [0, 0, 0, 1, 1, 1]
    assert mixture.route(words[::-1]) == served_by[::-1]
    images = mixture(words, output_type="np")
    assert len(images) == 6 and images[0].shape == (32, 32, 3)
    assert [student.record.recipe["student_number"] for student in mixture.students] == [0, 1]
    with pytest.raises(ValueError, match=r"these are students \[1\]; give every one of 0 to 1"):
        StudentMixture(folders[:1])
    (folders[0] / "router.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="router"):
        StudentMixture(folders)
