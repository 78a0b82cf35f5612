"""What records of tokens say in words and numbers: where two models disagree, about what, and whether it fades.

All of it is about the divergence of single tokens: the reverse KL, or |log p(y) - log q(y)| of the sampled token where
the teacher does not tell its whole distribution.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from opd_lightning.reports.contents import Curve, Panel, Statement, Table, number, share
from opd_lightning.reports.printable import printable
from opd_lightning.reports.token_places import last_line, last_mention
from opd_lightning.reports.token_records import Row, find_records, read_header, read_record, steps_of

_COLUMNS = ("step", "kind", "prompt_ids", "token_ids", "texts", "reference", "reward", "num_tokens")
_FEWEST_ANSWERS = 3  # of each kind, before right ones are compared with wrong ones in words
_NUM_BINS = 6
_NUM_TEXTS = 10
FADED, GROWN = 0.9, 1.1  # of what it was: less than this fades, more than that grows


@dataclass(frozen=True)
class Answer:
    """One recorded answer, as far as its divergences go.

    Attributes:
        step: Steps trained before.
        kind: "own" or "fixed".
        key: The same for the same prompt and answer.
        reward: Its mark; None without one.
        texts: Of the T tokens.
        divergences: [T] nats; None where unknown.
        in_last_line: [T], whether the token stands in the answer's last line; empty where there is one line only.
        in_reference: [T], whether it belongs to the last place where the reference answer is said; empty where it is
            not said, or there is none.
    """

    step: int
    kind: str
    key: int
    reward: float | None
    texts: Sequence[str]
    divergences: Sequence[float | None]
    in_last_line: Sequence[bool]
    in_reference: Sequence[bool]

    @property
    def known(self) -> list[float]:
        """The divergences that are known."""
        return [value for value in self.divergences if value is not None]


def measure_of(folder: Path) -> str:
    """The column that is taken for the divergence in these records."""
    return "reverse_kl" if read_header(folder)["gives_vocabulary"] else "sampled_log_ratio"


def read_answers(folder: Path, measure: str) -> list[Answer]:
    """All answers of a run's records with the divergence of their tokens."""
    columns = (*_COLUMNS, measure)
    files = steps_of(find_records(folder)).values()
    return [_answer(row, measure) for path in files for row in read_record(path, columns)]


def answer_key(row: Row) -> int:
    """The same for the same prompt and answer, whoever recorded it."""
    return hash((tuple(row["prompt_ids"]), tuple(row["token_ids"])))


def where(answers: Sequence[Answer], measure: str) -> tuple[Statement, list[Table]]:
    """Where do they disagree: on how few tokens, on which, at which positions."""
    own = _own(answers)
    every = sorted((value for answer in own for value in answer.known), reverse=True)
    total = math.fsum(every)
    if not every or total <= 0:
        return Statement("Nothing to see: no divergence was recorded.", ()), []
    tenth, hundredth = (math.fsum(every[: math.ceil(len(every) * part)]) / total for part in (0.1, 0.01))
    needed, reached = 0, 0.0
    while reached < total / 2:
        reached += every[needed]
        needed += 1
    texts, bins = _texts_table(own, total, len(every)), _positions_table(own, total)
    worst = texts.rows[0]
    statement = Statement(
        f"Half of the divergence lies on {share(needed / len(every))} of the tokens.",
        (
            (
                "the worst 1 %",
                f"of the tokens hold {share(hundredth)} of the divergence, the worst 10 % {share(tenth)}",
            ),
            ("most on", f"the token “{worst[0]}”: {worst[3]} of the divergence on {worst[2]} of the tokens"),
            ("measured on", f"{len(every)} tokens of {len(own)} answers; {number(total / len(every))} nats per token"),
            ("divergence", _named(measure)),
        ),
    )
    return statement, [texts, bins]


