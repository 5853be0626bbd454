"""DisBack (arXiv 2408.15991): the path, the exact steps of its switches, and what it ends in."""

from __future__ import annotations

import copy

import pytest
import torch
from method_helpers import SD, AffineGenerator, batch_of, context, denoiser_of, f64, run, sigma_points, spatial
from torch import nn

from fastdiff.data.source import PromptData
from fastdiff.diffusion import Gaussian
from fastdiff.engine import Settings, Trainer
from fastdiff.methods import DMD2, DisBack, DisBackConfig, DMD2Config, method_named
from fastdiff.methods.disback import RECORDED
from fastdiff.models.analytic import AnalyticTeacher, ExactNetwork
from fastdiff.models.teacher import Teacher

MU, COV = f64([0.7, -0.4]), f64([[0.64, 0.2], [0.2, 0.5]])
SMALL = {"guidance_scale": 1.0, "student_update_every": 2, "degradation_steps": 6, "path_nodes": 3}


def method(**config) -> DisBack:
    return DisBack(DisBackConfig(**(SMALL | {"backtracking_interval": 2} | config)))


class GaussianScore(nn.Module):
    """The exact denoiser of N(mean, root root^T), whose moments are the weights."""

    def __init__(self, mean, root) -> None:
        super().__init__()
        self.mean, self.root = nn.Parameter(mean.clone()), nn.Parameter(root.clone())

    def forward(self, x_t, time, labels):
        flat, (alpha, sigma) = x_t.flatten(1), SD.levels(time, x_t.flatten(1))
        cov = self.root @ self.root.T
        noisy = alpha[:, :, None] ** 2 * cov + sigma[:, :, None] ** 2 * torch.eye(len(cov)).double()
        moved = torch.linalg.solve(noisy, (flat - alpha * self.mean)[:, :, None]).squeeze(-1)
        return (sigma * moved).reshape(x_t.shape)  # eps = -sigma * score

    def enable_gradient_checkpointing(self, _function):
        pass


def root(cov):
    values, basis = torch.linalg.eigh(cov)
    return basis @ values.sqrt().diag() @ basis.T


def gaussian_denoiser(student, fake=None):
    """Teacher N(MU, COV); fake score and recorded score are exact denoisers of laws that are their weights."""
    fake = fake or GaussianScore(MU, root(COV))
    roles = {"student": student, "fake_score": fake, RECORDED: copy.deepcopy(fake)}
    return denoiser_of(ExactNetwork(Gaussian(MU, COV), SD, "epsilon"), **roles)


def trainer_of(teacher, rule, folder, steps, **settings) -> Trainer:
    """A run of adapters on a diffusers teacher, or of small full networks on a closed form."""
    lora = teacher.adaptable
    defaults = {
        "output_dir": str(folder),
        "max_train_steps": steps,
        "train_batch_size": 2,
        "student": "lora" if lora else "full",
        "fake_score": "lora" if lora else "full",
        "lora_rank": 4,
        "lora_target_modules": ("to_q", "conv1"),
        "learning_rate": 1e-2,
        "report_to": "none",
        "checkpointing_steps": 1000,
        "validation_steps": 1000,
    }
    data = PromptData(["a sample"] * 6)
    return Trainer(rule, teacher, data, Settings(**(defaults | settings)))


def gaussian():
    return AnalyticTeacher.gaussian(MU, COV)


@pytest.fixture
def diffusers_teacher(tiny_sd):
    return Teacher(tiny_sd, "tiny")


