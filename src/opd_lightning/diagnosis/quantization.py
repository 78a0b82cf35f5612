"""What quantisation changes of a teacher: as it scores, beside the same one in full, on the student's answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from opd_lightning.diagnosis.estimates import estimate_mean
from opd_lightning.diagnosis.measurements import Quantization
from opd_lightning.diagnosis.pair import Pair
from opd_lightning.interfaces import Rollout, Teacher
from opd_lightning.objectives import ReverseKL

LoadWhole = Callable[[Pair], Teacher | str]
"""Loads the teacher in full, or says why it cannot."""


def measure_quantization(pair: Pair, load_whole: LoadWhole, rollouts: Sequence[Rollout]) -> Quantization | str:
    """Compare the teacher of a loaded pair with the same one in full, token by token, over the whole vocabulary.

    What the quantised one says is read first, as hidden states. Then the other is loaded beside it, and let go of.

    Args:
        pair: Loaded; its teacher is quantised.
        load_whole: Called once.
        rollouts: Answers of the student, one of each problem.

    Returns:
        The numbers, or why they cannot be known.
    """
    batches, request = pair.cut(rollouts), pair.request
    low = list(pair.teacher.score_all(batches, request))
    whole = load_whole(pair)
    if isinstance(whole, str):
        return whole
    divergences, agreements = [], []
    try:
        for batch, of_low in zip(batches, low, strict=True):
            of_whole = whole.score(batch, request)
            pieces = []
            for start in range(0, batch.num_tokens, pair.objective.chunk_tokens):
                stop = min(start + pair.objective.chunk_tokens, batch.num_tokens)
                log_full = of_whole.slice(start, stop).full()
                log_low = of_low.slice(start, stop).full().to(log_full.device)
                same = log_full.argmax(-1) == log_low.argmax(-1)
                pieces.append(torch.stack([ReverseKL().value(log_full, log_low), same.float()]).cpu())
            for values, are_same in batch.by_rollout(torch.cat(pieces, dim=-1), dim=-1):
                divergences.append(values.tolist())
                agreements.append(are_same.tolist())
    finally:
        whole.close()
    return Quantization(
        kl=estimate_mean(divergences),
        largest=max(value for values in divergences for value in values),
        agreement=estimate_mean(agreements).value,
        num_tokens=sum(map(len, divergences)),
    )
