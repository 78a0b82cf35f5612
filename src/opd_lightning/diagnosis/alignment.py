"""Does the teacher push where rewards would? At single tokens, against the ideal gradient (arXiv 2605.10889).

At a state the student's logits get the gradient p_j (f_j - mean of f under p) from any distillation of this kind, with
f = log q - log p for the reverse KL. Were the probability S_j of a right answer after each token j known, the gradient
of the expected reward would have f = S. S is measured here: a token is forced, and the student goes on several times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd_lightning.diagnosis.estimates import estimate_mean, is_right
from opd_lightning.diagnosis.measurements import Alignment
from opd_lightning.interfaces import Prompt, Rollout, Sampling, Task, Tokenizer, TrainedRollout
from opd_lightning.randomness import derive_seed, hashed_uniforms
from opd_lightning.rollouts.answering import closed_text, grade, resolve_stop_ids

NUM_CANDIDATES = 4
NUM_CONTINUATIONS = 8
ROUNDING = 1e-6  # below it, differences of float32 log-probabilities are noise
Generate = Callable[[Sequence[Prompt], Sampling], list[Rollout]]


@dataclass(frozen=True)
class Node:
    """A state on the way of an answer, and the tokens that might come next.

    Attributes:
        rollout: The answer.
        position: Of the token that is replaced.
        ids: int64 [m], candidates.
        log_p: [m], the student's.
        log_q: [m], the teacher's.
    """

    rollout: Rollout
    position: int
    ids: Tensor
    log_p: Tensor
    log_q: Tensor


def logit_gradient(log_p: Tensor, values: Tensor) -> Tensor:
    """p_j (f_j - sum of p f): the gradient of sum of p f in the logits [m], whose entries sum to 0.

    Args:
        log_p: [m], normalised here over the candidates.
        values: [m], f of each.
    """
    p = log_p.double().softmax(-1)
    values = values.double()
    return p * (values - (p * values).sum(-1, keepdim=True))


def alignment(log_p: Tensor, log_q: Tensor, successes: Tensor) -> float:
    """Cosine of the reverse KL's descent with the gradient of the expected reward, on the candidates [m].

    Args:
        log_p: [m], the student's.
        log_q: [m], the teacher's.
        successes: [m], share of right answers after each.

    Returns:
        NaN where one of the two is 0: no candidate is better than another, or the teacher agrees with the student.
    """
    log_p, log_q = log_p.double().log_softmax(-1), log_q.double().log_softmax(-1)
    pushes, successes = log_q - log_p, successes.double()
    if min(float(each.max() - each.min()) for each in (pushes, successes)) < ROUNDING:
        return torch.nan
    one, other = logit_gradient(log_p, pushes), logit_gradient(log_p, successes)
    return float(one @ other) / float(one.norm() * other.norm())


def draw_positions(compared: Sequence[TrainedRollout], seed: int) -> list[int]:
    """One position of each answer, drawn in proportion to the student's entropy: where there is a choice to make."""
    found = []
    for each in compared:
        weights = each.facts["student_entropy"].double().clamp(min=1e-9).cumsum(0)
        drawn = hashed_uniforms(torch.tensor([derive_seed(seed, "alignment", each.rollout.seed)]), 0) * weights[-1]
        place = min(int(torch.searchsorted(weights, drawn)), len(weights) - 1)
        found.append(int(each.rollout.trained_positions[place]))
    return found


@dataclass(frozen=True)
class Forcing:
    """How answers go on after a token that was forced.

    Attributes:
        generate: The student's engine.
        task: Marks the answers.
        tokenizer: Decodes them.
        sampling: How the student's were sampled.
        seed: Of the run.
        num_continuations: Of each candidate.
    """

    generate: Generate
    task: Task
    tokenizer: Tokenizer
    sampling: Sampling
    seed: int
    num_continuations: int = NUM_CONTINUATIONS


def measure_alignment(nodes: Sequence[Node], forcing: Forcing) -> Alignment:
    """Force each candidate at each node, let the student go on, and compare the two gradients.

    Shares of a few continuations are noisy, which makes cosines smaller than they are. Only candidates take part: both
    models are renormalised on them.

    Args:
        nodes: At least one; those of one prompt count as dependent.
        forcing: How the student goes on.
    """
    cosines: list[tuple[Rollout, float]] = []
    for node in nodes:
        shares = torch.tensor([_success(node, token, forcing) for token in node.ids.tolist()])
        cosines.append((node.rollout, alignment(node.log_p, node.log_q, shares)))
    known = [(rollout, cosine) for rollout, cosine in cosines if cosine == cosine]
    right, wrong = ([pair for pair in known if is_right(pair[0]) is wanted] for wanted in (True, False))
    return Alignment(
        num_nodes=len(nodes),
        num_informative=len(known),
        cosine=estimate_mean(_by_prompt(known)) if known else None,
        after_right=estimate_mean(_by_prompt(right)) if right else None,
        after_wrong=estimate_mean(_by_prompt(wrong)) if wrong else None,
    )


def _success(node: Node, token: int, forcing: Forcing) -> float:
    """Mean reward of answers that have this token at the node."""
    rollout, begun = node.rollout, [*node.rollout.response_ids[: node.position].tolist(), token]
    left = forcing.sampling.max_new_tokens - len(begun)
    closes = token in resolve_stop_ids(forcing.tokenizer, forcing.sampling)
    if closes or left < 1:
        ends: list[tuple[list[int], bool]] = [([], closes)]
    else:
        seeds = tuple(
            derive_seed(forcing.seed, "forced", rollout.seed, token, i) for i in range(forcing.num_continuations)
        )
        prompt = Prompt(rollout.problem, (*rollout.prompt_ids.tolist(), *begun), seeds)
        found = forcing.generate([prompt], replace(forcing.sampling, max_new_tokens=left))
        ends = [(each.response_ids.tolist(), each.finished) for each in found]
    answers = [
        replace(
            rollout,
            response_ids=torch.tensor([*begun, *ids]),
            log_probs=torch.full((len(begun) + len(ids),), torch.nan),
            finished=finished,
            text=closed_text(forcing.tokenizer, [*begun, *ids], finished),
        )
        for ids, finished in ends
    ]
    return sum(each.reward for each in grade(forcing.task, answers)) / len(answers)


def _by_prompt(pairs: Sequence[tuple[Rollout, float]]) -> list[list[float]]:
    groups: dict[str, list[float]] = {}
    for rollout, cosine in pairs:
        groups.setdefault(rollout.problem.uid, []).append(cosine)
    return list(groups.values())
