"""BRTS (arXiv 2605.09725): which of the teacher's answers is chosen, and the loss on both kinds of answers."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from objective_cases import forward_kl, make_case
from own_students import BigramStudent

from opd_lightning.interfaces import Problem, Prompt, Rollout, Sampling, ScoreRequest, StepPrompts
from opd_lightning.methods import BestOfTeacher, SDPOObjective, TwoContexts, brts
from opd_lightning.methods.brts import eligible, likeliest_tokens, likeness, with_shares
from opd_lightning.objectives import DivergenceObjective, ForwardKL, FullVocabulary, StudentTopK
from opd_lightning.rollouts.batching import collate
from opd_lightning.rollouts.plain_engine import PlainEngine
from opd_lightning.rollouts.shaping import attach
from opd_lightning.rollouts.stored import Stored

PROBLEM = Problem("a", ({"role": "user", "content": "12"},), answer="3")
SAMPLING = Sampling(max_new_tokens=6, stop_ids=[])


def answer(ids, reward=0.0, seed=0):
    ids = torch.tensor(ids)
    return Rollout(PROBLEM, torch.tensor([1, 2]), ids, torch.zeros(len(ids)), True, seed=seed, reward=reward)


def test_a_wrong_answer_is_never_eligible_while_there_is_a_right_one():
    wrong, right, partly, told = (answer([i], reward) for i, reward in enumerate((0.0, 1.0, 0.5, 1.0)))
    assert eligible([wrong, right, partly, right], [told], 1.0) == [right, right]
    assert eligible([wrong, partly], [told], 1.0) == [told]
    assert eligible([wrong, partly], [replace(told, reward=0.0)], 1.0) == [wrong, partly]
    assert eligible([wrong, partly], [], 0.5) == [partly]


def test_likeness_is_the_share_of_tokens_in_the_students_lists_as_far_as_both_go():
    lists = torch.tensor([[1, 2], [3, 4], [5, 6]])
    assert likeness(torch.tensor([2, 9, 5]), lists) == pytest.approx(2 / 3)
    assert likeness(torch.tensor([2, 3, 6, 9, 9]), lists) == 1
    assert likeness(torch.tensor([9]), lists) == likeness(torch.tensor([1]), lists[:0]) == 0


class Live:
    """A live student that everybody may look at."""

    def __init__(self):
        self.spec, self.weight_version, self.heard = BigramStudent(), 3, []
        self.model = self.spec.load()

    def autocast(self):
        return nullcontext()

    def announce(self, rollout, step):
        self.heard.append(rollout.seed)


class Written(Stored):
    """Answers from a list."""

    def __init__(self, *found):
        super().__init__("made.jsonl")
        self.found = list(found)

    def marks(self, problem):
        return [each.reward for each in self.found]

    def answers(self, prompt, sampling, tokenizer):
        return [replace(self.found[i % len(self.found)], seed=-1) for i in range(len(prompt.seeds))]


def roll_out(source, student=None, num_rollouts=2):
    source.setup(PlainEngine())
    source.engine.setup(BigramStudent(), torch.device("cpu"))
    prompt = Prompt(PROBLEM, (1, 2), tuple(range(num_rollouts)))
    return source.rollouts(StepPrompts(5, (0,), (prompt,)), SAMPLING, student or Live())


def test_of_the_right_answers_the_one_most_like_the_students_own_stands_beside_it():
    student = Live()
    own = roll_out(BestOfTeacher(Written(answer([0])), num_candidates=1), student).rollouts[0]
    lists = likeliest_tokens(student, [own], 2)[id(own)]
    logits = student.model["head"](student.model["body"](torch.cat([torch.tensor([2]), own.response_ids[:-1]])))
    assert lists.tolist() == logits.topk(2).indices.tolist()
    unlike = [next(i for i in range(9) if i not in row) for row in lists.tolist()]
    alike = [row[1] for row in lists.tolist()]
    wrong, right = answer(alike), (answer(unlike, 1.0), answer(alike, 1.0), answer(alike[:3], 1.0))
    batch = roll_out(BestOfTeacher(Written(wrong, *right), num_candidates=4, k=2), student)
    mine, beside = batch.rollouts
    assert batch.staleness is None and student.heard == [0, 1, 0, 1]
    assert torch.equal(mine.response_ids, own.response_ids) and mine.seed == 0
    assert beside.response_ids.tolist() == alike and beside.seed == 1  # the first of two equals
    assert beside.log_probs.isnan().all() and beside.reward != beside.reward  # the task marks it again
    assert mine.extras["teacher_context"].tolist() == [0] * 6 and beside.extras["teacher_context"].tolist() == [1] * 6
    told = roll_out(BestOfTeacher(Written(wrong), Written(answer([7], 1.0)), num_candidates=2), student)
    assert told.rollouts[1].response_ids.tolist() == [7] and told.rollouts[1].prompt_ids.tolist() == [1, 2]


def test_one_candidate_needs_no_look_at_the_student_and_each_answer_has_its_own():
    source = BestOfTeacher(Written(answer([4]), answer([5])), num_candidates=1)
    batch = roll_out(source, num_rollouts=4)
    assert [each.seed for each in batch.rollouts] == [0, 1, 2, 3]
    assert [each.response_ids.tolist() for each in batch.rollouts[2:]] == [[4], [5]]
    assert likeliest_tokens(SimpleNamespace(), [], 16) == {}


def test_a_student_that_is_cut_up_is_refused_whether_or_not_a_process_is_in_doubt(monkeypatch):
    monkeypatch.setattr(brts, "is_sharded", lambda model: True)
    for right in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"data\.source: BestOfTeacher .* or source\.num_candidates: 1"):
            roll_out(BestOfTeacher(Written(answer([4], right), answer([5])), num_candidates=2))
    assert len(roll_out(BestOfTeacher(Written(answer([4])), num_candidates=1)).rollouts) == 2


def test_state_is_that_of_its_files():
    source = BestOfTeacher(Stored("a.jsonl"), Stored("b.jsonl"))
    state = source.state_dict()
    assert state.keys() == {"candidates", "recovered"}
    source.load_state_dict(state)
    source.load_state_dict({})
    with pytest.raises(ValueError, match=r"'b\.jsonl' has changed"):
        source.load_state_dict({"recovered": {"digest": "another"}})
    alone = BestOfTeacher(Stored("a.jsonl"))
    for resumed, written in ((alone, source), (source, alone)):
        with pytest.raises(ValueError, match=r"data\.source\.recovered: .* Resume with the same"):
            resumed.load_state_dict(written.state_dict())
    alone.load_state_dict(alone.state_dict())


def shaped(num_own, num_theirs):
    """Tokens of a step of one answer of each kind, some of them of no length."""
    kinds = [(0.0, num_own), (1.0, num_theirs)]
    told = [attach(answer([3] * n), teacher_context=torch.full((n,), kind)) for kind, n in kinds]
    return collate(with_shares(told), 0).tokens


def losses_of(objective, case, num_own):
    tokens = shaped(num_own, len(case.logits) - num_own)
    tokens = replace(tokens, ids=case.response_ids)
    return objective.token_losses(case.logits, case.scores(), tokens)


def test_the_loss_is_the_mean_of_one_kind_plus_the_weighted_mean_of_the_other():
    case = make_case(n=6)
    objective = TwoContexts(10.0, DivergenceObjective(StudentTopK(4)), DivergenceObjective(divergence=ForwardKL()))
    own = case.losses(DivergenceObjective(StudentTopK(4)))[:4]
    theirs = forward_kl(case.p, case.q)[4:]
    found = losses_of(objective, case, num_own=4)
    torch.testing.assert_close(found.mean(), own.mean() + 10 * theirs.mean(), rtol=1e-6, atol=0)
    assert TwoContexts(0.0).request() == ScoreRequest(top_k=16, arbitrary_ids=True)
    # what the teacher's answers were drawn with is not known, so such a run is refused
    assert TwoContexts(1.0, SDPOObjective()).needs_rollout_log_probs and not TwoContexts(1.0).needs_rollout_log_probs


def test_without_answers_of_the_teacher_it_is_the_plain_loss_to_the_bit_and_without_weight_to_rounding():
    case = make_case(n=6)
    plain = case.losses(DivergenceObjective(StudentTopK(16)))
    assert torch.equal(losses_of(TwoContexts(10.0), case, num_own=6), plain)
    assert torch.equal(case.losses(TwoContexts(10.0)), plain)  # rollouts of another source
    ignored = losses_of(TwoContexts(0.0), case, num_own=3)
    torch.testing.assert_close(ignored.mean(), plain[:3].mean(), rtol=1e-6, atol=0)
    assert not ignored[3:].any()
    empty = make_case(n=0)
    assert losses_of(TwoContexts(1.0), empty, num_own=0).tolist() == []


def test_no_gradient_where_both_agree():
    case = make_case(n=6).agreeing()
    logits = case.logits.clone().requires_grad_()
    losses = losses_of(TwoContexts(10.0), replace(case, logits=logits), num_own=2)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


def refuse(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_mistakes(tmp_path):
    tokenizer, source = BigramStudent().tokenizer, BestOfTeacher(Written(answer([1], float("nan"))))
    source.candidates.admit = lambda problems, *_: list(problems)
    refuse(lambda: source.admit([PROBLEM], tokenizer, SAMPLING, 3), r"data\.rollouts_per_prompt: .*even.*got 3\. Set")
    refuse(lambda: source.admit([PROBLEM], tokenizer, SAMPLING, 2), r"source\.candidates: .*no marks.*Write the file")
    source = BestOfTeacher(Written(answer([1], 1.0)), Written(answer([1], 1.0), answer([2], float("nan"))))
    source.candidates.admit = source.recovered.admit = lambda problems, *_: list(problems)
    refuse(lambda: source.admit([PROBLEM], tokenizer, SAMPLING, 2), r"source\.recovered: .*no marks.*Write the file")
    (tmp_path / "a.jsonl").write_text('{"uid": "a", "response": "3", "finished": false}\n')
    source = BestOfTeacher(Stored(str(tmp_path / "a.jsonl"), reencode=True), num_candidates=3)
    refuse(
        lambda: source.admit([PROBLEM], tokenizer, SAMPLING, 4),
        r"1 have fewer than the 6 .*--num_samples 6 --reject\.duplicates false`, or lower data\.source\.num_candidates,"
        r" now 3 for each answer of the student\.$",
    )
    refuse(lambda: BestOfTeacher(Written(), num_candidates=0), r"source\.num_candidates: expected .* at least 1")
    refuse(lambda: BestOfTeacher(Written(), right_from=0), r"source\.right_from: expected a mark in \(0, 1\]")
    refuse(lambda: TwoContexts(-1), r"objective\.teacher_weight: expected a number of at least 0")
    warm = DivergenceObjective(FullVocabulary(), teacher_temperature=2.0)
    refuse(lambda: TwoContexts(1, teacher_context=warm), r"teacher_context\.teacher_temperature: expected that of")