def carries_answer(answers: Sequence[Answer]) -> tuple[Statement, list[Table]]:
    """Does the disagreement carry the answer: on the last line, on the reference, in wrong answers."""
    own = _own(answers)
    rows, grounds = [], []
    groups: tuple[tuple[str, Callable[[Answer], Sequence[bool]]], ...] = (
        ("the last line", lambda answer: answer.in_last_line),
        ("the reference answer", lambda answer: answer.in_reference),
    )
    for name, mask in groups:
        inside = [v for a in own for v, hit in zip(a.divergences, mask(a), strict=False) if hit and v is not None]
        whole = [v for a in own if len(mask(a)) for v in a.known]
        if inside and math.fsum(whole) > 0:
            part, tokens = math.fsum(inside) / math.fsum(whole), len(inside) / len(whole)
            rows.append([name, str(len(inside)), share(tokens), share(part), number(part / tokens)])
            grounds.append((name, f"{share(part)} of the divergence on {share(tokens)} of the tokens"))
        else:
            grounds.append((name, "not told apart: answers of one line, or none that says the reference"))
    right, wrong = ([a for a in own if a.reward is not None and (a.reward >= 1) == is_right] for is_right in (1, 0))
    note = "Within the answers that have such tokens; times: divergence of such a token over that of a mean one."
    heads = ["tokens", "number", "of their tokens", "of their divergence", "times"]
    tables = [Table("Tokens of the answer", heads, rows, note)]
    if right and wrong:
        means = [_mean_and_error(group) for group in (right, wrong)]
        marks = [
            [name, str(len(group)), number(mean), number(error)]
            for name, group, (mean, error) in zip(("right", "wrong"), (right, wrong), means, strict=True)
        ]
        tables.append(Table("Right and wrong answers", ["answers", "number", "nats per token", "± (1 s.e.)"], marks))
        grounds.append(("right against wrong", f"{number(means[0][0])} and {number(means[1][0])} nats per token"))
    return Statement(_carry_words(rows, right, wrong), grounds), [table for table in tables if table.rows]


def fades(answers: Sequence[Answer]) -> tuple[Statement, list[Table], list[Panel]]:
    """Does it fade with training: divergence per token by step, on the same answers and on the student's own."""
    rows, curves, words = [], [], []
    for kind, name in (("fixed", "the same answers"), ("own", "the student's own answers")):
        by_step: dict[int, list[Answer]] = defaultdict(list)
        for answer in answers:
            if answer.kind == kind and answer.known:
                by_step[answer.step].append(answer)
        means = {step: _mean_and_error(group) for step, group in sorted(by_step.items())}
        rows += [
            [str(step), name, str(len(by_step[step])), number(mean), number(error)]
            for step, (mean, error) in means.items()
        ]
        if len(means) > 1:
            errors = [error or 0.0 for _, error in means.values()]
            curves.append(Curve(name, list(means), [mean for mean, _ in means.values()], errors))
            words.append((name, _change_words(by_step, {step: mean for step, (mean, _) in means.items()}, kind)))
    table = Table(
        "By step",
        ["step", "on", "answers", "nats per token", "± (1 s.e.)"],
        rows,
        "The same answers: those of the first recorded step, looked at again. Errors are over answers.",
    )
    panels = [Panel("Divergence per token", "step", "nats", curves)] if curves else []
    if not rows:
        return Statement("Nothing to see: no divergence was recorded.", ()), [], []
    if not words:
        return Statement("One step is recorded: nothing can be said about change.", ()), [table], panels
    return Statement(_fade_words(curves[0]), words), [table], panels


def _answer(row: Row, measure: str) -> Answer:
    values = row[measure] or [None] * row["num_tokens"]
    texts = row["texts"]
    return Answer(
        row["step"],
        row["kind"],
        answer_key(row),
        row["reward"],
        texts,
        [None if value is None else abs(value) if measure == "sampled_log_ratio" else value for value in values],
        last_line(texts),
        last_mention(texts, row["reference"]),
    )


def _own(answers: Sequence[Answer]) -> list[Answer]:
    """What the student answered itself; where that was not recorded, the fixed answers as often as looked at."""
    return [a for a in answers if a.kind == "own" and a.known] or [a for a in answers if a.known]


