"""What records say in words has the numbers of a calculation by hand."""

import math

import pytest
from recorded_tokens import divergence, row

from opd_lightning.reports.token_findings import _answer, carries_answer, fades, visible, where


def answers(steps=(0, 10), num_answers=4, measure="reverse_kl", kind="own", texts=None, **columns):
    texts = texts or ["so ", "the", " sum", "\n", "is ", "42", "<|im_end|>"]
    return [
        _answer(row(step, answer, texts, kind=kind, **columns), measure)
        for step in steps
        for answer in range(num_answers)
    ]


def test_where():
    statement, (texts, positions) = where(answers(steps=(0,)), "reverse_kl")
    total = sum(3.0 - 0.5 * a + 6 * 0.02 for a in range(4))  # one peak each, of 3, 2.5, 2 and 1.5 nats
    assert statement.words == "Half of the divergence lies on 7.1% of the tokens."  # two of 28
    grounds = dict(statement.grounds)
    assert grounds["most on"] == f"the token “␣sum”: {9 / total:.1%} of the divergence on 14.3% of the tokens"
    assert grounds["the worst 1 %"].endswith(f"{3 / total:.1%} of the divergence, the worst 10 % {7.5 / total:.1%}")
    assert grounds["measured on"] == f"28 tokens of 4 answers; {total / 28:.3g} nats per token"
    assert texts.rows[0] == ["␣sum", "4", "14.3%", f"{9 / total:.1%}", "2.25"]
    assert [line[0] for line in positions.rows] == ["0 to 1", "2 to 3", "4 to 5", "6 to 6"]
    assert positions.rows[1][2] == f"{9.08 / total:.1%}"


def test_does_it_carry_the_answer():
    statement, tables = carries_answer(answers(num_answers=8))
    assert [line[0] for line in tables[0].rows] == ["the last line", "the reference answer"]
    peaks = sum(3.0 - 0.5 * a for a in range(8))
    whole = peaks + 8 * 6 * 0.02
    last_line, reference = tables[0].rows  # three tokens of seven; one
    assert last_line[1:4] == ["48", "42.9%", f"{8 * 3 * 0.02 / whole:.1%}"]
    assert reference[1:] == ["16", "14.3%", f"{8 * 0.02 / whole:.1%}", f"{8 * 0.02 / whole * 7:.3g}"]
    right, wrong = ([a for a in range(8) if a % 3 == mark] for mark in (0, 1))  # the others have no mark
    means = [sum(3.0 - 0.5 * a + 0.12 for a in group) / (7 * len(group)) for group in (right, wrong)]
    scaled = [mean * (1 + 1 / 11) / 2 for mean in means]
    assert f"wrong answers diverge {scaled[1] / scaled[0]:.3g} times as much per token as right ones" in statement.words
    assert [line[1] for line in tables[1].rows] == ["6", "6"]


def test_does_it_fade():
    statement, (table,), (panel,) = fades(answers(kind="fixed") + answers(steps=(0,)))
    first, last = (sum(divergence(p, a, s) for p in range(7) for a in range(4)) / 28 for s in (0, 10))
    assert statement.words == (
        f"It fades on the same answers: {first:.3g} nats per token at step 0, {last:.3g} at step 10."
    )
    assert dict(statement.grounds)["the same answers"].endswith("it fell on 4 of 4 answers")
    errors = [sum(divergence(p, a, 0) for p in range(7)) - 7 * first for a in range(4)]
    assert table.rows[0] == [
        "0",
        "the same answers",
        "4",
        f"{first:.3g}",
        f"{math.sqrt(sum(e * e for e in errors) * 4 / 3) / 28:.3g}",
    ]
    assert [curve.label for curve in panel.curves] == ["the same answers"] and panel.curves[0].xs == [0, 10]
    assert fades(answers(steps=(3,)))[0].words.startswith("One step is recorded")
    grown = fades(answers(steps=(0,)) + [_later(each) for each in answers(steps=(0,))])[0]
    assert grown.words.startswith("It grows on the student's own answers")


def _later(answer):
    from dataclasses import replace

    return replace(answer, step=5, divergences=[2 * value for value in answer.divergences])


def test_a_teacher_of_lists_is_measured_by_the_sampled_token():
    found = answers(steps=(0,), measure="sampled_log_ratio", lists_only=True)
    statement, _ = where(found, "sampled_log_ratio")
    assert dict(statement.grounds)["most on"].startswith(
        "the token “the”: "
    )  # 1.5 nats below, which is as far as above
    assert "does not tell its whole distribution" in dict(statement.grounds)["divergence"]


@pytest.mark.parametrize(
    ("texts", "hits"),
    [
        (["4", "2", "=", "42"], [False, False, False, True]),
        (["is 4", "2."], [True, True]),
        (["nothing"], []),
        (["42", " #", "142", "."], [True, False, False, False]),
        (["42", ", 42", ".5"], [True, False, False]),
        (["42", " 1,", "42"], [True, False, False]),
        (["42", " = ", "-", "42"], [True, False, False, False]),
        (["x=50", "-", "42", "."], [False, False, True, False]),
        (["答案是", "42", "。"], [False, True, False]),
        (["42nd of x42"], []),
    ],
)
def test_the_reference_is_found_across_tokens_at_its_last_place(texts, hits):
    (answer,) = answers(steps=(0,), num_answers=1, texts=texts)
    assert list(answer.in_reference) == hits


def test_little_is_said_of_little():
    nothing = answers(steps=(0,), num_answers=1, texts=["one"], reverse_kl=None)
    assert where(nothing, "reverse_kl")[0].words == "Nothing to see: no divergence was recorded."
    assert "Too little was recorded" in carries_answer(nothing)[0].words
    assert [visible(text) for text in (" a", "\n", "", "\x1b")] == ["␣a", "↵", "(nothing)", "\\x1b"]
