"""Scores of prompts, as a file that `ScoredTask` reads: portion by portion, so that a stopped command goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opd_lightning.commands.recorder import sample_of_weights
from opd_lightning.diagnosis.estimates import estimate_mean
from opd_lightning.diagnosis.pair import Pair
from opd_lightning.diagnosis.prompt_rows import PROMPT_NUMBERS, measure_prompts
from opd_lightning.interfaces import Problem
from opd_lightning.reports.contents import Report, Table, number
from opd_lightning.rollouts.answering import render_prompts
from opd_lightning.rollouts.problem_sets import describe_problems
from opd_lightning.rollouts.recording import Recording
from opd_lightning.tasks.scored import read_scores
from opd_lightning.training.resuming import describe_settings

FORMAT = "opd_lightning prompt scores 1"
_AT_ONCE = 32  # prompts of one portion: at most so many are measured again after a crash
_QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)


def score_prompts(
    pair: Pair,
    problems: Sequence[Problem],
    target: Path,
    settings: Mapping[str, Any],
    *,
    num_samples: int,
    say: Callable[[str], None],
) -> None:
    """Measure prompts and write a row for each, or go on where an earlier command was stopped.

    Args:
        pair: Not loaded.
        problems: In the order of the rows.
        target: The file, ending in .jsonl.
        settings: What the numbers depend on beside the problems and the sampling.
        num_samples: Answers per problem.
        say: Told how far it is.

    Raises:
        ValueError: There is a file of other settings, or one that this did not write.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    about = {**settings, **_describe(pair), "problems": describe_problems(problems)}
    recording = Recording(target, about, FORMAT)
    if recording.is_complete:
        say(f"{target} is complete already")
        return
    try:
        with pair.loaded():
            assert pair.model is not None, "the pair is loaded"
            speaker = pair.speaker
            models = [pair.model, *([] if speaker is None else [speaker[1]])]
            recording.open({"format": FORMAT, "weights": " ".join(map(sample_of_weights, models))})
            if recording.repaired:
                say(recording.repaired)
            for first in range(recording.num_done, len(problems), _AT_ONCE):
                portion = problems[first : first + _AT_ONCE]
                places = range(first, first + len(portion))
                parts = (pair.seed, "diagnose")
                rows = measure_prompts(
                    pair,
                    render_prompts(pair.student.tokenizer, portion, places, num_samples=num_samples, seed_parts=parts),
                )
                recording.append(rows, num_done=places[-1] + 1, counts=Counter(prompts=len(rows)))
                say(f"{recording.num_done} of {len(problems)} prompts are scored")
        recording.finish()
    finally:
        recording.close()


def _describe(pair: Pair) -> dict[str, Any]:
    """What of a pair the numbers depend on; which loss it trains they do not."""
    return {
        "student": pair.student.describe(),
        "teacher": describe_settings(pair.teacher),
        "engine": type(pair.engine).__name__,
        "sampling": asdict(pair.sampling),
        "temperatures": [pair.objective.student_temperature, pair.request.temperature],
        "k": pair.k,
    }


def describe_scores(path: Path) -> Report:
    """What the scores of a file are like, for choosing thresholds."""
    rows = list(read_scores(str(path)).values())
    lines = []
    for name in PROMPT_NUMBERS:
        known = sorted(value for row in rows if (value := row.get(name)) is not None)
        if known:
            spread = [known[round(share * (len(known) - 1))] for share in _QUANTILES]
            lines.append((name, number(estimate_mean([[value] for value in known]).value), *map(number, spread)))
    columns = ("score", "mean", "least", "10%", "median", "90%", "most")
    note = "data.task: ScoredTask chooses by these (docs/prompts.md)."
    return Report("Scores of prompts", f"{len(rows)} prompts", [], [Table(str(path), columns, lines, note)])
