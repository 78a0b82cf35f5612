"""Rollouts for teachers to score, and what they should say."""

from __future__ import annotations

import torch
from conftest import VOCAB_SIZE
from transformers import AutoModelForCausalLM

from opd_lightning.interfaces import Problem, Rollout, ScoreRequest
from opd_lightning.rollouts.batching import collate

CPU = torch.device("cpu")
EVERYTHING = ScoreRequest(top_k=16, arbitrary_ids=True, full_vocabulary=True)


def make_batches(num_batches: int = 1, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    batches, rollouts = [], []
    for _ in range(num_batches):
        group = []
        for num_prompt, num_response in ((3, 5), (6, 2), (1, 9)):
            ids = torch.randint(7, VOCAB_SIZE, (num_prompt + num_response,), generator=generator)
            problem = Problem(uid="u", messages=(), answer="")
            group.append(
                Rollout(problem, ids[:num_prompt], ids[num_prompt:], torch.zeros(num_response), finished=True, seed=0)
            )
        rollouts.append(group)
        batches.append(collate(group, 0))
    return batches, rollouts


def reference(folder, rollouts, temperature: float = 1.0) -> torch.Tensor:
    """[N, V] log-probabilities, row by row without padding, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    rows = []
    for rollout in rollouts:
        ids = torch.cat([rollout.prompt_ids, rollout.response_ids])[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1, :VOCAB_SIZE]
        rows.append((logits / temperature).log_softmax(-1))
    return torch.cat(rows)


def check_everything(teacher) -> None:
    """Whatever may be asked of a ready teacher is given, and all of it agrees."""
    everything = ScoreRequest(top_k=VOCAB_SIZE, arbitrary_ids=True, full_vocabulary=True)
    teacher.check(everything)
    (batch,), _ = make_batches()
    scores = teacher.score(batch, everything)
    full = scores.full()
    expected = full.sort(dim=-1, descending=True)
    ids, values = scores.topk(VOCAB_SIZE)
    torch.testing.assert_close(values, expected.values)
    torch.testing.assert_close(full.gather(-1, ids), values)
    torch.testing.assert_close(scores.at(ids[:, ::2]), values[:, ::2])
    torch.testing.assert_close(scores.sampled(), full.gather(-1, batch.tokens.ids[:, None]).squeeze(-1))
