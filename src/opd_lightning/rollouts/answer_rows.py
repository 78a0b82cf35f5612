"""One row of a file of answers as an answer to train on: of its token ids, or of its text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd_lightning.interfaces import Tokenizer
from opd_lightning.rollouts.answer_files import Row

_COLUMNS = {  # what a file of `opd-lightning rollout` has
    "uid": str,
    "prompt_ids": list,
    "response_ids": list,
    "finished": bool,
    "seed": int,
}


@dataclass(frozen=True)
class StoredAnswer:
    """One answer; the problem it belongs to is known elsewhere.

    Attributes:
        response_ids: int32 [T].
        finished: Whether its last token closes it.
        seed: What it was drawn with; None where nobody knows.
        prompt_hash: Hash of the prompt's token ids; None where it does not matter.
        log_probs: float32 [T], or None.
        student_wrote: bool [T]; None when all tokens are the model's own.
        reward: The mark that the file gives it; NaN where it gives none.
    """

    response_ids: Tensor  # int32 [T]
    finished: bool
    seed: int | None
    prompt_hash: int | None
    log_probs: Tensor | None
    student_wrote: Tensor | None
    reward: float = math.nan

    def first(self, num_tokens: int) -> StoredAnswer:
        """Its first so many tokens: under a horizon no more are trained on."""
        if len(self.response_ids) <= num_tokens:
            return self
        return replace(
            self,
            response_ids=self.response_ids[:num_tokens],
            finished=False,
            log_probs=None if self.log_probs is None else self.log_probs[:num_tokens],
            student_wrote=None if self.student_wrote is None else self.student_wrote[:num_tokens],
        )


def read_answer(row: Row, where: str, tokenizer: Tokenizer, stop_ids: Sequence[int]) -> StoredAnswer:
    """An answer of its token ids.

    Raises:
        ValueError: A column is missing or of another type, or the tokens are not the student's.
    """
    for name, kind in _COLUMNS.items():
        if not isinstance(row.get(name), kind):
            raise ValueError(
                f"{where}: expected {kind.__name__} in the column {name!r}, got {str(row.get(name))[:60]!r}; columns"
                f" are {', '.join(row)}. Write the file with `opd-lightning rollout`."
            )
    token_ids, log_probs, wrote = row["response_ids"], row.get("log_probs"), row.get("student_wrote")
    if any(not isinstance(i, int) or not 0 <= i < tokenizer.vocab_size for i in token_ids):
        raise ValueError(
            f"{where}: expected token ids from 0 to {tokenizer.vocab_size - 1} in response_ids. The file is damaged."
        )
    if any(values is not None and len(values) != len(token_ids) for values in (log_probs, wrote)):
        raise ValueError(f"{where}: expected one entry per token in log_probs and student_wrote. The file is damaged.")
    if row["finished"] and (not token_ids or token_ids[-1] not in stop_ids):
        raise ValueError(
            f"{where}: a finished answer ends with token {token_ids[-1:]}, which does not close the student's responses"
            f" ({list(stop_ids)}). Set student.extra_stop_tokens or sampling.stop_ids."
        )
    return StoredAnswer(
        response_ids=torch.tensor(token_ids, dtype=torch.int32),
        finished=row["finished"],
        seed=row["seed"],
        prompt_hash=hash(tuple(row["prompt_ids"])),
        log_probs=None if log_probs is None else torch.tensor(log_probs, dtype=torch.float32),
        student_wrote=None if wrote is None else torch.tensor(wrote, dtype=torch.bool),
        reward=_mark(row),
    )


def encode_answer(
    row: Row, where: str, tokenizer: Tokenizer, stop_ids: Sequence[int], closing_token: str | None
) -> StoredAnswer:
    """An answer of its text.

    Args:
        row: Needs the columns `uid` and `response`; without `finished` it is finished.
        where: Its place, as the beginning of a message.
        tokenizer: The student's.
        stop_ids: What closes the student's responses.
        closing_token: Token that closes a finished answer; None where nobody says.

    Raises:
        ValueError: A column is missing, or it is not known which token closes an answer.
    """
    for name in ("uid", "response"):
        if not isinstance(row.get(name), str):
            raise ValueError(f"{where}: expected text in the column {name!r}; columns are {', '.join(row)}.")
    finished = bool(row.get("finished", True))
    token_ids = tokenizer.encode(row["response"])
    if finished and closing_token is None and len(stop_ids) == 1:
        token_ids.append(stop_ids[0])
    elif finished:
        token_id = None if closing_token is None else tokenizer.vocabulary.get(closing_token)
        if token_id is None or token_id not in stop_ids:
            known = sorted(token for token, number in tokenizer.vocabulary.items() if number in stop_ids)
            raise ValueError(
                f"Stored.closing_token: {closing_token!r} does not close the student's responses. Set it to one of"
                f" {known}."
            )
        token_ids.append(token_id)
    seed = row.get("seed")
    return StoredAnswer(
        response_ids=torch.tensor(token_ids, dtype=torch.int32),
        finished=finished,
        seed=seed if isinstance(seed, int) else None,
        prompt_hash=None,
        log_probs=None,
        student_wrote=None,
        reward=_mark(row),
    )


def _mark(row: Row) -> float:
    reward = row.get("reward")
    return float(reward) if isinstance(reward, int | float) else math.nan
