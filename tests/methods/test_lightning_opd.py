"""Lightning OPD 1 and 2 (arXiv 2604.13010, 2607.28449): stored scores, the student of now, and what is predictable."""

from dataclasses import replace

import pytest
import torch
from objective_cases import make_case

from opd_lightning.interfaces import ScoreRequest
from opd_lightning.methods import DebiasedTeacher, Uncorrected
from opd_lightning.objectives import SampledTokenObjective
from opd_lightning.rollouts.answer_scores import ScoredAnswer
from opd_lightning.teachers import StoredTeacher


def offline(**options):
    return SampledTokenObjective(importance=Uncorrected(), **options)


def test_the_offline_gradient_is_the_online_one_where_the_student_is_who_wrote():
    case = make_case()
    drawn = case.p.log().gather(-1, case.response_ids[:, None]).squeeze(-1)
    at_reference = replace(case, rollout_log_probs=drawn)
    online = at_reference.gradient(SampledTokenObjective())  # corrected by a ratio that is 1
    torch.testing.assert_close(at_reference.gradient(offline()), online)
    moved = replace(case, logits=case.logits * 1.5)
    assert not torch.allclose(moved.gradient(offline()), moved.gradient(SampledTokenObjective()))


def test_the_gradient_is_that_of_the_clipped_reward_under_the_student_of_now_whoever_wrote():
    case = make_case()
    log_p = case.p.log().gather(-1, case.response_ids[:, None]).squeeze(-1)
    log_q = case.q.log().gather(-1, case.response_ids[:, None]).squeeze(-1)
    advantages = (log_q - log_p).clamp(-1, 1)
    assert (advantages.abs() == 1).any() and (advantages.abs() < 1).any()
    one_hot = torch.nn.functional.one_hot(case.response_ids, case.p.shape[-1])
    expected = -advantages[:, None] * (one_hot - case.p)
    unknown = replace(case, rollout_log_probs=torch.full_like(case.rollout_log_probs, torch.nan))
    torch.testing.assert_close(unknown.gradient(offline(advantage_clip=1.0)), expected)
    assert not offline().needs_rollout_log_probs and SampledTokenObjective().needs_rollout_log_probs


def make_answers(num_answers=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    answers = []
    for i in range(num_answers):
        size = int(torch.randint(1, 12, (), generator=generator))
        drawn = -3 * torch.rand(size, generator=generator)
        ids = torch.randint(4, (size,), generator=generator, dtype=torch.int32)
        answers.append(
            (
                f"train/{i // 2}",
                ScoredAnswer(
                    place=f"line {i}",
                    prompt_ids=torch.zeros(2, dtype=torch.int32),
                    response_ids=ids,
                    places=torch.arange(size),
                    log_probs=drawn,
                    sampled=drawn - torch.rand(size, generator=generator),
                    top_ids=torch.zeros(size, 0),
                    top_log_probs=torch.zeros(size, 0),
                ),
            )
        )
    return answers


def test_the_bias_is_half_the_token_s_mean_and_half_its_cell_s_over_the_other_folds():
    answers = make_answers()
    teacher = DebiasedTeacher("a.jsonl", num_folds=3, surprisal_bounds=[0.5, 1.5], min_count=2)
    tokens = []  # fold, id, cell, residual
    for uid, answer in answers:
        for i in range(len(answer.sampled)):
            surprisal = -float(answer.log_probs[i])
            position = next(n for n in range(9) if 2 ** (n + 1) - 1 > i)  # 0, 1-2, 3-6, 7-14
            cell = (position, (surprisal > 0.5) + (surprisal > 1.5))
            residual = float(answer.sampled[i].double() - answer.log_probs[i].double())
            tokens.append((teacher.fold(uid), int(answer.response_ids[i]), cell, residual))

    def mean(fold, place, key):
        found = [each[3] for each in tokens if each[0] != fold and each[place] == key]
        return sum(found) / len(found) if len(found) >= 2 else 0.0

    expected = [(mean(fold, 1, token) + mean(fold, 2, cell)) / 2 for fold, token, cell, _ in tokens]
    found = torch.cat(teacher.predict(answers))
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert len({teacher.fold(uid) for uid, _ in answers}) == 3


def test_no_fold_sees_itself_and_answers_to_a_problem_are_in_one():
    answers = make_answers()
    teacher = DebiasedTeacher("a.jsonl", min_count=1)
    before = teacher.predict(answers)
    fold = teacher.fold(answers[0][0])
    assert 0 <= fold < 5
    changed = [
        (uid, replace(each, sampled=each.sampled - 7) if teacher.fold(uid) == fold else each) for uid, each in answers
    ]
    after = teacher.predict(changed)
    for (uid, _), old, new in zip(answers, before, after, strict=True):
        assert torch.equal(old, new) == (teacher.fold(uid) == fold)


def test_without_a_bias_it_is_1_0(tmp_path, monkeypatch):
    answers = {uid: [answer] for uid, answer in make_answers()[::2]}
    monkeypatch.setattr(StoredTeacher, "read", lambda self: answers)
    same = DebiasedTeacher("a.jsonl", min_count=10**6).read()
    assert all(torch.equal(same[uid][0].sampled, answers[uid][0].sampled) for uid in answers)
    other = DebiasedTeacher("a.jsonl").read()
    assert not all(torch.equal(other[uid][0].sampled, answers[uid][0].sampled) for uid in answers)
    assert DebiasedTeacher("a.jsonl").offer == ScoreRequest()


def test_what_cannot_be_predicted_is_said():
    (uid, answer), *_ = make_answers()
    with pytest.raises(ValueError, match=r"line 0 \(problem 'train/0'\): DebiasedTeacher needs finite scores"):
        DebiasedTeacher("a.jsonl").predict([(uid, replace(answer, log_probs=None))])
    with pytest.raises(ValueError, match=r"teacher.num_folds: expected an integer of at least 2, got 1"):
        DebiasedTeacher("a.jsonl", num_folds=1)
    with pytest.raises(ValueError, match=r"teacher.surprisal_bounds: expected rising numbers"):
        DebiasedTeacher("a.jsonl", surprisal_bounds=[2.0, 1.0])