def _texts_table(answers: Sequence[Answer], total: float, num_tokens: int) -> Table:
    sums: dict[str, list[float]] = defaultdict(list)
    for answer in answers:
        for text, value in zip(answer.texts, answer.divergences, strict=True):
            if value is not None:
                sums[text].append(value)
    worst = sorted(sums.items(), key=lambda pair: -math.fsum(pair[1]))[:_NUM_TEXTS]
    rows = [
        [visible(text), str(len(v)), share(len(v) / num_tokens), share(math.fsum(v) / total), number(_mean(v))]
        for text, v in worst
    ]
    return Table(
        "Tokens by their share of the divergence",
        ["sampled token", "number", "of all tokens", "of the divergence", "nats each"],
        rows,
    )


def _positions_table(answers: Sequence[Answer], total: float) -> Table:
    longest = max(len(answer.divergences) for answer in answers)
    width = math.ceil(longest / _NUM_BINS)
    rows = []
    for first in range(0, longest, width):
        values = [v for a in answers for v in a.divergences[first : first + width] if v is not None]
        if values:
            last = min(first + width, longest) - 1
            rows.append(
                [f"{first} to {last}", str(len(values)), share(math.fsum(values) / total), number(_mean(values))]
            )
    return Table("By position in the answer", ["positions", "tokens", "of the divergence", "nats each"], rows)


def _carry_words(rows: Sequence[Sequence[str]], right: Sequence[Answer], wrong: Sequence[Answer]) -> str:
    parts = [f"Tokens of {row[0]} hold {row[3]} of the divergence ({row[2]} of the tokens)" for row in rows[-1:]]
    if min(len(right), len(wrong)) >= _FEWEST_ANSWERS:
        low, high = (_mean_and_error(group)[0] for group in (right, wrong))
        who = "wrong" if parts else "Wrong"
        parts.append(
            f"{who} answers diverge {number(high / low)} times as much per token as right ones"
            if low > 0
            else f"{who} answers diverge by {number(high)} nats per token, right ones not at all"
        )
    elif parts and (right or wrong):
        parts.append(f"{len(right)} right and {len(wrong)} wrong answers are too few to compare")
    return "; ".join(parts) + "." if parts else "Too little was recorded to say: no lines, no references, no marks."


def _fade_words(curve: Curve) -> str:
    first, last = curve.ys[0], curve.ys[-1]
    left = last / first if first > 0 else math.nan
    verb = "fades" if left < FADED else "grows" if left > GROWN else "stays"
    change = f"{number(first)} nats per token at step {curve.xs[0]}, {number(last)} at step {curve.xs[-1]}"
    return f"It {verb} on {curve.label}: {change}."


def _change_words(by_step: dict[int, list[Answer]], means: dict[int, float], kind: str) -> str:
    first, last = min(means), max(means)
    words = f"{number(means[first])} nats per token at step {first}, {number(means[last])} at step {last}"
    if kind != "fixed":
        return words
    before = {answer.key: _mean(answer.known) for answer in by_step[first]}
    now = [(before[answer.key], _mean(answer.known)) for answer in by_step[last] if answer.key in before]
    return f"{words}; it fell on {sum(new < old for old, new in now)} of {len(now)} answers"


def _mean_and_error(answers: Iterable[Answer]) -> tuple[float, float | None]:
    """Nats per token over all tokens, and its standard error over answers (a ratio of sums); None for fewer than 2."""
    pairs = [(math.fsum(answer.known), len(answer.known)) for answer in answers]
    count, num_answers = sum(n for _, n in pairs), len(pairs)
    mean = math.fsum(total for total, _ in pairs) / count
    if num_answers < 2:
        return mean, None
    spread = math.fsum((total - mean * n) ** 2 for total, n in pairs) * num_answers / (num_answers - 1)
    return mean, math.sqrt(spread) / count


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _named(measure: str) -> str:
    if measure == "reverse_kl":
        return "reverse KL, KL(student || teacher) over the whole vocabulary"
    return "|log p(y) - log q(y)| of the sampled token, as this teacher does not tell its whole distribution"


def visible(text: str) -> str:
    """A token as a reader can see it: spaces as ␣, line breaks as ↵, control characters spelt out."""
    return printable(text).replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥") or "(nothing)"
