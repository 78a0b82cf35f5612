"""`Stored`: a step's rollouts come from a file of answers that somebody wrote before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from opd_lightning.interfaces import (
    LiveStudent,
    Problem,
    Prompt,
    Rollout,
    RolloutBatch,
    RolloutSource,
    Sampling,
    StepPrompts,
    Tokenizer,
)
from opd_lightning.rollouts.answer_files import (
    Row,
    check_ending,
    describe_tokenizer,
    digest_of_file,
    read_answers,
    read_header,
)
from opd_lightning.rollouts.answer_rows import StoredAnswer, encode_answer, read_answer
from opd_lightning.rollouts.answering import closed_text, resolve_stop_ids


class Stored(RolloutSource):
    """Answers from a file of `opd-lightning rollout`, matched to problems by their uid, in the selector's order.

    Token ids are the truth: they are trained on as they are in the file, which must have been written with the
    student's vocabulary. Where a problem has more answers than a step asks for, the seeds of the step choose. The file
    is held in memory: 4 bytes per response token, 8 with log-probabilities.

    Args:
        path: File ending in .jsonl or .parquet.
        skip_unusable: Train on the problems only that have as many usable answers as a step asks for
            (`rollouts_per_prompt`, not longer than `max_new_tokens`), instead of refusing to start.
        other_prompts: Allow prompts that this run renders otherwise than when they were answered (another chat
            template or system prompt): the answers are trained under this run's prompts, and log-probabilities are not
            known.
        reencode: Encode the texts with the student's tokenizer: for answers of another vocabulary, and for files with
            the columns `uid` and `response` that others wrote. Log-probabilities are then not known, prompts not
            compared.
        closing_token: Under `reencode`, the token that closes a finished answer, as it is written in the vocabulary;
            None takes the one that the file names, or the student's own where there is only one.

    Raises:
        ValueError: The ending is unknown.
    """

    def __init__(
        self,
        path: str,
        skip_unusable: bool = False,
        other_prompts: bool = False,
        reencode: bool = False,
        closing_token: str | None = None,
    ) -> None:
        check_ending("Stored.path", path)
        if closing_token is not None and not reencode:
            raise ValueError("Stored.closing_token: closes answers that are encoded anew. Set reencode: true, too.")
        self.path = path
        self.skip_unusable = skip_unusable
        self.other_prompts = other_prompts
        self.reencode = reencode
        self.closing_token = closing_token
        self._header: Mapping[str, Any] | None = None
        self._digest = ""
        self._has_log_probs = False
        self._answers: dict[str, list[StoredAnswer]] = {}  # those that can be used

    @property
    @override
    def staleness(self) -> None:
        return None

    @override
    def knows_log_probs(self, sampling: Sampling) -> bool:
        """As the file says: drawn from a whole distribution, and under the same prompts and tokens."""
        return self._has_log_probs

    @override
    def admit(
        self,
        problems: Sequence[Problem],
        tokenizer: Tokenizer,
        sampling: Sampling,
        num_rollouts: int,
        fewer: str = "lower data.rollouts_per_prompt",
    ) -> list[Problem]:
        """Read the file; the problems that have enough usable answers in it.

        Args:
            problems: Those of the task.
            tokenizer: The student's.
            sampling: How the run samples.
            num_rollouts: Answers wanted of each.
            fewer: What to do to need fewer of them.

        Raises:
            ValueError: The file cannot be read, was written for another tokenizer, or lacks answers.
        """
        answers = self._read(tokenizer, sampling)
        self._answers = {
            uid: fitting
            for uid, found in answers.items()
            if len(fitting := [a for a in found if len(a.response_ids) <= sampling.max_new_tokens]) >= num_rollouts
        }
        admitted = [problem for problem in problems if problem.uid in self._answers]
        if len(admitted) < len(problems) and not (self.skip_unusable and admitted):
            raise ValueError(self._what_is_missing(problems, answers, sampling, num_rollouts, fewer))
        first = tokenizer.render(admitted[0].messages)
        self._check_prompt(Prompt(admitted[0], tuple(first), ()), self._answers[admitted[0].uid][0])
        wanted = {problem.uid for problem in admitted}
        self._answers = {uid: found for uid, found in self._answers.items() if uid in wanted}
        return admitted

    @override
    def rollouts(self, step: StepPrompts, sampling: Sampling, student: LiveStudent) -> RolloutBatch:
        rollouts = [
            self._rollout(prompt, seed, answer.first(sampling.max_new_tokens), student.spec.tokenizer)
            for prompt in step.prompts
            for seed, answer in zip(prompt.seeds, self._choose(prompt), strict=True)
        ]
        return RolloutBatch(rollouts, student.weight_version, step.step, sampling, staleness=None)

    def marks(self, problem: Problem) -> list[float]:
        """What the file gives each usable answer to a problem, NaN where it gives nothing; known after `admit`."""
        return [answer.reward for answer in self._answers.get(problem.uid, [])]

    def answers(self, prompt: Prompt, sampling: Sampling, tokenizer: Tokenizer) -> list[Rollout]:
        """One answer for each seed of a prompt, with the mark that the file gives it (NaN where it gives none)."""
        return [
            self._rollout(prompt, seed, answer.first(sampling.max_new_tokens), tokenizer).graded(answer.reward)
            for seed, answer in zip(prompt.seeds, self._choose(prompt), strict=True)
        ]

    @override
    def state_dict(self) -> dict[str, Any]:
        """Nothing moves; a resumed run must only read the same file in the same way."""
        return {"digest": self._digest, "other_prompts": self.other_prompts, "reencode": self.reencode}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare.

        Raises:
            ValueError: The file has changed since the checkpoint was written, or is read otherwise.
        """
        for name, value in self.state_dict().items():
            if name in state and state[name] != value:
                what = f"{self.path!r} has changed" if name == "digest" else f"{name} of {self.path!r} is {value}"
                raise ValueError(
                    f"data.source: {what}, but the checkpoint was written with {state[name]}. Resume with the same, or"
                    " start a new run from the checkpoint's weights (opd-lightning export, then student.path)."
                )

    def _choose(self, prompt: Prompt) -> list[StoredAnswer]:
        """As many different answers as there are seeds: those from a place on that the first seed decides."""
        answers = self._answers[prompt.problem.uid]
        first = prompt.seeds[0] % len(answers)
        return [answers[(first + i) % len(answers)] for i in range(len(prompt.seeds))]

    def _rollout(self, prompt: Prompt, seed: int, answer: StoredAnswer, tokenizer: Tokenizer) -> Rollout:
        self._check_prompt(prompt, answer)
        response_ids = answer.response_ids.long()
        log_probs = answer.log_probs if self._has_log_probs else None
        if log_probs is None:
            log_probs = torch.full((len(response_ids),), torch.nan)
        return Rollout(
            problem=prompt.problem,
            prompt_ids=torch.tensor(prompt.token_ids),
            response_ids=response_ids,
            log_probs=log_probs,
            finished=answer.finished,
            seed=seed if answer.seed is None else answer.seed,
            text=closed_text(tokenizer, response_ids.tolist(), answer.finished),
            student_wrote=answer.student_wrote,
        )

    def _check_prompt(self, prompt: Prompt, answer: StoredAnswer) -> None:
        if not self.other_prompts and answer.prompt_hash not in (None, hash(tuple(prompt.token_ids))):
            raise ValueError(
                f"data.source: this run renders the prompt of problem {prompt.problem.uid!r} otherwise than when"
                f" {self.path!r} was written (another question under this uid, chat template, template_kwargs or system"
                " prompt). Use the same, or set other_prompts: true beside its path to train the answers under this"
                " run's."
            )

    # ------------------------------------------------------------------------------------------------------- reading

    def _read(self, tokenizer: Tokenizer, sampling: Sampling) -> dict[str, list[StoredAnswer]]:
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise ValueError(
                f"Stored.path: there is no file {self.path!r} (relative paths start from {Path.cwd()}). Write it with"
                f" `opd-lightning rollout --output {self.path}`; if a StoredTeacher reads it as well, add `--role"
                " student --score true`."
            )
        self._header, self._digest = read_header(path), digest_of_file(path)
        if self._header is not None and not self.reencode and not self.other_prompts:
            drawn = Sampling(**self._header["settings"]["sampling"])
            self._has_log_probs = bool(self._header["has_log_probs"]) and drawn.is_whole_distribution
        if not self.reencode:
            self._check_tokenizer(tokenizer)
        stop_ids = resolve_stop_ids(tokenizer, sampling)
        answers: dict[str, list[StoredAnswer]] = {}
        for place, row in read_answers(path):
            where = f"Stored.path: {self.path!r}, {place}"
            if self.reencode:
                answer = encode_answer(row, where, tokenizer, stop_ids, self._name_of_closing(row))
            else:
                answer = read_answer(row, where, tokenizer, stop_ids)
            answers.setdefault(row["uid"], []).append(answer)
        if not answers:
            raise ValueError(f"Stored.path: {self.path!r} holds no answers. Write it anew with less strict rules.")
        return answers

    def _check_tokenizer(self, tokenizer: Tokenizer) -> None:
        if self._header is None:
            raise ValueError(
                f"Stored.path: {self.path!r} has no header, so nobody knows whose token ids it holds. Write it with"
                " `opd-lightning rollout`, or set reencode: true beside its path to encode the texts of its column"
                " `response`."
            )
        written = self._header["settings"]["tokenizer"]["vocabulary"]
        if written != describe_tokenizer(tokenizer)["vocabulary"]:
            raise ValueError(
                f"Stored.path: the answers in {self.path!r} are token ids of another vocabulary than the student's."
                " Have a teacher of the student's family answer, or set reencode: true beside its path to encode the"
                " texts anew."
            )

    def _name_of_closing(self, row: Row) -> str | None:
        """What the token that closes an answer is called; None when nobody says."""
        if self.closing_token is not None or self._header is None or not row.get("response_ids"):
            return self.closing_token
        names: Mapping[str, str] = self._header["settings"]["tokenizer"]["stop_tokens"]
        return names.get(str(row["response_ids"][-1]))

    def _what_is_missing(
        self,
        problems: Sequence[Problem],
        answers: Mapping[str, list[StoredAnswer]],
        sampling: Sampling,
        num_rollouts: int,
        fewer: str,
    ) -> str:
        missing = [problem.uid for problem in problems if problem.uid not in self._answers]
        absent = [uid for uid in missing if uid not in answers]
        few = [uid for uid in missing if uid in answers and len(answers[uid]) < num_rollouts]
        parts = [f"{len(absent)} have none (first: {absent[0]!r})"] if absent else []
        parts += [f"{len(few)} have fewer than the {num_rollouts} that a step takes"] if few else []
        if too_long := len(missing) - len(absent) - len(few):
            parts.append(f"{too_long} have longer ones than sampling.max_new_tokens={sampling.max_new_tokens}")
        remedy = "Set skip_unusable: true beside its path to leave these problems out, or write answers to them."
        if len(missing) == len(problems):
            remedy = "Use the data set and the settings that it was written for."
        if few:
            command = f"`opd-lightning rollout --num_samples {num_rollouts} --reject.duplicates false`"
            more = f"Write {num_rollouts} answers to each problem with {command}, or {fewer}."
            remedy = more if len(few) == len(problems) else f"{more} {remedy}"
        return (
            f"data.source: {self.path!r} lacks usable answers to {len(missing)} of {len(problems)} training problems:"
            f" {'; '.join(parts)}. {remedy}"
        )
