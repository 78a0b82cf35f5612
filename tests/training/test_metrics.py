import math

import pytest
import torch

from opd_lightning.interfaces import Problem, Rollout
from opd_lightning.training.metrics import AnswerMetrics, Means, rollout_statistics


def rollout(reward, length=2, finished=True):
    return Rollout(
        problem=Problem(uid="p", messages=(), answer=""),
        prompt_ids=torch.tensor([1]),
        response_ids=torch.arange(length),
        log_probs=torch.zeros(length),
        finished=finished,
        seed=0,
        reward=reward,
    )


def test_means_divide_last():
    metric = Means()
    metric.update({"kl": (6.0, 2), "other": (0.0, 0)}, {"peak": 1.0})
    metric.update({"kl": (torch.tensor(3.0), torch.tensor(4))}, {"peak": 0.5})
    metric.update({"late": (1.0, 1)})
    assert metric.compute() == {"kl": 1.5, "late": 1.0, "peak": 1.0}  # "other" has no count: there is no mean to show


def test_means_start_again_after_reset():
    metric = Means()
    metric.update({"a": (5.0, 1)}, {"m": 3.0})
    metric.reset()
    metric.update({"a": (1.0, 2)}, {"m": -2.0})
    assert metric.compute() == {"a": 0.5, "m": -2.0}


def test_means_keep_a_nan_visible():
    metric = Means()
    metric.update({"a": (math.nan, 1)})
    assert math.isnan(metric.compute()["a"])


def test_avg_and_pass_at_n_against_their_definition():
    metric = AnswerMetrics(num_samples=2)
    metric.update([[rollout(1.0), rollout(0.0)], [rollout(0.0), rollout(0.0, length=4, finished=False)]])
    metric.update([[rollout(1.0), rollout(1.0)]])
    assert metric.compute() == pytest.approx(
        {
            "avg_at_2": 3 / 6,
            "pass_at_2": 2 / 3,
            "response_length": 14 / 6,
            "truncation_rate": 1 / 6,
            "num_problems": 3,
        }
    )


def test_partial_credit_counts_in_avg_but_does_not_pass():
    metric = AnswerMetrics(num_samples=1)
    metric.update([[rollout(0.5)]])
    assert metric.compute()["avg_at_1"] == 0.5
    assert metric.compute()["pass_at_1"] == 0


def test_answers_that_nobody_marks_have_lengths_only():
    metric = AnswerMetrics(num_samples=2)
    metric.update([[rollout(math.nan), rollout(math.nan, length=4)]])
    assert metric.compute() == {"response_length": 3, "truncation_rate": 0, "num_problems": 1}
    means = Means()
    means.update(rollout_statistics([rollout(math.nan)]))
    assert "accuracy" not in means.compute()
    assert means.compute()["response_length"] == 2


def test_rollout_statistics_are_sums_and_counts():
    statistics = rollout_statistics([rollout(1.0, length=3), rollout(0.0, length=5, finished=False)])
    assert statistics["accuracy"] == (1.0, 2)
    assert statistics["response_length"] == (8, 2)
    assert statistics["truncation_rate"] == (1, 2)
