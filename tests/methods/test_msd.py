"""MSD (arXiv 2410.23274): one student is DMD2, several share out the conditions, small ones start from the scores."""

from __future__ import annotations

import copy

import pytest
import torch
from method_helpers import (
    SD,
    AffineGenerator,
    CleanMap,
    batch_of,
    context,
    denoiser_of,
    f64,
    run,
    sigma_points,
    spatial,
)
from torch import nn

from fastdiff.data.source import PromptData
from fastdiff.diffusion import Gaussian
from fastdiff.engine import Settings, Trainer, chosen_data
from fastdiff.methods import (
    DMD2,
    METHODS,
    MSD,
    Batch,
    DMD2Config,
    MSDConfig,
    ScoreMatching,
    ScoreMatchingConfig,
    SiD,
    SwiftBrush,
)
from fastdiff.methods._routed_student import RoutedStudent
from fastdiff.models.analytic import AnalyticTeacher, ExactNetwork
from fastdiff.models.teacher import Teacher
from fastdiff.recipes.starting import start_from

MEANS = f64([[3.0, 3.0], [-3.0, 3.0], [3.0, -3.0], [-3.0, -3.0]])
COVS = torch.stack([scale * torch.eye(2).double() for scale in (0.3, 0.6, 0.9, 0.2)])


def method(**config) -> MSD:
    return MSD(MSDConfig(**{"guidance_scale": 1.0} | config))


def mixture():
    return AnalyticTeacher.mixture([1.0] * 4, MEANS, COVS)


def settings_of(folder, **changes) -> Settings:
    defaults = {
        "output_dir": str(folder),
        "max_train_steps": 3,
        "train_batch_size": 4,
        "student": "full",
        "fake_score": "full",
        "learning_rate": 1e-2,
        "report_to": "none",
    }
    return Settings(**(defaults | changes))


def prompts(count=4, each=3):
    return PromptData([f"component {k}" for k in range(count)] * each)


def trainer_of(rule, folder, teacher=None, data=None, **changes) -> Trainer:
    settings, teacher = settings_of(folder, **changes), teacher or mixture()
    return Trainer(rule, teacher, chosen_data(rule, data or prompts(), teacher, settings), settings)


# One student


def test_one_student_is_dmd2_to_the_bit(tmp_path):
    config = {"guidance_scale": 1.0, "student_update_every": 2}
    trainers = [
        trainer_of(MSD(MSDConfig(students=1, **config)), tmp_path / "a"),
        trainer_of(DMD2(DMD2Config(**config)), tmp_path / "b"),
    ]
    for trainer in trainers:
        trainer.train()
    a, b = ({**trainer.tensor_groups()} for trainer in trainers)
    assert a.keys() == b.keys() and "method" not in a
    assert all(torch.equal(a[group][name], b[group][name]) for group in a for name in a[group])


# The parts


@pytest.mark.parametrize(("students", "items"), [(4, 12), (3, 12), (2, 12)])
def test_every_sample_has_exactly_one_student(students, items, tmp_path):
    data, teacher = prompts(), mixture()
    chosen = []
    for number in range(students):
        part = chosen_data(method(students=students, student_number=number), data, teacher, settings_of(tmp_path))
        captions = {part[i]["prompt"] for i in range(len(part))}
        assert captions == {part.caption(i) for i in range(len(part))}
        chosen.append((captions, len(part)))
    captions = [caption for part, _ in chosen for caption in part]
    assert sorted(captions) == sorted(set(captions)) == [f"component {k}" for k in range(4)]
    assert sum(size for _, size in chosen) == items
    sizes = [len(part) for part, _ in chosen]
    assert max(sizes) - min(sizes) <= 1


def test_text_is_routed_by_its_embedding(tiny_sd, tmp_path):
    words = [f"{colour} {thing}" for colour in ("red", "blue", "pale") for thing in ("apple", "dog", "x", "house")]
    teacher, settings = Teacher(tiny_sd, "tiny"), settings_of(tmp_path)
    parts = []
    for number in range(4):
        part = chosen_data(method(student_number=number), PromptData(words), teacher, settings)
        parts.append({part.caption(i) for i in range(len(part))})
    assert sorted(len(part) for part in parts) == [3, 3, 3, 3]
    assert set.union(*parts) == set(words)


def test_a_run_sees_its_own_conditions_only(tmp_path):
    rule = method(student_number=2)
    trainer = trainer_of(rule, tmp_path, data=prompts(each=5))
    (batches,) = list(trainer.batches.steps(2))
    assert set(batches[0].cond.tensors["labels"].tolist()) == {2}
    assert set(trainer.method.export_files()) == {"router"}


def test_students_of_one_seed_draw_for_themselves(tmp_path):
    """The first draws as DMD2 does; the second something else, at the same step and place."""

    def drawn(rule):
        trainer, seen = trainer_of(rule, tmp_path / rule.info.name, seed=5), []

        def student_loss(batch, ctx):
            seen.append(ctx.random.normal("z", (3,)))
            return {"none": 0 * sum(p.sum() for p in trainer.networks.parameters("student"))}

        rule.student_loss = student_loss
        trainer.train_step(next(trainer.batches.steps(0)))
        return seen[0]

    plain, first, second = (
        drawn(r) for r in (DMD2(DMD2Config(guidance_scale=1.0)), method(), method(student_number=1))
    )
    assert torch.equal(plain, first) and (first - second).abs().min() > 1e-3


