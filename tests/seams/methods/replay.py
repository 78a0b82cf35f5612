"""Answers from a JSONL file of {"uid": ..., "response": ...} in place of the student's own."""

import json
from pathlib import Path

import torch

from opd_lightning.interfaces import Rollout, RolloutBatch, RolloutSource


class Replay(RolloutSource):
    staleness = None  # others wrote them

    def __init__(self, path: str):
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        self.answers = {line["uid"]: line["response"] for line in map(json.loads, lines)}

    def knows_log_probs(self, sampling):
        return False

    def rollouts(self, step, sampling, student):
        tokenizer = student.spec.tokenizer
        rollouts = []
        for prompt in step.prompts:
            text = self.answers[prompt.problem.uid]
            token_ids = [*tokenizer.encode(text), tokenizer.stop_ids[0]][: sampling.max_new_tokens]
            for seed in prompt.seeds:
                rollouts.append(
                    Rollout(
                        problem=prompt.problem,
                        prompt_ids=torch.tensor(prompt.token_ids),
                        response_ids=torch.tensor(token_ids),
                        log_probs=torch.full((len(token_ids),), torch.nan),
                        finished=True,
                        seed=seed,
                        text=text,
                    )
                )
        return RolloutBatch(rollouts, student.weight_version, step.step, sampling, staleness=None)
