"""What the script of the token view works on: answers, and how student and teacher looked at them, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opd_lightning.reports.printable import printable
from opd_lightning.reports.token_findings import answer_key
from opd_lightning.reports.token_records import VALUES, Row, read_header, read_record, steps_of

_DIGITS = 4  # of a number that is shown
_IN_NATS = (0.01, 0.05, 0.2, 0.5, 1.0, 2.0)
_SIGNED = (0.1, 0.5, 1.0, 2.0)
_LACKS = {  # by whether there is a teacher
    True: "{} does not tell its whole distribution. Divergences over the vocabulary and its entropy are unknown; the"
    " log-ratio of the sampled token is an unbiased and noisy estimate of the reverse KL.",
    False: "There was no teacher: only what the student expected is known.{}",
}


@dataclass(frozen=True)
class Quantity:
    """What tokens can be coloured by.

    Attributes:
        name: Its column.
        label: For people.
        unit: Of its values.
        note: What it is.
        bins: Limits between colours, of absolute values.
        diverging: Whether its sign means something.
    """

    name: str
    label: str
    unit: str
    note: str
    bins: tuple[float, ...] = _IN_NATS
    diverging: bool = False


QUANTITIES = (
    Quantity("reverse_kl", "reverse KL", "nats", "KL(student || teacher) over the whole vocabulary"),
    Quantity("forward_kl", "forward KL", "nats", "KL(teacher || student) over the whole vocabulary"),
    Quantity(
        "sampled_log_ratio",
        "log-ratio",
        "nats",
        "log p(y) - log q(y) of the sampled token: above 0 the student likes it more, below 0 the teacher does",
        _SIGNED,
        diverging=True,
    ),
    Quantity("entropy_gap", "entropy gap", "nats", "absolute difference of both entropies"),
    Quantity(
        "token_weight", "weight", "factor", "how much the token counts in the loss", (0.01, 0.25, 0.5, 0.9, 1.1, 2.0)
    ),
    Quantity("advantage", "advantage", "nats", "above 0 the loss makes the token likelier", _SIGNED, diverging=True),
)
FACTS = (
    *((each.name, each.label) for each in QUANTITIES),
    ("student_log_prob", "student log p"),
    ("teacher_log_prob", "teacher log q"),
    ("student_entropy", "student entropy"),
    ("teacher_entropy", "teacher entropy"),
    ("overlap_ratio", "overlap of lists"),
    ("overlap_mass_student", "student's mass there"),
    ("overlap_mass_teacher", "teacher's mass there"),
)


class Payload:
    """Collects the records of one or two runs.

    Args:
        names: Of the runs, in front of their steps; empty for none.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._vocabulary: dict[tuple[int, str], int] = {}
        self._special: set[int] = set()  # places in the vocabulary
        self._prompts: dict[str, int] = {}
        self._places: dict[int, int] = {}  # of answers, by their key
        self._answers: list[dict[str, Any]] = []
        self._points: list[dict[str, Any]] = []
        self._looks: list[dict[str, Any]] = []
        self._num_left_out = 0
        self._lacking: list[tuple[str, str]] = []  # runs, and their teachers

    def add(self, folder: Path, run: int, steps: Sequence[int], max_tokens: int) -> None:
        """Take these steps of a run's records, at most so many tokens of each and one answer at least."""
        files = steps_of(folder)
        for step in steps:
            point = len(self._points)
            label = f"{self._names[run]} step {step}".strip()
            self._points.append({"run": run, "step": step, "label": label})
            answers: dict[int, list[Row]] = {}
            for row in read_record(files[step]):
                answers.setdefault(answer_key(row), []).append(row)
            fitting = _first_that_fit(list(answers.items()), max_tokens)
            self._num_left_out += len(answers) - len(fitting)
            self._looks += [self._look(rows, key, point) for key, rows in fitting]
        header = read_header(folder)
        if not header["gives_vocabulary"]:
            self._lacking.append((self._names[run], header["teacher"] or ""))

    def contents(self) -> dict[str, Any]:
        """All of it."""
        known = {name for look in self._looks for name, values in look["values"].items() if values is not None}
        ends = [
            [place for place, point in enumerate(self._points) if point["run"] == run]
            for run in range(len(self._names))
        ]
        first, second = (ends[0][-1], ends[1][-1]) if len(ends) > 1 else (ends[0][0], ends[0][-1])
        return {
            "quantities": [asdict(each) | {"known": each.name in known} for each in QUANTITIES],
            "facts": [{"name": name, "label": label} for name, label in FACTS],
            "points": self._points,
            "start": [first, second if second != first else None],
            "sources": sorted({answer["source"] for answer in self._answers}),
            "vocabulary": [
                {"id": token_id, "text": text, "special": place in self._special}
                for (token_id, text), place in self._vocabulary.items()
            ],
            "prompts": list(self._prompts),
            "answers": self._answers,
            "looks": self._looks,
        }

    def notes(self) -> list[str]:
        """What the reader has to know about what is not there."""
        notes = [
            f"{f'{name}: ' if name else ''}{_LACKS[bool(teacher)].format(teacher)}" for name, teacher in self._lacking
        ]
        if self._num_left_out:
            notes.append(f"{self._num_left_out} recorded answers are left out here, as the page would be too large.")
        return notes

    def _look(self, rows: Sequence[Row], key: int, point: int) -> dict[str, Any]:
        """One look at one answer: a fixed answer is an own one too in the step that it comes from."""
        # only the own row has the weight and the advantage, since only that was trained on
        row = min(rows, key=lambda row: row["kind"] != "own")
        if key not in self._places:
            self._places[key] = len(self._answers)
            self._answers.append(self._answer(row))
        values = {name: _rounded(row[name]) for name in VALUES}
        values["entropy_gap"] = _rounded(_gap(row["student_entropy"], row["teacher_entropy"]))
        return {
            "answer": self._places[key],
            "point": point,
            "kinds": sorted({each["kind"] for each in rows}),
            "reward": row["reward"],
            "truncated": row["truncated"],
            "values": values,
            "student": self._list(row, "student"),
            "teacher": self._list(row, "teacher"),
        }

    def _answer(self, row: Row) -> dict[str, Any]:
        tokens = [self._word(*token) for token in zip(row["token_ids"], row["texts"], strict=True)]
        self._special.update(place for place, special in zip(tokens, row["is_special"], strict=True) if special)
        return {
            "uid": printable(row["uid"]),
            "source": printable(row["source"]),
            "reference": None if row["reference"] is None else printable(row["reference"]),
            "prompt": self._prompt(row["student_prompt"]),
            "teacherPrompt": None if row["teacher_prompt"] is None else self._prompt(row["teacher_prompt"]),
            "tokens": tokens,
            "others": [place for place, wrote in enumerate(row["student_wrote"]) if not wrote],
        }

    def _list(self, row: Row, who: str) -> dict[str, Any] | None:
        if row[f"{who}_top_ids"] is None:
            return None
        listed = zip(row[f"{who}_top_ids"], row[f"{who}_top_texts"], strict=True)
        return {
            "tokens": [None if ids is None else self._words(ids, texts) for ids, texts in listed],
            "logProbs": [_rounded(values) for values in row[f"{who}_top_log_probs"]],
        }

    def _words(self, ids: Sequence[int], texts: Sequence[str]) -> list[int]:
        return [self._word(token_id, text) for token_id, text in zip(ids, texts, strict=True)]

    def _word(self, token_id: int, text: str) -> int:
        return self._vocabulary.setdefault((token_id, printable(text)), len(self._vocabulary))

    def _prompt(self, text: str) -> int:
        return self._prompts.setdefault(printable(text), len(self._prompts))


