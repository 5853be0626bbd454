"""Oracle discriminators, exact expectations over one-dimensional Gaussians, and tiny runs with images."""

from __future__ import annotations

import torch
from method_helpers import (
    AffineGenerator,
    FixedLevels,
    OracleFake,
    TableGenerator,
    batch_of,
    context,
    denoiser_of,
    f64,
    spatial,
)
from torch import Tensor, nn

from fastdiff.data.source import PromptData
from fastdiff.diffusion import Gaussian
from fastdiff.engine import Settings, Trainer, chosen_data
from fastdiff.models.analytic import ExactNetwork
from fastdiff.models.teacher import Teacher

MU, S, B = 0.7, 0.64, -0.2
SCENARIOS = {"I": (0.6, 0.4, 1.1), "II": (0.6, 0.8, 1.3)}  # alpha, sigma, A of the student
GOLD = {  # (d/dA, d/db) of each divergence
    "I": {
        "rkl": (0.3494685068, -0.8299180328),
        "soft_rkl": (0.3519040032, -0.5536407338),
        "js": (-0.0024354964, -0.2762772990),
        "sq_hellinger": (0.0089984560, -0.1509110922),
        "fkl": (-0.0964494044, -0.5439892545),
        "jeffreys": (0.2530191023, -1.3739072873),
        "soft_fkl": (-0.0940139080, -0.2677119555),
    },
    "II": {
        "rkl": (0.1628039773, -0.3722426471),
        "soft_rkl": (0.1353341174, -0.2338067531),
        "js": (0.0274698599, -0.1384358940),
        "sq_hellinger": (0.0174816756, -0.0732775220),
        "fkl": (0.0259449044, -0.2595322012),
        "jeffreys": (0.1887488818, -0.6317748483),
    },
}


class OracleHeads(nn.Module):
    """One head, on an exact teacher's features, whose logit is log p_t / q_t for the law a student has now."""

    def __init__(self, teacher: ExactNetwork, student: AffineGenerator) -> None:
        super().__init__()
        self.laws, self.schedule = (teacher.law, student), teacher.schedule
        self.time: Tensor | None = None
        teacher.register_forward_pre_hook(self._remember)

    def _remember(self, _network, args):
        self.time = args[1]

    def forward(self, noisy: Tensor, clean: Tensor) -> Tensor:
        law, student = self.laws
        A = student.A.detach()
        own = Gaussian(student.b.detach(), A @ A.T)
        log_ratio = law.log_prob(noisy, self.time, self.schedule) - own.log_prob(noisy, self.time, self.schedule)
        return log_ratio[:, None]


def trapezoid() -> tuple[Tensor, Tensor]:
    """Nodes that float32 holds exactly and weights of N(0, 1): an error far below rounding for smooth functions."""
    nodes = torch.arange(-8.5, 8.51, 0.25, dtype=torch.float64)
    weights = torch.exp(-(nodes**2) / 2)
    return nodes, weights / weights.sum()


class Laboratory:
    """All (z, eps) nodes as one batch, so that expectations of anything are exact.

    The student is a table of samples; `derivatives` weighs its rows' gradients into those of A and b.

    Args:
        scenario: a key of `SCENARIOS`.
        site: under which the losses draw the noise and the time of the student's samples.
    """

    def __init__(self, scenario: str, site: str) -> None:
        alpha, sigma, a = SCENARIOS[scenario]
        nodes, weights = trapezoid()
        self.z, eps = (grid.flatten() for grid in torch.meshgrid(nodes, nodes, indexing="ij"))
        self.weights = (weights[:, None] * weights).flatten()
        rows, schedule = len(eps), FixedLevels(alpha, sigma)
        student = AffineGenerator(f64([[a]]), f64([B]), schedule)
        self.table = TableGenerator((a * self.z + B)[:, None], schedule)
        teacher = ExactNetwork(Gaussian(f64([MU]), f64([[S]])), schedule, "epsilon")
        self.denoiser = denoiser_of(teacher, schedule, student=self.table, fake_score=OracleFake(student))
        given = {f"{site}/eps": spatial(eps[:, None]), f"{site}/t": torch.full((rows,), 400)}
        self.batch = batch_of(rows, 1, torch.zeros(rows, 1, 1, 1))
        modules = {"discriminator": OracleHeads(teacher, student)}
        self.ctx = context(self.denoiser, rows, given, modules=modules)

    def derivatives(self, loss: Tensor) -> tuple[float, float]:
        """(d/dA, d/db) of the expectation whose gradient in sample i is that of a mean loss in row i."""
        (rows,) = torch.autograd.grad(loss, self.table.table, retain_graph=True)
        per_sample = rows.flatten() * self.z.numel() * self.weights
        return (per_sample * self.z).sum().item(), per_sample.sum().item()


class Pictures(PromptData):
    """Prompts with random latents `(4, 16, 16)`, as a cache would give them."""

    def __getitem__(self, index):
        item = index if isinstance(index, int) else index.item
        latents = torch.randn((4, 16, 16), generator=torch.Generator().manual_seed(item))
        return super().__getitem__(index) | {"latents": latents}


def tiny_trainer(method, pipeline, folder, data: type[PromptData] = Pictures, **settings) -> Trainer:
    """A run of few steps on a tiny pipeline, with pictures unless `data` says otherwise."""
    defaults = {
        "output_dir": str(folder),
        "max_train_steps": 3,
        "train_batch_size": 2,
        "lora_rank": 4,
        "lora_target_modules": ("to_q", "conv1"),
        "learning_rate": 1e-3,
        "log_every": 1,
        "report_to": "none",
        "checkpointing_steps": 1000,
        "validation_steps": 1000,
    }
    given, teacher = Settings(**(defaults | settings)), Teacher(pipeline, "tiny")
    prompts = data(("a red apple", "a dog", "blue cat", "one house"))
    return Trainer(method, teacher, chosen_data(method, prompts, teacher, given), given)


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    """Every trained tensor, optimizer state and memory of a run, by name."""
    return {
        f"{group}/{name}": tensor.detach().clone()
        for group, tensors in trainer.tensor_groups().items()
        for name, tensor in tensors.items()
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two runs are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def frozen_weights(pipeline) -> dict[str, Tensor]:
    """The teacher's own weights, to compare with after a run."""
    return {
        name.replace(".base_layer", ""): tensor.clone()
        for name, tensor in pipeline.unet.state_dict().items()
        if "lora_" not in name
    }
