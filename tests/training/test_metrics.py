import csv
import math
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from opd_lightning.interfaces import Problem, Rollout
from opd_lightning.rollouts.batching import collate
from opd_lightning.rollouts.comparison import Comparison
from opd_lightning.training.metrics import AnswerMetrics, Means, comparison_statistics, log_values, rollout_statistics


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
    metric.update({"late": (torch.tensor(0.5), 1), "kl": (0.0, torch.tensor(0))})
    metric.update({"late": (0.5, 0)})
    assert metric.compute() == {"kl": 1.5, "late": 1.0, "peak": 1.0}  # "other" has no count: there is no mean to show


def test_means_start_again_after_reset():
    metric = Means()
    metric.update({"a": (5.0, 1)}, {"m": 3.0})
    metric.reset()
    metric.update({"a": (1.0, 2)}, {"m": -2.0})
    assert metric.compute() == {"a": 0.5, "m": -2.0}


def test_statistics_of_a_step_do_not_depend_on_its_micro_batches():
    facts = {"kl": torch.tensor([1.0, math.nan, 4.0]), "rollout_mismatch": torch.tensor([0.5, math.nan, 2.0])}

    def compared(first, last, width, is_packed):
        rollouts = [rollout(0.0, length=last - first)]
        batch = replace(collate(rollouts, 0), attention_mask=torch.tensor([[1] * (last - first + 1) + [0] * width]))
        part = {name: values[first:last] for name, values in facts.items()}
        return Comparison(batch, torch.arange(3.0, requires_grad=True)[first:last] + 1, part, is_packed)

    sums, maxima = comparison_statistics([compared(0, 2, 2, False), compared(2, 3, 5, True)])
    numbers = {name: (float(total), int(count)) for name, (total, count) in sums.items()}
    assert numbers == {"loss": (6, 3), "padding_share": (2, 7), "kl": (5, 2), "rollout_mismatch": (2.5, 2)}
    assert maxima == {"rollout_mismatch_max": 2.0}
    assert comparison_statistics([]) == ({}, {})


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


def test_problems_that_nobody_marks_are_neither_right_nor_wrong():
    metric = AnswerMetrics(num_samples=2)
    metric.update([[rollout(1.0), rollout(0.0)], [rollout(math.nan), rollout(math.nan)]])
    found = metric.compute()
    assert (found["avg_at_2"], found["pass_at_2"], found["num_problems"]) == (0.5, 1, 1)


def test_rollout_statistics_are_sums_and_counts():
    statistics = rollout_statistics([rollout(1.0, length=3), rollout(0.0, length=5, finished=False)])
    assert statistics["accuracy"] == (1.0, 2)
    assert statistics["response_length"] == (8, 2)
    assert statistics["truncation_rate"] == (1, 2)


class Logging(LightningModule):
    """Logs the same values in the ordinary way, or in the fast one."""

    def __init__(self, is_fast):
        super().__init__()
        self.is_fast, self.weight, self.seen = is_fast, torch.nn.Parameter(torch.ones(())), []

    def training_step(self, batch, batch_idx):
        values = {"train/loss": batch_idx / 3, "train/tokens": 16_777_216.0 + batch_idx}
        values |= {"train/rare": math.nan} if batch_idx in (0, 3) else {}
        values |= {"train/late": 1.0} if self.current_epoch and batch_idx != 1 else {}
        if self.is_fast:
            log_values(self, "training_step", values, {"train/loss"})
        else:
            for name, value in values.items():
                self.log(name, value, prog_bar=name == "train/loss", batch_size=1)
        return self.weight * 1.0

    def on_train_batch_end(self, outputs, batch, batch_idx):
        metrics = (self.trainer.callback_metrics, self.trainer.progress_bar_metrics)
        self.seen.append([{name: repr(float(value)) for name, value in kind.items()} for kind in metrics])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_values_are_logged_as_lightning_logs_them(tmp_path):
    seen, rows = [], []
    for is_fast in (False, True):
        module = Logging(is_fast)
        logger = CSVLogger(tmp_path / str(is_fast))
        options = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
        trainer = Trainer(accelerator="cpu", max_epochs=2, logger=logger, log_every_n_steps=2, **options)
        trainer.fit(module, torch.utils.data.DataLoader(range(5)))
        seen.append(module.seen)
        with (tmp_path / str(is_fast) / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
            rows.append(list(csv.reader(file)))
    assert len(rows[0]) > 4
    assert rows[0] == rows[1]
    assert seen[0] == seen[1]
    assert "train/loss" in seen[0][-1][1]