def shown_steps(folder: Path, max_tokens: int) -> tuple[list[int], int, str]:
    """The steps that are shown, most tokens of each, and a word about the other steps.

    Args:
        folder: Of the records.
        max_tokens: Most tokens of all; the first and the last step are shown anyway, as far as they fit.
    """
    sizes = {
        step: sum(row["num_tokens"] for row in read_record(path, ["num_tokens"]))
        for step, path in steps_of(folder).items()
    }
    every = list(sizes)
    stride, steps = 1, every
    while sum(sizes[step] for step in steps) > max_tokens and len(steps) > 2:
        stride *= 2
        steps = [*every[:-1:stride], every[-1]] if stride < len(every) else [every[0], every[-1]]
    fits = sum(sizes[step] for step in steps) <= max_tokens
    note = f"{len(steps)} of {len(every)} recorded steps can be looked at here; the findings are of all."
    return steps, max_tokens if fits else max_tokens // len(steps), "" if steps == every else note


def _first_that_fit(answers: Sequence[tuple[int, list[Row]]], max_tokens: int) -> list[tuple[int, list[Row]]]:
    """Answers in order, the fixed ones first: of every step the same ones are there to be compared."""
    kept: list[tuple[int, list[Row]]] = []
    num_tokens = 0
    for key, rows in sorted(answers, key=lambda pair: all(row["kind"] != "fixed" for row in pair[1])):
        num_tokens += rows[0]["num_tokens"]
        if kept and num_tokens > max_tokens:
            break
        kept.append((key, rows))
    return kept


def _rounded(values: Sequence[float | None] | None) -> list[float | None] | None:
    if values is None:
        return None
    return [None if value is None else float(f"{value:.{_DIGITS}g}") for value in values]


def _gap(first: Sequence[float | None] | None, second: Sequence[float | None] | None) -> list[float | None] | None:
    if first is None or second is None:
        return None
    pairs = zip(first, second, strict=True)
    return [None if a is None or b is None else abs(a - b) for a, b in pairs]
