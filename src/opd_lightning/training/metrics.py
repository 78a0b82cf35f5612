"""torchmetrics classes: they keep sums and counts, reduce them over ranks, and divide last.

The token formulas are pure functions in `objectives/facts.py`; here are the holders, and the few numbers that are
about whole responses.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric

from opd_lightning.interfaces import Rollout, RolloutBatch, ScoreRequest
from opd_lightning.rollouts.comparison import Comparison
from opd_lightning.rollouts.repetition import repetition_rate

SumAndCount = tuple[Tensor | float, Tensor | float]


def add_metrics(needed: ScoreRequest | None, offered: ScoreRequest, k: int) -> ScoreRequest | None:
    """What the objective needs, and for the metrics whatever more the teacher can give.

    Args:
        needed: By the objective; None when it needs no teacher, which is then asked for the metrics alone.
        offered: The most that the teacher gives.
        k: Size of the top-k sets that are compared; 0 for no metrics.
    """
    if not k:
        return needed
    needed = needed if needed is not None else ScoreRequest()
    top_k = max(needed.top_k, min(k, offered.top_k))
    return replace(needed, full_vocabulary=offered.full_vocabulary, top_k=top_k)


class Means(Metric):
    """Named means from (sum, count) pairs, and named maxima, exact over micro-batches and ranks.

    Names come with the updates, in their order; every rank must use the same ones in the same order.
    """

    full_state_update = False
    totals: Tensor
    peaks: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.names: tuple[str, ...] = ()
        self.peak_names: tuple[str, ...] = ()
        self.add_state("totals", torch.zeros(0, 2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("peaks", torch.zeros(0, dtype=torch.float64), dist_reduce_fx="max")

    def update(self, pairs: Mapping[str, SumAndCount], maxima: Mapping[str, Tensor | float] | None = None) -> None:
        """Add (sum, count) pairs and take maxima."""
        self._adopt_names(tuple(pairs), tuple(maxima or ()))
        if pairs:
            rows = torch.tensor([self.names.index(name) for name in pairs], device=self.totals.device)
            self.totals.index_add_(0, rows, _table(list(pairs.values()), self.totals))
        for name, value in (maxima or {}).items():
            peak = self.peaks[self.peak_names.index(name)]
            peak.copy_(torch.maximum(peak, torch.as_tensor(value, dtype=peak.dtype, device=peak.device)))

    def compute(self) -> dict[str, float]:
        """Sum over count for each name (names with no count are left out), and the maxima."""
        means = {
            name: total / count
            for name, (total, count) in zip(self.names, self.totals.tolist(), strict=True)
            if count > 0
        }
        maxima = {
            name: value for name, value in zip(self.peak_names, self.peaks.tolist(), strict=True) if value > -1e300
        }
        return means | maxima

    def _adopt_names(self, names: tuple[str, ...], peak_names: tuple[str, ...]) -> None:
        self.names += tuple(name for name in names if name not in self.names)
        self.peak_names += tuple(name for name in peak_names if name not in self.peak_names)
        if missing := len(self.names) - len(self.totals):
            self.totals = torch.cat([self.totals, self.totals.new_zeros(missing, 2)])
        if missing := len(self.peak_names) - len(self.peaks):
            self.peaks = torch.cat([self.peaks, self.peaks.new_full((missing,), -torch.inf)])


def _table(pairs: Sequence[SumAndCount], like: Tensor) -> Tensor:
    """[k, 2] of the pairs, like another in dtype and device; what is a number goes to the device in one piece."""
    entries = [entry for pair in pairs for entry in pair]
    numbers = [0 if isinstance(entry, Tensor) else entry for entry in entries]
    table = torch.tensor(numbers, dtype=like.dtype, device=like.device)
    places = [i for i, entry in enumerate(entries) if isinstance(entry, Tensor)]
    if places:
        tensors = torch.stack([torch.as_tensor(entries[i], dtype=like.dtype, device=like.device) for i in places])
        table = tensors if len(places) == len(table) else table.index_put((torch.tensor(places),), tensors)
    return table.view(-1, 2)


class AnswerMetrics(Metric):
    """avg@n and pass@n of graded answers, with their lengths.

    avg@n is the mean reward over all n samples of all problems; pass@n the share of problems with at least one fully
    right sample (reward 1). Answers that nobody marks (reward NaN) have their lengths only and count in neither.
    """

    full_state_update = False
    totals: Tensor

    def __init__(self, num_samples: int) -> None:
        super().__init__()
        self.num_samples = num_samples
        self.add_state("totals", torch.zeros(8, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, groups: Sequence[Sequence[Rollout]]) -> None:
        """Add the graded rollouts of some problems, one group per problem."""
        rollouts = [rollout for group in groups for rollout in group]
        graded = [rollout.reward for rollout in rollouts if not math.isnan(rollout.reward)]
        self.totals += torch.tensor(
            [
                sum(graded),
                len(graded),
                sum(any(rollout.reward >= 1 for rollout in group) for group in groups),
                sum(len(rollout.response_ids) for rollout in rollouts),
                sum(not rollout.finished for rollout in rollouts),
                len(rollouts),
                len(groups),
                sum(any(not math.isnan(rollout.reward) for rollout in group) for group in groups),
            ],
            dtype=self.totals.dtype,
            device=self.totals.device,
        )

    def compute(self) -> dict[str, float]:
        """Return avg@n, pass@n, response length in tokens, truncation rate and the number of problems.

        That number is what the two marks are of; where nobody marks, that of all problems.
        """
        reward, num_graded, passed, tokens, truncated, num_rollouts, num_problems, num_marked = self.totals.tolist()
        if num_rollouts == 0:
            return {}
        marks = {}
        if num_graded:
            marks[f"avg_at_{self.num_samples}"] = reward / num_graded
            marks[f"pass_at_{self.num_samples}"] = passed / num_marked
        return marks | {
            "response_length": tokens / num_rollouts,
            "truncation_rate": truncated / num_rollouts,
            "num_problems": num_marked or num_problems,
        }


def log_values(module: LightningModule, hook: str, values: Mapping[str, float], shown: Collection[str]) -> None:
    """What `module.log` does with each value, in a fraction of the time from the second time on.

    `log` copies all that Lightning knows of a value every time: for the forty of a step that was 3 % of the quickstart.
    A value that it knows already goes straight to where `log` would put it. The first goes through `log` in any case:
    with a hook's first `log` of an epoch Lightning forgets all values of that hook, so none may come before.

    Args:
        module: Whose trainer logs.
        hook: The one that is under way, which is a part of the value's name in Lightning.
        values: By name.
        shown: Names of those for the progress bar.
    """
    known: Any = module.trainer._results or {}  # not for others to use, but `log` itself has nothing cheaper
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)  # a precision plugin may have lowered it
    for index, (name, value) in enumerate(values.items()):
        if index and (key := f"{hook}.{name}") in known:
            known.update_metrics(key, torch.tensor(value, dtype=dtype, device=module.device), 1)
        else:
            module.log(name, value, prog_bar=name in shown, batch_size=1)


def speeds(batch: RolloutBatch, seconds: Mapping[str, float]) -> dict[str, SumAndCount]:
    """(sum, count) of the seconds of each part of a step, and of the response tokens per second of its large parts.

    A teacher whose scores may be kept has no speed: it is asked for a whole round at once, or not at all.
    """
    pairs: dict[str, SumAndCount] = {f"seconds/{part}": (value, 1) for part, value in seconds.items()}
    num_tokens = {"generate": batch.num_generated_tokens, "student": batch.num_response_tokens}
    if batch.round is None:
        num_tokens["teacher"] = batch.num_response_tokens
    for part, number in num_tokens.items():
        if seconds.get(part):
            pairs[f"tokens_per_second/{part}"] = (number, seconds[part])
    return pairs


def comparison_statistics(
    compared: Sequence[Comparison],
) -> tuple[dict[str, SumAndCount], dict[str, Tensor]]:
    """(sum, count) and maxima of compared micro-batches: loss, padding, and every fact where it is defined."""
    if not compared:
        return {}, {}
    losses = torch.cat([each.losses.detach() for each in compared])
    num_real = torch.stack([each.micro_batch.attention_mask.sum() for each in compared])
    sizes = [0 if each.is_packed else each.micro_batch.attention_mask.numel() for each in compared]
    num_run = torch.maximum(num_real, torch.tensor(sizes, device=num_real.device))
    facts = {name: torch.cat([each.facts[name] for each in compared]) for name in compared[0].facts}
    sums: dict[str, SumAndCount] = {
        "loss": (losses.sum(), len(losses)),
        "padding_share": ((num_run - num_real).sum(), num_run.sum()),
    }
    sums |= fact_statistics(facts, tuple(facts))
    mismatch = facts.get("rollout_mismatch")
    if mismatch is None:
        return sums, {}
    nothing = mismatch.new_full((1,), -torch.inf)  # where it is not known there is no maximum
    return sums, {"rollout_mismatch_max": torch.cat([nothing, mismatch.nan_to_num(-torch.inf, torch.inf)]).max()}


def fact_statistics(facts: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, SumAndCount]:
    """(sum, count) of the named facts that are known, over the tokens where they are defined."""
    known = [name for name in names if name in facts]
    if not known:
        return {}
    table = torch.stack([facts[name] for name in known])
    sums, counts = table.nansum(-1, dtype=torch.float64), (~table.isnan()).sum(-1)
    return dict(zip(known, zip(sums, counts, strict=True), strict=True))


def rollout_statistics(rollouts: Sequence[Rollout]) -> dict[str, SumAndCount]:
    """(sum, count) of what whole rollouts say: accuracy, response length in tokens, truncation and repetition rates.

    Rollouts without a reward (NaN) do not count towards the accuracy.
    """
    count = len(rollouts)
    graded = [rollout.reward for rollout in rollouts if not math.isnan(rollout.reward)]
    return {
        "accuracy": (sum(graded), len(graded)),
        "response_length": (sum(len(rollout.response_ids) for rollout in rollouts), count),
        "truncation_rate": (sum(not rollout.finished for rollout in rollouts), count),
        "repetition_rate": (sum(repetition_rate(rollout.response_ids) for rollout in rollouts), count),
    }
