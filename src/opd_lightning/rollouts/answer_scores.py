"""What a teacher said of an answer's tokens, as columns of its row: written once, read back bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_lightning.interfaces import Rollout, ScoreRequest, Teacher
from opd_lightning.rollouts.answer_files import Row
from opd_lightning.rollouts.batching import collate, cut_by_tokens
from opd_lightning.rollouts.records import shortest_decimals


@dataclass(frozen=True)
class ScoredAnswer:
    """A row of a file of answers with the teacher's scores of the N tokens that the student wrote.

    Attributes:
        place: Where it stands in the file ("line 3").
        prompt_ids: int32 [P].
        response_ids: int32 [T].
        places: int64 [N], where in the response the student's tokens stand.
        log_probs: float32 [N], those that its tokens were drawn with; None where nobody knows.
        sampled: float32 [N], the teacher's log-probabilities of its tokens, nats.
        top_ids: int32 [N, K], the teacher's likeliest tokens, likeliest first.
        top_log_probs: float32 [N, K], theirs.
    """

    place: str
    prompt_ids: Tensor
    response_ids: Tensor
    places: Tensor
    log_probs: Tensor | None
    sampled: Tensor
    top_ids: Tensor
    top_log_probs: Tensor

    def difference(self, rollout: Rollout) -> tuple[int, str] | None:
        """How many tokens a rollout shares with it, and what the first other one is; None where all are the same.

        Its first tokens are as good as the whole: a horizon trains on no more.
        """
        own = torch.cat([self.prompt_ids, self.response_ids])
        other = torch.cat([rollout.prompt_ids, rollout.response_ids]).to(own.dtype)
        num_prompt, length = len(self.prompt_ids), min(len(own), len(other))
        differs = (own[:length] != other[:length]).nonzero()
        at = int(differs[0]) if len(differs) else length
        if at == len(other) and len(rollout.prompt_ids) == num_prompt:
            places = rollout.trained_positions
            is_same = torch.equal(self.places[: len(places)], places)
            return None if is_same else (at, "other tokens that the student wrote")
        if at < max(num_prompt, len(rollout.prompt_ids)):
            return at, "another prompt"
        was = f"token {int(own[at])}" if at < len(own) else "no token"
        return at, f"{was} at place {at - num_prompt} of the answer, where the rollout has {int(other[at])}"


def score_answers(
    teacher: Teacher, rollouts: Sequence[Rollout], request: ScoreRequest, *, max_tokens: int, pad_id: int, device: Any
) -> list[dict[str, Any]]:
    """Columns with a teacher's scores of each rollout, in order.

    Args:
        teacher: Set up.
        rollouts: Answers.
        request: Asks for the sampled tokens, or for a top-k list too.
        max_tokens: Most padded tokens that go through the teacher at once.
        pad_id: Fills the padding.
        device: Where the teacher scores.
    """
    places = {id(rollout): place for place, rollout in enumerate(rollouts)}
    batches = [collate(group, pad_id).to(device) for group in cut_by_tokens(rollouts, max_tokens)]
    rows: list[dict[str, Any]] = [{} for _ in rollouts]
    for batch, scores in zip(batches, teacher.score_all(batches, request), strict=True):
        sampled = batch.by_rollout(scores.sampled().float().cpu())
        for rollout, values in zip(batch.rollouts, sampled, strict=True):
            rows[places[id(rollout)]]["teacher_log_probs"] = shortest_decimals(values)
        if request.top_k:
            ids, log_probs = (column.cpu() for column in scores.topk(request.top_k))
            lists = zip(batch.by_rollout(ids), batch.by_rollout(log_probs.float()), strict=True)
            for rollout, (own_ids, own_log_probs) in zip(batch.rollouts, lists, strict=True):
                row = rows[places[id(rollout)]]
                row["teacher_ids"] = own_ids.tolist()
                row["teacher_top_log_probs"] = [shortest_decimals(each) for each in own_log_probs]
    return rows


def read_scored_answer(row: Row, place: str, setting: str, top_k: int) -> ScoredAnswer:
    """The answer of a row.

    Args:
        row: Its columns.
        place: Where it stands ("line 3").
        setting: What names the file in messages.
        top_k: Size of the lists, as the header says.

    Raises:
        ValueError: A column is missing, or has another number of entries than the tokens that the student wrote.
    """
    lists = ("teacher_ids", "teacher_top_log_probs") if top_k else ()
    for name in ("prompt_ids", "response_ids", "teacher_log_probs", *lists):
        if not isinstance(row.get(name), list):
            raise ValueError(
                f"{setting}, {place}: expected a list in the column {name!r}, got {str(row.get(name))[:60]!r}. Write"
                " the file with `opd-lightning rollout --score true`."
            )
    response_ids, log_probs, wrote = row["response_ids"], row.get("log_probs"), row.get("student_wrote")
    own = [i for i in range(len(response_ids)) if wrote is None or wrote[i]]
    top_ids, top_log_probs = (
        row[name] if top_k else [[]] * len(own) for name in ("teacher_ids", "teacher_top_log_probs")
    )
    is_whole = len(row["teacher_log_probs"]) == len(top_ids) == len(top_log_probs) == len(own)
    if not is_whole or any(len(each) != top_k for each in [*top_ids, *top_log_probs]):
        raise ValueError(
            f"{setting}, {place}: expected scores of {len(own)} tokens, {top_k} likeliest each. The file is damaged:"
            " write it anew."
        )
    return ScoredAnswer(
        place=place,
        prompt_ids=torch.tensor(row["prompt_ids"], dtype=torch.int32),
        response_ids=torch.tensor(response_ids, dtype=torch.int32),
        places=torch.tensor(own, dtype=torch.int64),
        log_probs=None if log_probs is None else torch.tensor([log_probs[i] for i in own], dtype=torch.float32),
        sampled=torch.tensor(row["teacher_log_probs"], dtype=torch.float32),
        top_ids=torch.tensor(top_ids, dtype=torch.int32).view(len(own), top_k),
        top_log_probs=torch.tensor(top_log_probs, dtype=torch.float32).view(len(own), top_k),
    )