def tensors(trainer):
    groups = trainer.tensor_groups()
    return {f"{group}/{name}": t.detach().clone() for group, found in groups.items() for name, t in found.items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


# The order of things


def test_without_a_path_it_is_dmd2_to_the_bit(tmp_path):
    config = {"guidance_scale": 1.5, "student_update_every": 2}
    runs = [DisBack(DisBackConfig(path_nodes=0, **config)), DMD2(DMD2Config(**config))]
    trainers = [trainer_of(gaussian(), rule, tmp_path / str(n), 3) for n, rule in enumerate(runs)]
    assert [trainer.train() for trainer in trainers] == ["done", "done"]
    assert_equal(*map(tensors, trainers))


def test_nodes_are_recorded_and_walked_back_at_exact_steps():
    """10 nodes in 1000 steps, as published: recorded every 100, the target moves every 1000, from 9 to 0."""
    rule = DisBack(DisBackConfig())
    assert rule.recording_steps == 1000
    nodes = [rule.node(step) for step in range(1000, 13_000)]
    switches = [1000 + i for i in range(1, len(nodes)) if nodes[i] != nodes[i - 1]]
    assert nodes[0] == 9 and nodes[-1] == 0
    assert switches == [2000, 3000, 4000, 5000, 6000, 7000, 8000, 9000, 10000]
    assert [nodes[step - 1000] for step in switches] == [8, 7, 6, 5, 4, 3, 2, 1, 0]
    names = [[update.name for update in rule.updates(step)] for step in (0, 999, 1000, 1001, 1010)]
    assert names == [["fake_score"], ["fake_score"], ["student", "fake_score"], ["fake_score"], names[2]]


def test_the_path_through_a_run_of_adapters(diffusers_teacher, tmp_path):
    """Recorded at steps 2 and 4 of 6; then node 2, node 1 and the teacher are asked, for two steps each."""
    rule = method()
    trainer = trainer_of(diffusers_teacher, rule, tmp_path, 12)
    roles, denoiser = trainer.networks.roles, trainer.networks.denoiser
    fake, asked, kept = {}, [], {}
    together, step = denoiser.together, trainer.train_step

    def watch_asks(x_t, t, asks):
        weights = [p.detach().clone() for p in roles.parameters(RECORDED)] if asks[0].role == RECORDED else None
        asked.append((trainer.step, [ask.role for ask in asks], weights))
        return together(x_t, t, asks)

    def watch_steps(batches):
        fake[trainer.step] = [p.detach().clone() for p in roles.parameters("fake_score")]
        if trainer.step == 6:
            kept.update({node: list(weights) for node, weights in rule._path.items()})
            assert all(p.grad is None for p in roles.parameters("student"))
        step(batches)

    denoiser.together, trainer.train_step = watch_asks, watch_steps
    untrained = [p.detach().clone() for p in roles.parameters("student")]
    assert trainer.train() == "done"

    assert sorted(kept) == [1, 2] and all(name.endswith(f".{RECORDED}.weight") for name in kept[1])
    assert [(at, names[0]) for at, names, _ in asked] == [(6, RECORDED), (8, RECORDED), (10, "teacher")]
    assert all(names[1] == "fake_score" for _, names, _ in asked)
    for at, recorded_at in ((0, 4), (1, 2)):  # node 2 was kept before step 4, node 1 before step 2
        assert all(torch.equal(a, b) for a, b in zip(asked[at][2], fake[recorded_at], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(fake[2], fake[4], strict=True))
    assert not roles.parts("teacher")  # the last target has no adapter at all: it is the base
    assert not any("method" in group for group in trainer.tensor_groups())  # nothing is kept that is not needed
    moved = [not torch.equal(a, b) for a, b in zip(untrained, roles.parameters("student"), strict=True)]
    assert any(moved)


def test_the_student_rests_while_the_path_is_recorded(tmp_path):
    trainer = trainer_of(gaussian(), method(), tmp_path, 6)
    before = [p.detach().clone() for p in trainer.networks.roles.parameters("student")]
    fake = [p.detach().clone() for p in trainer.networks.roles.parameters("fake_score")]
    trainer.train()
    roles = trainer.networks.roles
    assert all(torch.equal(a, b) for a, b in zip(before, roles.parameters("student"), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(fake, roles.parameters("fake_score"), strict=True))


@pytest.mark.parametrize("stop", [3, 7, 9])
def test_resuming_in_either_stage_gives_the_straight_run(tmp_path, stop):
    straight = trainer_of(gaussian(), method(), tmp_path / "straight", 10)
    straight.train()
    first = trainer_of(gaussian(), method(), tmp_path / "cut", 10, checkpointing_steps=stop)
    save, saved = first.save, []

    def once(name=None):
        save(name)
        saved.append(name)
        if first.step == stop:
            raise KeyboardInterrupt

    first.save = once
    with pytest.raises(KeyboardInterrupt):
        first.train()
    again = trainer_of(gaussian(), method(), tmp_path / "cut", 10, resume_from_checkpoint="latest")
    assert again.train() == "done"
    assert_equal(tensors(straight), tensors(again))


def test_a_smaller_student_has_no_path_from_the_teacher():
    with pytest.raises(ValueError, match="no smaller student: its path leads from the teacher"):
        DisBackConfig(student_width=0.5)


def test_a_changed_path_is_refused(tmp_path):
    trainer_of(gaussian(), method(), tmp_path, 7, checkpointing_steps=7).train()
    again = trainer_of(gaussian(), method(path_nodes=5), tmp_path, 9, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="node 3, which is not recorded"):
        again.train()


# Fixed points


@pytest.mark.parametrize("step", [6, 8, 10])
def test_the_gradient_vanishes_exactly_at_the_node_of_the_step(step):
    """Path: laws between the teacher's and the student's; each step's target is one of them, the last the teacher."""
    laws = {2: (MU - 1, 0.3 * COV), 1: (MU - 0.5, 0.6 * COV), 0: (MU, COV)}
    points = sigma_points(4)
    expected = (step - 6) // 2
    for node, (mean, cov) in laws.items():
        student = AffineGenerator(root(cov), mean)
        denoiser = gaussian_denoiser(student, GaussianScore(mean, root(cov)))  # the fake score of this student
        rule = method()
        path = {
            f"path/{k}/{name}": value
            for k in (1, 2)
            for name, value in (("mean", laws[k][0]), ("root", root(laws[k][1])))
        }
        rule.load_state_dict(path)
        draws = {"student/0": spatial(points[:, :2]), "student/eps": spatial(points[:, 2:])}
        ctx = context(denoiser, len(points), draws | {"student/t": torch.full((len(points),), 400)}, step=step)
        sum(rule.student_loss(batch_of(len(points), 2), ctx).values()).backward()
        largest = max(student.A.grad.abs().max(), student.b.grad.abs().max()).item()
        assert (largest < 1e-12) == (node == 2 - expected), (node, largest)


def test_starting_at_the_last_node_would_give_no_gradient():
    """The fake score is s'_N: against itself the gap is zero, which is why j starts at N - 1."""
    mean, cov = MU - 1, 0.3 * COV
    student = AffineGenerator(root(cov) * 1.3, mean + 1)  # wherever the student is
    denoiser = gaussian_denoiser(student, GaussianScore(mean, root(cov)))
    rule = method()
    rule.load_state_dict({"path/2/mean": mean, "path/2/root": root(cov)})
    loss = rule.student_loss(batch_of(4, 2), context(denoiser, 4, step=6))["distribution_matching"]
    assert loss.item() == 0


@pytest.mark.slow
def test_a_gaussian_run_ends_in_the_teachers_law():
    """Both stages with a learned fake score; an exact one is no network that could be recorded."""
    torch.manual_seed(0)
    student = AffineGenerator(f64([[0.3, 0.1], [0.0, 0.2]]), f64([-1.0, 1.0]))
    denoiser = gaussian_denoiser(student)
    fake = denoiser.roles.network("fake_score")
    rule = method(degradation_steps=120, path_nodes=4, backtracking_interval=120, student_update_every=2)
    steps = 1200
    optimizers = {
        "student": torch.optim.Adam(student.parameters(), lr=2e-2),
        "fake_score": torch.optim.Adam(fake.parameters(), lr=4e-2),
    }
    decay = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) for optimizer in optimizers.values()]
    nodes = []

    def after(step):
        for schedule in decay:
            schedule.step()
        if step == 119:
            nodes.extend(rule._path[node]["mean"].clone() for node in (1, 2, 3))

    run(rule, denoiser, optimizers, batch_of(64, 2), steps, after)
    distance = [(mean - f64([-1.0, 1.0])).norm() for mean in nodes]
    assert distance[0] > distance[1] > distance[2]  # the path leads to the untrained student's law
    assert (student.b - MU).abs().max() < 0.06
    assert (student.A @ student.A.T - COV).abs().max() < 0.06


# Surroundings


def test_init_from_gives_the_student_alone():
    assert method().inherits() == {"student": ("student",)}  # a trained fake score would not be the path's beginning
    plain = DisBack(DisBackConfig(path_nodes=0))
    assert plain.inherits() is None and plain.frozen() == {}
    assert DisBack(DisBackConfig(path_nodes=1)).frozen() == {}
    assert method_named("disback") is DisBack


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"degradation_steps": 2}, "degradation_steps"),
        ({"path_nodes": -1}, "path_nodes"),
        ({"backtracking_interval": 0}, "backtracking_interval"),
    ],
)
def test_bad_settings_are_named(config, named):
    with pytest.raises(ValueError, match=named):
        method(**config)
