"""Mixtures of teachers: what their distribution is, and how their weights come about."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from objective_cases import make_case
from scoring import CPU, EVERYTHING, check_everything, make_batches

from opd_lightning.backends.hf import HFStudent, HFTeacher
from opd_lightning.interfaces import ScoreRequest
from opd_lightning.objectives import DenseScores
from opd_lightning.teachers import BaseModelTeacher, MixtureTeacher
from opd_lightning.teachers.mixture import MixedScores


def mixed(cases, weights, mean):
    scores = [DenseScores(case.q.log(), cases[0].response_ids) for case in cases]
    return MixedScores(scores, torch.tensor(weights, dtype=torch.float64).expand(len(cases[0].q), -1), mean)


def test_means_are_what_they_say():
    cases, weights = [make_case(seed) for seed in range(3)], [0.5, 0.3, 0.2]
    arithmetic = sum(weight * case.q for weight, case in zip(weights, cases, strict=True))
    geometric = torch.stack([case.q**weight for weight, case in zip(weights, cases, strict=True)]).prod(0)
    geometric = geometric / geometric.sum(-1, keepdim=True)
    for mean, expected in (("arithmetic", arithmetic), ("geometric", geometric)):
        scores = mixed(cases, weights, mean)
        torch.testing.assert_close(scores.full().exp(), expected)
        torch.testing.assert_close(scores.slice(1, 3).full().exp(), expected[1:3])
        part, ids = mixed(cases, weights, mean), torch.tensor([[1, 8]] * 4)
        torch.testing.assert_close(part.at(ids).exp(), expected.gather(-1, ids))
        torch.testing.assert_close(part.sampled().exp(), expected.gather(-1, part.response_ids[:, None])[:, 0])
        torch.testing.assert_close(part.topk(2)[1].exp(), expected.topk(2)[0])


def test_the_geometric_mean_interpolates_logits():
    first, second = make_case(1), make_case(2)
    expected = first.teacher_logits.lerp(second.teacher_logits, 0.05).log_softmax(-1)
    torch.testing.assert_close(mixed([first, second], [0.95, 0.05], "geometric").full(), expected)


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_what_it_consists_of_can_be_kept(mean, tiny_qwen3_folder, tiny_teacher_folder):
    student = HFStudent(str(tiny_qwen3_folder))
    teachers = {"a": HFTeacher(student.path), "b": HFTeacher(str(tiny_teacher_folder))}
    teacher = MixtureTeacher(teachers, {"a": 0.3, "b": 0.7}, mean=mean)
    teacher.preflight(student)
    teacher.setup(student, torch.nn.Identity(), CPU)
    (batch,), _ = make_batches()
    scores = teacher.score(batch, EVERYTHING)
    columns = scores.columns()
    assert columns is not None and {len(column) for column in columns.values()} == {batch.num_tokens}
    rows = torch.tensor([4, 0, 7])
    some = scores.from_columns({name: column[rows] for name, column in columns.items()})
    torch.testing.assert_close(some.full(), scores.full()[rows])
    check_everything(teacher)


def shares(sure=None, **options):
    _, (rollouts,) = make_batches()
    problem = replace(rollouts[0].problem, columns={} if sure is None else {"sure": sure})
    return MixtureTeacher({"a": BaseModelTeacher(), "b": BaseModelTeacher()}, **options).shares(problem)


def test_weights_come_from_settings_or_from_the_confidences_of_a_problem():
    assert shares() == [0.5, 0.5]
    assert shares(weights={"b": 3, "a": 1}) == [0.25, 0.75]
    expected = torch.tensor([0.9, 0.4]).softmax(-1).tolist()
    assert shares({"a": 90, "b": "40"}, confidence="sure") == pytest.approx(expected)
    assert shares({"a": 90, "b": 90}, confidence="sure") == [0.5, 0.5]
    assert shares({"a": 90, "b": 40}, confidence="sure", tau=1e9) == pytest.approx([0.5, 0.5])
    assert shares({"a": 90}, confidence="sure") == shares(confidence="sure") == [0.5, 0.5]  # one is missing, or all


def test_what_cannot_be_mixed_is_refused():
    for options, words in (
        ({"weights": {"a": 1.0}}, r"weights: expected a positive number for each of a, b, got {'a': 1.0}"),
        ({"weights": {"a": 1.0, "b": -1.0}}, r"weights: expected a positive number"),
        ({"weights": {"a": 1.0, "b": 1.0}, "confidence": "sure"}, r"weights: the column in confidence gives them"),
        ({"tau": 0}, r"tau: expected a positive number, got 0"),
        ({"mean": "harmonic"}, r"mean: expected one of arithmetic, geometric, got 'harmonic'"),
    ):
        with pytest.raises(ValueError, match=rf"model\.teacher\.{words}"):
            shares(**options)
    with pytest.raises(ValueError, match=r"model\.teacher\.teachers: expected at least one"):
        MixtureTeacher({})
    with pytest.raises(ValueError, match=r"mean: a geometric mean is normalised over the whole vocabulary"):
        Listed().check(ScoreRequest())


class Listed(MixtureTeacher):
    """Of servers that list some tokens only."""

    def __init__(self):
        super().__init__({"a": BaseModelTeacher(), "b": BaseModelTeacher()}, mean="geometric")

    @property
    def offer(self):
        return ScoreRequest(top_k=20)
