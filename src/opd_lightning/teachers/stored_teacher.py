"""`StoredTeacher`: what a teacher said of stored answers, read back from the file it was written to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from opd_lightning.interfaces import MicroBatch, Rollout, ScoreRequest, Student, Teacher
from opd_lightning.objectives import ListedScores
from opd_lightning.rollouts.answer_files import check_ending, describe_tokenizer, read_answers, read_header
from opd_lightning.rollouts.answer_scores import ScoredAnswer, read_scored_answer

_SETTING = "StoredTeacher.path"  # wherever it stands


class StoredTeacher(Teacher):
    """Scores from a file of `opd-lightning rollout --score true`; no teacher runs.

    A rollout gets the scores of the row with its uid, prompt and token ids, bit for bit as they were written; its first
    tokens are enough (a horizon). So the rollouts come from the same file: `data.source: Stored`. Offers the sampled
    token, and the teacher's own top k where the file has lists. The file is held in memory: 8 bytes per token, 8 more
    per entry of a list.

    Args:
        path: File ending in .jsonl or .parquet.

    Raises:
        ValueError: The ending is unknown.
    """

    def __init__(self, path: str) -> None:
        check_ending(_SETTING, path)
        self.path = path
        self._header: dict[str, Any] | None = None
        self._answers: dict[str, list[ScoredAnswer]] = {}
        self._device = torch.device("cpu")

    @property
    @override
    def offer(self) -> ScoreRequest:
        """As the file says."""
        return ScoreRequest(top_k=int(self._settings()["scores"]["top_k"]))

    @override
    def check(self, request: ScoreRequest) -> None:
        """Refuse what goes beyond the offer, and another temperature than the scores were written at.

        Raises:
            ValueError: It does.
        """
        super().check(request)
        written = self._settings()["scores"]["temperature"]
        if request.temperature != written:
            raise ValueError(
                f"objective.teacher_temperature={request.temperature}: the scores in {self.path!r} were written at"
                f" {written}. Set it to {written}, or write them anew with this objective."
            )

    @override
    def preflight(self, student: Student) -> None:
        written = self._settings()["tokenizer"]["vocabulary"]
        if written != describe_tokenizer(student.tokenizer)["vocabulary"]:
            raise ValueError(
                f"{_SETTING}: the scores in {self.path!r} are of token ids of another vocabulary than the student's."
                " Have this student answer and a teacher of its family score: opd-lightning rollout --role student"
                " --score true."
            )

    @override
    def setup(self, student: Student, model: nn.Module, device: torch.device) -> None:
        """Read the file."""
        self.preflight(student)
        self._device = device
        if not self._answers:
            self._answers = self.read()

    def read(self) -> dict[str, list[ScoredAnswer]]:
        """All answers by the uid of their problem.

        Raises:
            ValueError: A row is damaged.
        """
        top_k = self.offer.top_k
        found: dict[str, list[ScoredAnswer]] = {}
        for place, row in read_answers(self._file()):
            answer = read_scored_answer(row, place, f"{_SETTING}: {self.path!r}", top_k)
            found.setdefault(str(row.get("uid")), []).append(answer)
        return found

    @override
    def score(self, batch: MicroBatch, request: ScoreRequest) -> ListedScores:
        parts = [self._scores_of(rollout) for rollout in batch.rollouts]
        sampled, ids, log_probs = (torch.cat(column).to(self._device) for column in zip(*parts, strict=True))
        return ListedScores(batch.tokens.ids, sampled, ids.long(), log_probs)

    @override
    def close(self) -> None:
        self._answers = {}

    def _scores_of(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        nearest, shared, reason = "", -1, ""
        for answer in self._answers.get(rollout.problem.uid, []):
            difference = answer.difference(rollout)
            if difference is None:
                own = slice(rollout.num_trained)
                return answer.sampled[own], answer.top_ids[own], answer.top_log_probs[own]
            if difference[0] > shared:
                nearest, (shared, reason) = answer.place, difference
        what = f"{nearest} comes nearest and has {reason}" if nearest else "no row has this uid"
        raise ValueError(
            f"{_SETTING}: {self.path!r} has no scores of this rollout of problem {rollout.problem.uid!r}: {what}. Take"
            " the rollouts from the same file (data.source: Stored), or write it anew: opd-lightning rollout --score"
            " true."
        )

    def _settings(self) -> dict[str, Any]:
        if self._header is None:
            self._header = read_header(self._file())
        settings: dict[str, Any] = {} if self._header is None else self._header["settings"]
        if "scores" not in settings:
            raise ValueError(
                f"{_SETTING}: {self.path!r} holds no scores of a teacher. Write it with `opd-lightning rollout --score"
                " true`."
            )
        return settings

    def _file(self) -> Path:
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise ValueError(
                f"{_SETTING}: there is no file {self.path!r} (relative paths start from {Path.cwd()}). Write it with"
                f" `opd-lightning rollout --role student --score true --output {self.path}`."
            )
        return path
