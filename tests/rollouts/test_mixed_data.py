"""`MixedData`: the student's answers or fixed ones, by coins that are functions of what they are tossed for."""

from contextlib import nullcontext

import pytest
import torch

from opd_lightning.interfaces import Problem, Prompt, Rollout, RolloutBatch, RolloutSource, Sampling, StepPrompts
from opd_lightning.randomness import derive_seed
from opd_lightning.rollouts.mixed_data import MixedData
from opd_lightning.rollouts.on_policy import OnPolicy
from opd_lightning.rollouts.plain_engine import PlainEngine
from opd_lightning.rollouts.teacher_mixed import TeacherMixed

SAMPLING = Sampling(max_new_tokens=4)


def rollouts_of(prompts, text):
    ids = torch.tensor([1])
    return [
        Rollout(prompt.problem, ids, ids, torch.zeros(1), True, seed, text=text)
        for prompt in prompts
        for seed in prompt.seeds
    ]


class Own(PlainEngine):
    """Answers with a word."""

    def sync(self, model, weight_version):
        self.weight_version = weight_version

    def generate(self, prompts, sampling, on_rollout=None):
        return rollouts_of(prompts, "own")


class Others(RolloutSource):
    """Has answers with another word."""

    staleness = None
    state = 0

    def rollouts(self, step, sampling, student):
        return RolloutBatch(rollouts_of(step.prompts, "fixed"), student.weight_version, step.step, sampling)

    def knows_log_probs(self, sampling):
        return False

    def state_dict(self):
        return {"state": self.state}

    def load_state_dict(self, state):
        self.state = state.get("state", 0)


class Live:
    model, weight_version = None, 3

    def autocast(self):
        return nullcontext()

    def announce(self, rollout, step):
        pass


def words(step, num_prompts=8, **settings):
    source = MixedData(Others(), **settings)
    source.setup(Own())
    prompts = tuple(
        Prompt(Problem(f"{place}", ()), (1,), tuple(derive_seed(step, place, i) for i in range(2)))
        for place in range(num_prompts)
    )
    batch = source.rollouts(StepPrompts(step, tuple(range(num_prompts)), prompts), SAMPLING, Live())
    assert [rollout.problem.uid for rollout in batch.rollouts] == [f"{place // 2}" for place in range(2 * num_prompts)]
    assert [rollout.seed for rollout in batch.rollouts] == [seed for prompt in prompts for seed in prompt.seeds]
    assert (batch.step, batch.weight_version) == (step, 3)
    found = [rollout.text for rollout in batch.rollouts]
    assert batch.staleness == (0 if set(found) == {"own"} else None)
    return found


def test_one_coin_for_each_step_is_the_same_however_often_it_is_tossed():
    steps = [words(step) for step in range(40)]
    assert all(len(set(found)) == 1 for found in steps)
    assert 10 < sum(found[0] == "own" for found in steps) < 30
    assert steps == [words(step) for step in range(40)]
    assert steps != [words(step, seed=1) for step in range(40)]
    assert steps[7] == words(7, num_prompts=3) * 2 + words(7, num_prompts=2)  # processes with other shares agree


def test_one_coin_for_each_prompt():
    found = words(0, num_prompts=400, per="prompt", student_share=0.25)
    assert found[::2] == found[1::2]  # all answers to a prompt come from one side
    assert 60 < found[::2].count("own") < 140


def test_the_ends_are_the_student_alone_and_the_fixed_answers_alone():
    for per in ("step", "prompt"):
        assert {word for step in range(20) for word in words(step, student_share=1.0, per=per)} == {"own"}
        assert {word for step in range(20) for word in words(step, student_share=0.0, per=per)} == {"fixed"}


def test_every_process_takes_the_weights_over_where_one_of_them_may_need_them():
    for per, synced in (("step", -1), ("prompt", 3)):
        source = MixedData(Others(), student_share=0.0, per=per)
        source.setup(Own())
        source.rollouts(StepPrompts(0, (0,), (Prompt(Problem("a", ()), (1,), (5,)),)), SAMPLING, Live())
        assert source.engine.weight_version == synced


def test_it_says_what_the_fixed_source_says():
    source = MixedData(Others())
    source.setup(Own())
    assert source.staleness is None
    assert not source.knows_log_probs(SAMPLING)
    source.load_state_dict({"fixed": {"state": 5}})
    assert source.state_dict() == {"fixed": {"state": 5}}
    source.load_state_dict({})
    assert source.fixed.state == 0


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: MixedData(Others(), student_share=1.5), r"source\.student_share: expected a probability"),
        (lambda: MixedData(Others(), per="token"), r"source\.per: expected step or prompt"),
        (lambda: MixedData(OnPolicy()), r"source\.fixed: OnPolicy has the student answer.*Stored"),
        (lambda: MixedData(TeacherMixed()), r"source\.fixed: TeacherMixed has the student answer.*Stored"),
        (lambda: MixedData(MixedData(Others())), r"source\.fixed: MixedData has the student answer.*Stored"),
    ],
)
def test_mistakes(act, message):
    with pytest.raises(ValueError, match=message):
        act()