def test_data_that_nobody_chose_are_refused(tmp_path):
    rule = method()
    with pytest.raises(ValueError, match="chosen_data"):
        Trainer(rule, mixture(), prompts(), settings_of(tmp_path)).train()


def test_the_router_is_kept_and_checked_on_resume(tmp_path):
    trainer_of(method(), tmp_path).train()
    again = trainer_of(method(), tmp_path, resume_from_checkpoint="latest", max_train_steps=4)
    assert again.train() == "done"
    other = trainer_of(method(students=2), tmp_path, resume_from_checkpoint="latest", max_train_steps=5)
    with pytest.raises(ValueError, match="splits the conditions differently"):
        other.train()
    bare = method()
    bare.load_state_dict(again.method.state_dict())  # without data, as for an export
    assert bare.export_files()["router"].keys() == {"directions", "thresholds", "children"}


ROUTED = [cls for cls in METHODS if issubclass(cls, RoutedStudent)]


@pytest.mark.parametrize("cls", ROUTED, ids=lambda cls: cls.info.name)
def test_every_method_of_scores_can_have_several_students(cls, tmp_path):
    rule = cls(cls.Config(students=2, student_number=1))
    part = chosen_data(rule, prompts(), mixture(), settings_of(tmp_path))
    assert {part.caption(i) for i in range(len(part))} == {"component 2", "component 3"}
    assert set(rule.export_files()) == {"router"}
    again = cls(rule.config)
    with pytest.raises(ValueError, match="chosen_data"):
        again.check_ready()
    again.load_state_dict(rule.state_dict())
    again.check_ready()
    assert torch.equal(again.state_dict()["router.directions"], rule.state_dict()["router.directions"])


def test_which_methods_are_methods_of_scores():
    families = {"distribution matching", "Fisher divergence"}
    assert {cls.info.name for cls in METHODS if cls.info.family in families} - {"score_matching"} <= {
        cls.info.name for cls in ROUTED
    }


@pytest.mark.parametrize("cls", [SwiftBrush, SiD])
def test_students_of_other_methods_train_on_their_own_parts(cls, tmp_path):
    rule, settings = cls(cls.Config(students=2, student_number=1, guidance_scale=1.0)), settings_of(tmp_path)
    part = chosen_data(rule, prompts(), mixture(), settings)
    assert Trainer(rule, mixture(), part, settings).train() == "done"


# Small students


SMALL = {"student_layers_per_block": 1, "student_removed_levels": (1,)}


class Latents(PromptData):
    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(
            getattr(index, "item", index) if not isinstance(index, int) else index
        )
        return super().__getitem__(index) | {"latents": torch.randn(4, 16, 16, generator=generator)}


def test_scores_are_matched_first_and_start_student_and_fake_score(tiny_sd, tmp_path):
    teacher, words = Teacher(tiny_sd, "tiny"), ["a red apple", "a dog", "blue cat"]
    first = trainer_of(
        ScoreMatching(ScoreMatchingConfig(**SMALL)), tmp_path / "1", teacher, Latents(words), max_train_steps=2
    )
    first.train()
    fitted = first.networks.roles.state_dict("student")
    sizes = sum(t.numel() for t in fitted.values()), sum(p.numel() for p in tiny_sd.unet.parameters())
    assert sizes[0] < 0.7 * sizes[1]

    second = trainer_of(
        method(students=1, **SMALL), tmp_path / "2", Teacher(copy.deepcopy(tiny_sd), "tiny"), PromptData(words),
        max_train_steps=1, train_batch_size=2,
    )  # fmt: skip
    start_from(second, str(tmp_path / "1"))
    for role in ("student", "fake_score"):
        own = second.networks.roles.state_dict(role)
        assert own.keys() == fitted.keys() and all(torch.equal(own[name], fitted[name]) for name in own)
    second.train()
    third = trainer_of(
        method(students=1, **SMALL), tmp_path / "3", Teacher(copy.deepcopy(tiny_sd), "tiny"), PromptData(words)
    )
    start_from(third, str(tmp_path / "2"))  # a later stage goes on with both
    for role in ("student", "fake_score"):
        own, theirs = third.networks.roles.state_dict(role), second.networks.roles.state_dict(role)
        assert all(torch.equal(own[name], theirs[name]) for name in own)


