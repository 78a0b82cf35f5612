"""Uni-OPD's balanced data (arXiv 2605.03677): which prompts come more often, and which answers are left out."""

import json
import math
from collections import Counter

import pytest
import torch

from opd_lightning.interfaces import Problem, PromptBatch, Rollout, RolloutBatch, Sampling
from opd_lightning.methods import BalancedMarks, MarginShift, UpsampledByPasses
from opd_lightning.methods.uni_opd_data import surplus
from opd_lightning.rollouts.answer_files import FORMAT, header_path
from opd_lightning.rollouts.batching import collate
from opd_lightning.rollouts.shaping import attach


def problem(uid):
    return Problem(uid, ())


def write(path, rewards):
    rows = [{"uid": uid, "reward": reward} for uid, marks in rewards.items() for reward in marks]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


PASSES = {"none": [0] * 8, "one": [1] + [0] * 7, "seven": [1] * 7 + [0], "all": [1] * 8}
PROBLEMS = [problem(uid) for uid in PASSES]


def test_problems_that_are_passed_sometimes_come_more_often_and_none_is_lost(tmp_path):
    selector = UpsampledByPasses(write(tmp_path / "a.jsonl", PASSES), times=2.0)
    selector.setup(PROBLEMS, seed=3)
    assert (selector.state_dict()["weights"] * 6 / 4).tolist() == pytest.approx([1, 2, 2, 1])
    drawn = Counter(PROBLEMS[i].uid for i in selector.select(60))
    assert drawn["one"] + drawn["seven"] == pytest.approx(40, abs=4) and min(drawn.values()) > 5
    wider = UpsampledByPasses(selector.answers, most_passes=8)
    wider.setup(PROBLEMS, seed=3)
    assert (wider.state_dict()["weights"] * 7 / 4).tolist() == pytest.approx([1, 2, 2, 2])
    with pytest.raises(ValueError, match=r"selector\.answers: the answers in .* are not those of the checkpoint"):
        wider.load_state_dict(selector.state_dict())
    other = UpsampledByPasses(selector.answers, times=2.0)
    other.setup(PROBLEMS, seed=3)
    other.load_state_dict(selector.state_dict())
    assert other.select(40) == selector.select(40)


def test_problems_without_answers_are_refused_or_kept(tmp_path):
    path, more = write(tmp_path / "a.jsonl", PASSES), [*PROBLEMS, problem("new")]
    with pytest.raises(ValueError, match=r"has no answers to 1 of 5 .*\('new'\)|'new'.*selector\.missing: keep"):
        UpsampledByPasses(path).setup(more, 0)
    kept = UpsampledByPasses(path, missing="keep")
    kept.setup(more, 0)
    assert (kept.state_dict()["weights"] * 7 / 5).tolist() == pytest.approx([1, 2, 2, 1, 1])


@pytest.mark.parametrize(
    ("right", "wrong", "ratio", "kept"),
    [
        *[(5, 3, 1.0, (3, 3)), (2, 6, 1.0, (2, 2)), (4, 4, 1.0, (4, 4)), (0, 8, 1.0, (0, 8)), (8, 0, 1.0, (8, 0))],
        *[(6, 2, 2.0, (4, 2)), (1, 7, 2.0, (1, 7)), (3, 5, 0.5, (2, 5)), (6, 3, 0.1, (6, 3))],
    ],
)
def test_the_surplus_is_what_the_authors_code_masks(right, wrong, ratio, kept):
    gone = surplus(range(right), range(100, 100 + wrong), ratio, seed=1)
    assert (right - sum(key < 100 for key in gone), wrong - sum(key >= 100 for key in gone)) == kept
    assert gone == surplus(range(right), range(100, 100 + wrong), ratio, seed=1)


def test_who_is_left_out_is_chance():
    assert len({frozenset(surplus(range(6), range(10, 13), 1.0, seed)) for seed in range(20)}) > 5


def rollout(mark, seed=0):
    return Rollout(problem("a"), torch.tensor([1]), torch.tensor([2, 3]), torch.zeros(2), True, seed=seed, reward=mark)


def shared(source, marks, positions=(0, 1)):
    rollouts = [rollout(mark, seed) for seed, mark in enumerate(marks)]
    asked = PromptBatch([problem("a")] * len(positions), [0] * len(positions), list(positions), step=4)
    return source.share(asked, RolloutBatch(rollouts, 0, 4, Sampling()), seed=9).rollouts


