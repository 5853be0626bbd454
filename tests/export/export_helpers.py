"""A trained-looking student: adapters with non-zero weights inside the trainer's own layers."""

import torch

from fastdiff.export.loadback import make_probe
from fastdiff.export.pipeline import Student
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.roles import AdapterSpec, Roles
from fastdiff.models.teacher import Teacher


class Trained:
    """A teacher whose network carries a student adapter with alpha != r and random weights."""

    def __init__(self, pipeline, sampler, rank=3, alpha=5.0):
        self.teacher = Teacher(pipeline)
        self.sampler = sampler
        targets = self.teacher.family.lora_targets
        self.roles = Roles(self.teacher.network, {"student": AdapterSpec(rank, alpha, targets)})
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in self.roles.parameters("student"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        self.student = Student(pipeline, self.teacher.network, sampler, {"student": 1.0})
        self.denoiser = Denoiser(self.roles, self.teacher.family, self.teacher.schedule, self.teacher.prediction_type)

    @property
    def family(self):
        return self.teacher.family

    def probe(self):
        cond = self.teacher.encode(["ab", "a red c"], self.teacher.default_resolution)
        shape = self.teacher.latent_shape(self.teacher.default_resolution)

        def predict(x, t, cond):
            return self.denoiser(x, t, cond, "student")

        return make_probe(predict, cond, shape, self.sampler, self.teacher.schedule, self.family)
