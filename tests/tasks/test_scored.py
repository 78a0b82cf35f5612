"""Training questions are chosen by scores from a file, and by nothing else."""

import json

import pytest
from toys import LetterTask

from opd_lightning.selection import Filtered, Weighted
from opd_lightning.tasks import ScoredTask
from opd_lightning.tasks.scored import question_digest

GAINS = [0.5, -0.25, 0.0, 1.0, 0.25, 0.5]


@pytest.fixture
def scores(tmp_path):
    """Rows as `diagnose` writes them, in another order than the problems."""

    def write(gains=GAINS, name="scores.jsonl", **changes):
        rows = [
            {"uid": problem.uid, "question": question_digest(problem), "teacher_gain": gain} | changes
            for problem, gain in zip(LetterTask(6).problems("train"), gains, strict=False)
        ]
        (tmp_path / name).write_text("".join(f"{json.dumps(row)}\n" for row in reversed(rows)))
        return str(tmp_path / name)

    return write


def kept(task):
    return [int(problem.uid.removeprefix("train/")) for problem in task.problems("train")]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"where": {"teacher_gain": {">": 0}}}, [0, 3, 4, 5]),
        ({"rank_by": "teacher_gain", "keep": 0.5}, [0, 3, 5]),
        ({"rank_by": "teacher_gain", "keep": 0.34}, [0, 3]),  # of equal scores the first in the data
        ({"rank_by": "teacher_gain", "keep": 0.01, "prefer": "lowest"}, [1]),
        ({"rank_by": "teacher_gain", "keep": 0.5, "prefer": "middle"}, [0, 4, 5]),
        ({"rank_by": "teacher_gain", "keep": 0.5, "where": {"teacher_gain": {"<": 0.5}}}, [2, 4]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*training questions are kept")
def test_what_is_kept(scores, options, expected):
    assert kept(ScoredTask(LetterTask(6), scores(), **options)) == expected


def test_scores_are_columns_for_selectors_and_held_out_splits_stay(scores):
    task = ScoredTask(LetterTask(6), scores())
    problems = task.problems("train")
    assert problems[3].columns["scores"]["teacher_gain"] == 1.0 and problems[3].columns["level"] == 0
    assert task.problems("validation") == LetterTask(6).problems("validation")
    assert task.is_graded and task.grade(problems[0], "a") == 1
    filtered = Filtered(where={"scores.teacher_gain": {">=": 0.5}})
    filtered.setup(problems, 0)
    assert sorted(filtered.select(3)) == [0, 3, 5]
    weighted = Weighted("scores.teacher_gain", least=0)
    weighted.setup(problems, 0)
    draws = [weighted.select(6) for _ in range(30)]
    assert not any({1, 2} & set(each) for each in draws) and all(2 <= each.count(3) <= 3 for each in draws)


def test_questions_without_a_row(scores):
    path = scores(GAINS[:4])
    with pytest.raises(ValueError, match=r"task\.scores: .* has no row for 2 of 6 training questions .*'train/4'"):
        ScoredTask(LetterTask(6), path).problems("train")
    with pytest.warns(UserWarning, match="4 of 6 training questions are kept by their scores"):
        assert kept(ScoredTask(LetterTask(6), path, missing="drop")) == [0, 1, 2, 3]
    with pytest.warns(UserWarning, match="4 of 6 training questions"):
        options = {"missing": "keep", "rank_by": "teacher_gain", "keep": 0.5}
        assert kept(ScoredTask(LetterTask(6), path, **options)) == [0, 3, 4, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.5}, r"task\.rank_by: keep=0.5 needs a score to rank by, such as teacher_gain"),
        ({"keep": 0, "rank_by": "x"}, r"task\.keep: expected a share in \(0, 1\], got 0"),
        ({"prefer": "best"}, r"task\.prefer: expected one of highest, lowest, middle, got 'best'"),
        ({"missing": "ask"}, r"task\.missing: expected one of refuse, drop, keep, got 'ask'"),
        ({"where": {"a": {"~": 1}}}, r"task\.where: column 'a'"),
        ({"where": {"teacher_gain": {">": 2}}}, r"task\.where: .* leaves none of the 6 .* Columns of .*: teacher_gain"),
        ({"rank_by": "overlap"}, r"task\.rank_by: no row of .* has a number in the column 'overlap'. .*: teacher_gain"),
    ],
)
def test_mistakes(scores, options, message):
    with pytest.raises(ValueError, match=message):
        ScoredTask(LetterTask(6), scores(), **options).problems("train")


def test_files_that_do_not_fit_are_refused(scores, tmp_path):
    with pytest.raises(ValueError, match=r"'train/0' in .* is of another question, or of this one in other words"):
        ScoredTask(LetterTask(6), scores(question="0" * 16)).problems("train")
    (tmp_path / "twice.jsonl").write_text('{"uid": "a"}\n{"uid": "a"}\n')
    with pytest.raises(ValueError, match=r"twice.jsonl, line 2: 'a' has a row already"):
        ScoredTask(LetterTask(6), str(tmp_path / "twice.jsonl")).problems("train")
    (tmp_path / "none.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(ValueError, match=r"none.jsonl, line 1: expected a row with the column 'uid'; columns are id"):
        ScoredTask(LetterTask(6), str(tmp_path / "none.jsonl")).problems("train")