def test_as_many_right_answers_as_wrong_ones_are_trained_on():
    each = shared(BalancedMarks(), [1, 1, 1, 0, 0, 0, 0, 0])
    trained = [len(one.trained_positions) for one in each]
    assert sum(trained[:3]) == 2 and trained[3:] == [2, 2, 2, 2, 2]  # the second prompt has one kind only
    assert collate(each, 0).num_tokens == 12
    whole = shared(BalancedMarks("step"), [1, 1, 1, 0, 0, 0, 0, 0])
    assert sum(len(one.trained_positions) for one in whole) == 12
    one_process = [one.seed for one in whole if not len(one.trained_positions)]
    assert one_process == [
        one.seed for one in shared(BalancedMarks("step"), [1, 1, 1, 0, 0, 0, 0, 0]) if not len(one.trained_positions)
    ]
    same = shared(BalancedMarks(), [1, 0, 0, 1])
    assert all(one.student_wrote is None for one in same)


def test_answers_that_are_left_out_have_no_say_in_the_margin():
    group = [
        attach(one, log_ratio=torch.full((2,), value))
        for one, value in zip(shared(BalancedMarks(), [1, 0, 0, 0], positions=(0,)), (-1.0, 0.0, 0.0, 0.0), strict=True)
    ]
    [shifted] = MarginShift().shape([group])
    numbers = [float(one.extras["margin"][0]) for one in shifted]
    assert numbers[0] == pytest.approx(0.7) and sorted(numbers[1:]) == pytest.approx([-0.7, 0, 0])


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: BalancedMarks().admit([], None, Sampling(), 1), r"data\.rollouts_per_prompt: .*Set it to 2 or more"),
        (lambda: shared(BalancedMarks(), [math.nan] * 2), r"data\.source: BalancedMarks needs marked answers"),
        (lambda: BalancedMarks("batch"), r"source\.per: expected one of prompt, step"),
        (lambda: BalancedMarks(right_per_wrong=0), r"source\.right_per_wrong: expected a positive number"),
        (lambda: BalancedMarks(right_from=0), r"source\.right_from: expected a mark"),
        (
            lambda: UpsampledByPasses("a.jsonl").setup(PROBLEMS, 0),
            r"selector\.answers: there is no file 'a\.jsonl'.* --num_attempts 1 --reject\.duplicates false"
            r" --reject\.truncated false --reject\.repetitive false --output a\.jsonl`",
        ),
        (
            lambda: UpsampledByPasses("a.jsonl", least_passes=3, most_passes=2),
            r"selector\.most_passes: expected 0 <= least_passes=3 <= most_passes, got 2",
        ),
        (lambda: UpsampledByPasses("a.jsonl", times=0.5), r"selector\.times: expected a finite number of at least 1"),
        (lambda: UpsampledByPasses("a.jsonl", missing="drop"), r"selector\.missing: expected one of refuse, keep"),
    ],
)
def test_mistakes(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_files_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"line 1: expected an answer with a uid and a reward, got 'a' and None"):
        UpsampledByPasses(write(tmp_path / "a.jsonl", {"a": [None]})).setup(PROBLEMS, 0)
    with pytest.raises(ValueError, match=r"no answers to 4 of 4.*Name the file of this data set"):
        UpsampledByPasses(write(tmp_path / "b.jsonl", {"a": [1]}), missing="keep").setup(PROBLEMS, 0)
    with pytest.raises(ValueError, match=r"no answers to 4 of 4"):
        UpsampledByPasses(write(tmp_path / "c.jsonl", {})).setup(PROBLEMS, 0)


@pytest.mark.parametrize(
    ("role", "counts", "rewards", "message"),
    [
        ("teacher", {}, PASSES, "holds answers of the teacher, not of the student"),
        (
            "student",
            {"kept": 25, "rejected: duplicate": 7},
            PASSES,
            r"lacks answers that were rejected \(7 duplicate\)",
        ),
        (None, {}, {**PASSES, "all": [1]}, "has 8 answers to problem 'none' and 1 to 'all'"),
    ],
)
def test_a_file_that_is_not_all_that_the_student_answered_is_refused(tmp_path, role, counts, rewards, message):
    path = tmp_path / "a.jsonl"
    selector = UpsampledByPasses(write(path, rewards))
    if role is not None:
        header_path(path).write_text(json.dumps({"format": FORMAT, "settings": {"role": role}, "counts": counts}))
    with pytest.raises(ValueError, match=f"selector.answers: .*{message}.*Write it anew .*--reject.duplicates false"):
        selector.setup(PROBLEMS, 0)


def test_a_file_of_all_that_the_student_answered_is_taken(tmp_path):
    path = tmp_path / "a.jsonl"
    selector = UpsampledByPasses(write(path, PASSES))
    counts = {"generated": 32, "kept": 32}
    header_path(path).write_text(json.dumps({"format": FORMAT, "settings": {"role": "student"}, "counts": counts}))
    selector.setup(PROBLEMS, 0)
    assert selector.epoch_length
