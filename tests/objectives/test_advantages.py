"""The seam of advantages, with the control variate of vOPD (arXiv 2605.07865): A = log q(y) - log p(y) + KL(p || q)."""

from dataclasses import replace

import pytest
import torch
from objective_cases import make_case

from opd_lightning.interfaces import Advantage, Problem, Rollout, ScoreRequest
from opd_lightning.methods import KLBaseline
from opd_lightning.objectives import (
    DivergenceObjective,
    SampledTokenObjective,
)


class Remembered(Advantage):
    """Notes what it is given."""

    def __call__(self, *given):
        self.given = given
        return given[0]


def test_an_advantage_asks_the_teacher_for_what_it_needs():
    objective = SampledTokenObjective(advantage=KLBaseline(), teacher_temperature=2.0)
    assert objective.request() == ScoreRequest(full_vocabulary=True, temperature=2.0)
    assert SampledTokenObjective(advantage=Remembered()).request() == ScoreRequest()


def test_an_advantage_sees_clipped_rewards_tempered_logits_and_the_tokens_and_no_gradient():
    case = make_case()
    advantage = Remembered()
    objective = SampledTokenObjective(advantage=advantage, advantage_clip=0.5, student_temperature=0.5)
    tokens = replace(case.tokens, extras={"depth": torch.arange(4.0)})
    logits = case.logits.clone().requires_grad_()
    losses = objective.token_losses(logits, case.scores(), tokens)
    rewards, student_logits, teacher, seen = advantage.given
    log_p = (case.logits / 0.5).log_softmax(-1)[range(4), case.response_ids]
    torch.testing.assert_close(rewards, (case.q.log()[range(4), case.response_ids] - log_p).clamp(-0.5, 0.5))
    torch.testing.assert_close(student_logits, case.logits / 0.5)
    assert teacher.num_tokens == 4
    assert seen.extras["depth"].tolist() == [0, 1, 2, 3]
    assert not rewards.requires_grad
    assert not student_logits.requires_grad
    assert losses.requires_grad


@pytest.mark.parametrize("advantage", [None, KLBaseline(), KLBaseline(3)], ids=["none", "exact", "top 3"])
def test_who_looks_on_sees_the_advantages_of_the_losses(advantage):
    case = make_case(2)
    objective = SampledTokenObjective(advantage=advantage, importance=None, advantage_clip=0.3)
    shown = objective.advantages(case.logits, case.scores(), case.tokens)
    log_probs = case.p.log()[range(4), case.response_ids]
    torch.testing.assert_close(-shown * log_probs, case.losses(objective))
    assert DivergenceObjective().advantages(case.logits, case.scores(), case.tokens) is None


class Shifted(Advantage):
    """Adds to every token the mean log-ratio of its response."""

    needs_log_ratios = True

    def shape(self, groups):
        def shifted(rollout):
            ratios = rollout.extras["log_ratio"]
            return replace(rollout, extras={"shift": ratios.mean().expand(len(ratios))})

        return [[shifted(rollout) for rollout in group] for group in groups]

    def __call__(self, rewards, student_logits, teacher, tokens):
        return rewards + tokens.extras["shift"]


def test_an_advantage_may_look_at_whole_groups_whose_log_ratios_are_clipped_as_rewards_are():
    ids, ratios = torch.tensor([1, 2]), torch.tensor([0.5, -3.0])
    rollout = Rollout(Problem("a", ()), ids, ids, torch.zeros(2), True, seed=0, extras={"log_ratio": ratios})
    for clip, mean in [(None, -1.25), (1.0, -0.25)]:
        objective = SampledTokenObjective(importance=None, advantage=Shifted(), advantage_clip=clip)
        assert objective.needs_log_ratios
        assert objective.needs_rollout_log_probs  # what log-ratios are made of
        [[shaped]] = objective.shape([[rollout]])
        assert shaped.extras["shift"].tolist() == [mean, mean]
    assert not SampledTokenObjective(advantage=KLBaseline()).needs_log_ratios
