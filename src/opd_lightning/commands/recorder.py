"""`Recorder`: a model answers the problems of a split, and what no rule rejects goes into a file."""

from __future__ import annotations

import hashlib
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import rich
from torch import nn
from typing_extensions import override

from opd_lightning.callbacks.console import say
from opd_lightning.commands.parser import PROGRAM
from opd_lightning.commands.scorer import Scorer
from opd_lightning.distributed import gather_objects, rank
from opd_lightning.interfaces import Problem, Prompt, PromptBatch, Rollout, Student
from opd_lightning.rollouts.answer_files import FORMAT, describe_tokenizer, digest_of_values
from opd_lightning.rollouts.answering import render_prompts
from opd_lightning.rollouts.attempts import Kept, attempt
from opd_lightning.rollouts.problem_sets import describe_problems
from opd_lightning.rollouts.recording import Recording
from opd_lightning.rollouts.records import answer_record, token_record
from opd_lightning.rollouts.rejection import Rejection
from opd_lightning.training.student_module import StudentModule

Role = Literal["teacher", "student"]
_PACKAGES = ("opd-lightning", "torch", "transformers", "vllm")


class Recorder(StudentModule):
    """Answers the problems of a split and records what no rule rejects.

    Args:
        spec: Who answers.
        role: Who that is to the training.
        output: The file.
        reject: Rules for answers that are not kept.
        num_problems: Only the first so many; None is all.
        num_samples: Answers wanted of each problem.
        num_attempts: Most answers asked for one that is kept.
        ckpt_path: Checkpoint that the weights come from, if any.
        scorer: Writes a teacher's scores into the rows; None writes none.
    """

    def __init__(
        self,
        spec: Student,
        role: Role,
        output: str,
        reject: Rejection,
        *,
        num_problems: int | None,
        num_samples: int,
        num_attempts: int,
        ckpt_path: str | None,
        scorer: Scorer | None = None,
    ) -> None:
        super().__init__(spec)
        self.scorer = scorer
        self.role, self.output, self.ckpt_path = role, output, ckpt_path
        self.reject = reject
        self.num_problems = num_problems
        self.num_samples, self.num_attempts = num_samples, num_attempts
        self.recording: Recording | None = None
        self.is_complete = False
        self.num_done = 0
        self.last_tenth = 0

    @override
    def setup(self, stage: str) -> None:
        """Leave repeated prompts out, and look whether the file is there already."""
        super().setup(stage)
        data, split = self.data, self.data.predict_split
        if self.scorer is not None:
            self.scorer.check(self.spec)
        if self.reject.wrong and not data.task.is_graded:
            raise ValueError(
                f"reject.wrong: {type(data.task).__name__} has no answers to mark, so none is known to be wrong. Leave"
                " it out, or choose a task that defines grade."
            )
        asked = data.held_out[split][: self.num_problems]
        problems = self._without_repeats(asked)
        self.num_repeated = len(asked) - len(problems)
        data.held_out[split] = problems
        if rank() == 0:
            self.recording = Recording(self.output, self._settings(problems))
        self.is_complete = gather_objects(self.recording is not None and self.recording.is_complete)[0]
        if self.is_complete:
            self.trainer.limit_predict_batches = 0

    @override
    def configure_model(self) -> None:
        if not self.is_complete:
            super().configure_model()

    def on_predict_start(self) -> None:
        """Open the file, and go on where an earlier run was stopped."""
        super().on_validation_start()
        if self.scorer is not None:
            self.scorer.setup(self.spec, self.model, self.device)
        if self.recording is not None:
            self.recording.open(self._header())
            if self.recording.repaired:
                say(self.trainer, self.recording.repaired)
            if self.recording.num_done:
                say(self.trainer, f"{self.output}: goes on after {self.recording.num_done} problems.")
        self.num_done = gather_objects(0 if self.recording is None else self.recording.num_done)[0]

    @override
    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[Rollout]:
        """Answer what is not done yet; the first process writes the answers of all."""
        is_new = [position >= self.num_done for position in batch.positions]
        problems = [problem for problem, new in zip(batch.problems, is_new, strict=True) if new]
        positions = [position for position, new in zip(batch.positions, is_new, strict=True) if new]
        if not any(gather_objects(bool(positions))):
            return []
        answers, counts = self.answer(problems, positions)
        together = gather_objects((list(zip(positions, answers, strict=True)), counts))
        by_position = sorted((pair for pairs, _ in together for pair in pairs), key=lambda pair: pair[0])
        if self.recording is not None:
            total = sum((part for _, part in together), Counter[str]())
            total["problems"] = len(by_position)
            total["problems without an answer"] = sum(not kept for _, kept in by_position)
            total["response tokens"] = sum(len(k.rollout.response_ids) for _, kept in by_position for k in kept)
            rows = [row(answer) for _, kept in by_position for answer in kept]
            self.recording.append(rows, num_done=by_position[-1][0] + 1, counts=total)
            self._say_progress()
        return []

    def answer(self, problems: Sequence[Problem], positions: Sequence[int]) -> tuple[list[list[Kept]], Counter[str]]:
        """Kept answers of each problem, and what became of all that were asked for."""
        data = self.data
        prompts = render_prompts(
            self.spec.tokenizer, problems, positions, num_samples=self.num_samples, seed_parts=(data.seed, "rollout")
        )

        def ask(prompts: Sequence[Prompt]) -> list[Rollout]:
            return data.answer(prompts, data.validation_sampling, num_samples=1).rollouts

        kept, counts = attempt(ask, prompts, self.reject, num_attempts=self.num_attempts)
        if self.scorer is not None:
            scores = iter(self.scorer([answer.rollout for group in kept for answer in group]))
            kept = [[replace(answer, scores=next(scores)) for answer in group] for group in kept]
        return kept, counts

    def on_predict_end(self) -> None:
        """Give the file its name."""
        if self.recording is not None:
            self.recording.finish()

    def close(self) -> None:
        """Let go of the file, for another run to go on, and of the teacher."""
        if self.recording is not None:
            self.recording.close()
        if self.scorer is not None:
            self.scorer.teacher.close()

    def report(self) -> None:
        """Say what became of the answers."""
        if self.recording is None:
            return
        counts = self.recording.counts
        was = "is complete already" if self.is_complete else "is complete"
        say(self.trainer, f"{self.output} {was}: {counts['kept']} answers to {counts['problems']} problems.")
        reasons = [
            f"{n} {name.removeprefix('rejected: ')}" for name, n in counts.items() if name.startswith("rejected")
        ]
        rejected = f", rejected: {', '.join(reasons)}" if reasons else ""
        say(self.trainer, f"Generated {counts['generated']}, kept {counts['kept']}{rejected}.")
        if missing := counts["problems without an answer"]:
            say(self.trainer, f"{missing} problems have no answer.")
        if self.num_repeated:
            say(self.trainer, f"{self.num_repeated} problems were not asked: their prompts repeat earlier ones.")

    def _without_repeats(self, problems: Sequence[Problem]) -> list[Problem]:
        tokenizer = self.spec.tokenizer
        first = {tuple(tokenizer.render(problem.messages)): problem for problem in reversed(problems)}
        return [problem for problem in problems if first[tuple(tokenizer.render(problem.messages))] is problem]

    def _settings(self, problems: Sequence[Problem]) -> dict[str, Any]:
        """What the answers depend on."""
        data = self.data
        return {
            "role": self.role,
            "model": self.spec.describe(),
            "ckpt_path": self.ckpt_path,
            "engine": type(data.engine).__name__,
            "precision": str(self.trainer.precision),
            "task": type(data.task).__name__,
            "split": data.predict_split,
            "problems": describe_problems(problems),
            "sampling": asdict(data.validation_sampling),
            "num_samples": self.num_samples,
            "num_attempts": self.num_attempts,
            "reject": asdict(self.reject),
            "seed": data.seed,
            "tokenizer": describe_tokenizer(self.spec.tokenizer),
            **({} if self.scorer is None else {"scores": self.scorer.describe()}),
        }

    def _header(self) -> dict[str, Any]:
        assert self.recording is not None
        return {
            "format": FORMAT,
            "command": shlex.join([PROGRAM, *sys.argv[1:]]),
            "versions": {name: found for name in _PACKAGES if (found := _version(name))},
            "config_digest": digest_of_values(self.recording.settings),
            "weights": " ".join(map(sample_of_weights, self._models())),
            "has_log_probs": self.data.engine.knows_log_probs(self.data.validation_sampling),
        }

    def _models(self) -> list[nn.Module]:
        """Whose weights the file depends on, as far as they are in this process."""
        scores = None if self.scorer is None else self.scorer.teacher.as_student()
        return [self.model] if scores is None else [self.model, scores[1]]

    def _say_progress(self) -> None:
        """A line every tenth, where there is no screen for the progress bar."""
        assert self.recording is not None
        total = len(self.data.held_out[self.data.predict_split])
        tenth = 10 * self.recording.num_done // total
        if tenth > self.last_tenth and not rich.get_console().is_terminal:
            say(self.trainer, f"{self.recording.num_done}/{total} problems, {self.recording.counts['kept']} answers")
        self.last_tenth = tenth


def row(answer: Kept) -> dict[str, Any]:
    """One answer as a row of the file."""
    numbers = {"sample": answer.sample, "attempt": answer.attempt}
    return answer_record(answer.rollout) | numbers | token_record(answer.rollout) | dict(answer.scores)


def sample_of_weights(model: nn.Module) -> str:
    """Digest of the first numbers of every weight: another checkpoint at the same place is noticed."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in model.named_parameters():
        numbers = weight.detach().flatten()[:16].float().cpu().tolist()
        digest.update(f"{name}{tuple(weight.shape)}{numbers}".encode())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
