"""Two teachers as one: the mixture of their distributions."""

import math

import torch

from opd_lightning.interfaces import Teacher, TeacherScores


class MixedScores(TeacherScores):
    def __init__(self, first, second, share):
        self.first, self.second, self.share = first, second, share
        self.response_ids = first.response_ids

    def slice(self, start, stop):
        return MixedScores(self.first.slice(start, stop), self.second.slice(start, stop), self.share)

    def full(self):
        return torch.logaddexp(self.first.full() + math.log(self.share), self.second.full() + math.log1p(-self.share))


class Mixture(Teacher):
    def __init__(self, first: Teacher, second: Teacher, share: float = 0.5):
        self.first, self.second, self.share = first, second, share

    @property
    def offer(self):
        return self.first.offer

    def preflight(self, student):
        self.first.preflight(student)
        self.second.preflight(student)

    def setup(self, student, model, device):
        self.first.setup(student, model, device)
        self.second.setup(student, model, device)

    def score(self, batch, request):
        return MixedScores(self.first.score(batch, request), self.second.score(batch, request), self.share)
