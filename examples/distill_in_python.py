"""Distils a teacher from Python and makes a picture with the student.

python examples/distill_in_python.py [TEACHER] [STEPS]
"""

import sys

import fastdiff


def main(teacher: str = "embedded", steps: int = 20) -> None:
    """A short run on a few prompts: enough to see everything work, not enough for good pictures."""
    student = fastdiff.distill(
        teacher,
        method="dmd2",
        data=["a red apple", "a dog", "a blue bird", "an open book"],
        output_dir="runs/in-python",
        max_train_steps=steps,
        train_batch_size=4,
        timesteps=(399,),
        student_update_every=2,
    )
    print(f"{student.folder}: {student.kind}, times {student.sampler.timesteps}")
    image = student.pipeline()("a red apple", **student.call).images[0]
    image.save(student.folder / "apple.png")


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