def test_a_small_student_may_have_a_fake_score_of_adapters(tiny_sd, tmp_path):
    teacher, words = Teacher(tiny_sd, "tiny"), ["a red apple", "a dog", "blue cat"]
    first = trainer_of(
        ScoreMatching(ScoreMatchingConfig(**SMALL)), tmp_path / "1", teacher, Latents(words), max_train_steps=1
    )
    first.train()
    trainer = trainer_of(
        method(students=1, **SMALL), tmp_path / "2", Teacher(copy.deepcopy(tiny_sd), "tiny"), PromptData(words),
        fake_score="lora", lora_rank=2, max_train_steps=1, train_batch_size=2,
    )  # fmt: skip
    start_from(trainer, str(tmp_path / "1"))
    roles = trainer.networks.roles
    assert roles.is_adapter("fake_score") and not roles.is_adapter("student")
    assert all(not p.any() for name, p in roles.named_parameters("fake_score") if ".lora_B." in name)  # the teacher
    trainer.train()


def test_small_students_are_full(tiny_sd, tmp_path):
    with pytest.raises(ValueError, match="another size"):
        trainer_of(method(students=1, **SMALL), tmp_path, Teacher(tiny_sd, "tiny"), student="lora")
    with pytest.raises(ValueError, match="UNet2DConditionModel"):
        trainer_of(method(students=1, **SMALL), tmp_path)


def test_score_matching_regresses_the_teachers_own_prediction():
    """Zero, with zero gradient, at the teacher; else the mean square of the gap. The teacher is not trained."""
    mu, cov = f64([0.7, -0.4]), f64([[0.64, 0.2], [0.2, 0.5]])
    points = sigma_points(4)
    t = torch.full((len(points),), 400)
    alpha, sigma = SD.alpha(t[0].double()), SD.sigma(t[0].double())
    gain = alpha * cov @ torch.linalg.inv(alpha**2 * cov + sigma**2 * torch.eye(2).double())
    for shift in (0.0, 0.1):
        student = AffineGenerator(gain, mu - alpha * gain @ mu + shift)
        denoiser = denoiser_of(ExactNetwork(Gaussian(mu, cov), SD, "epsilon"), student=student)
        batch = batch_of(len(points), 2, latents=spatial(points[:, :2]).double())
        ctx = context(denoiser, len(points), {"t": t, "eps": spatial(points[:, 2:])})
        loss = ScoreMatching(ScoreMatchingConfig()).student_loss(batch, ctx)["score_matching"]
        assert loss.item() == pytest.approx((alpha / sigma * shift).item() ** 2, abs=1e-12)
        loss.backward()
        assert (student.b.grad.abs().max() < 1e-10) == (shift == 0)
    assert ScoreMatching(ScoreMatchingConfig()).needs() == "images"


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"students": 0}, "students"),
        ({"students": 2, "student_number": 2}, "student_number"),
        ({"student_number": -1}, "student_number"),
        ({"student_width": 0.0}, "width"),
        ({"student_removed_levels": (-2,)}, "removed_levels"),
    ],
)
def test_bad_settings_are_named(config, named):
    with pytest.raises(ValueError, match=named):
        method(**config)


# Convergence


class GeneratorPerClass(CleanMap):
    """x0 = A_c z + b_c for the label c."""

    def __init__(self, classes):
        super().__init__(SD, "epsilon")
        self.A = nn.Parameter(torch.eye(2).double().repeat(classes, 1, 1))
        self.b = nn.Parameter(torch.zeros(classes, 2).double())

    def x0(self, x, time, labels):
        return torch.einsum("bij,bj->bi", self.A[labels], x.double()) + self.b[labels]


class OraclePerClass(CleanMap):
    """The exact denoiser of the law that the generator gives each label now."""

    def __init__(self, generator):
        super().__init__(SD, "epsilon")
        self.generator = (generator,)

    def x0(self, x, time, labels):
        (generator,) = self.generator
        factor, mean = generator.A.detach()[labels], generator.b.detach()[labels]
        alpha, sigma = SD.levels(time, x)
        cov = factor @ factor.mT
        noisy = alpha[:, :, None] ** 2 * cov + sigma[:, :, None] ** 2 * torch.eye(2).double()
        return mean + alpha * (cov @ torch.linalg.solve(noisy, (x - alpha * mean)[:, :, None])).squeeze(-1)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_each_student_reaches_the_moments_of_its_classes_and_of_no_other(number, tmp_path):
    """A mixture teacher of four classes, two students: the data say which classes a student ever sees."""
    teacher, steps = mixture(), 400
    rule = method(students=2, student_number=number, student_update_every=1)
    part = chosen_data(rule, prompts(each=8), teacher, settings_of(tmp_path))
    cond = teacher.encode([part.caption(i) for i in range(len(part))], 1)
    batch = Batch(torch.arange(len(part)), cond, teacher.null(1), (2, 1, 1))
    student = GeneratorPerClass(4)
    denoiser = denoiser_of(teacher.network, student=student, fake_score=OraclePerClass(student))
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    run(rule, denoiser, {"student": optimizer}, batch, steps, lambda step: decay.step())
    reached = [
        (student.b[c] - MEANS[c]).abs().max() < 1e-2 and (student.A[c] @ student.A[c].T - COVS[c]).abs().max() < 1e-2
        for c in range(4)
    ]
    assert reached == [c // 2 == number for c in range(4)]
    others = [c for c in range(4) if c // 2 != number]
    assert torch.equal(student.b[others], torch.zeros(2, 2).double())
