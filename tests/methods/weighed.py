"""Responses by hand for tests of token weightings: what a step knew of them, and the micro-batch they make."""

import torch

from opd_lightning.interfaces import Problem, Rollout, StepFacts, TrainedRollout
from opd_lightning.rollouts.batching import collate


def trained(facts, *, own=None, seed=0):
    """A response whose tokens have these facts, by name; `own` says which of its tokens the student wrote."""
    facts = {name: torch.as_tensor(values, dtype=torch.float32) for name, values in facts.items()}
    number = len(next(iter(facts.values())))
    wrote = None if own is None else torch.tensor(own, dtype=torch.bool)
    length = number if wrote is None else len(wrote)
    assert wrote is None or int(wrote.sum()) == number
    rollout = Rollout(
        problem=Problem(uid=str(seed), messages=(), answer=""),
        prompt_ids=torch.tensor([1]),
        response_ids=torch.arange(length) + 2,
        log_probs=torch.zeros(length),
        finished=True,
        seed=seed,
        student_wrote=wrote,
    )
    return TrainedRollout(rollout, torch.zeros(number), facts)


def weigh(weighting, *responses):
    """Weights of each response."""
    batch = collate([each.rollout for each in responses], pad_id=0)
    names = responses[0].facts
    facts = {name: torch.cat([each.facts[name] for each in responses]) for name in names}
    return [part.tolist() for part in batch.by_rollout(weighting(facts, batch))]


def step(*responses, number=0):
    return StepFacts(number, responses)
