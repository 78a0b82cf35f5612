r"""`MathTask`: questions with a final answer that math-verify can check, from files or hub data sets."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from opd_lightning.interfaces import Problem, Rollout, Split, Task
from opd_lightning.tasks.answers import MAX_ANSWER_CHARACTERS, AnswerForm, find_answer, read_reference
from opd_lightning.tasks.marking import AnswerChecker
from opd_lightning.tasks.repeats import report_repeats
from opd_lightning.tasks.sources import DataSource, UnusableRow
from opd_lightning.tasks.splits import SplitSources, is_raw, with_system_prompt

BOXED_SUFFIX = r"Please reason step by step, and put your final answer within \boxed{}."


class MathTask(Task):
    r"""Mathematical questions, asked in chat form and marked by their final answer.

    A question becomes ``[system,] user`` messages; the user's text ends with `suffix`, which is not added twice. The
    template matters: student and teacher should see the one the teacher was trained with (arXiv 2604.13016, section
    5.2). Reference answers are the text after GSM8K's ``####``, else the last ``\boxed{}``, else the whole column.

    A response is marked by the last complete box; `accept` says what else counts. Answers are equal when they are the
    same number or text (``025`` is 25, ``142.0`` is 142, ``$1,234`` is 1234, 70% is 70 and 0.7, units in words are
    ignored), or when math-verify finds them equal in time; see `AnswerChecker`. Answers longer than 500 characters are
    wrong. An answer of several parts (a list in the data) is right when all parts are there, in any order.

    Repeated questions, and questions whose answers differ, are reported as warnings. Dropping them concerns the
    training split only: benchmarks stay as they were published.

    Args:
        train: Source or sources of the training problems (in YAML ``{path: data/train.jsonl}``, or a list of such).
        validation: The same for validation.
        test: The same for testing; prediction uses it too.
        system_prompt: Text of a system message put first.
        suffix: Added to every question after a space (none when it begins with white space itself); None adds nothing.
            Raw prompts (`DataSource.raw`) stay as they are.
        strip: Instructions to remove from the start or the end of the questions before the suffix is added, such as the
            wrapper a data set came with. The suffix is always among them, also with its braces doubled.
        accept: Least explicit form of an answer that counts: "box" only a box (the rule of most published numbers);
            "marked" also ``#### ...`` and "the answer is ..."; "last_number" also the last number of the text, which
            marks some cut-off reasoning right by luck.
        drop_duplicates: Train only on the first of the problems with the same question and answer.
        drop_contradictions: Do not train on questions that occur with different answers.
        seconds_per_answer: Most processor time that math-verify may spend on one answer; an unfinished one is wrong.
        seconds_per_step: Processor time for all slow answers of a step or validation batch together (those that need
            more than a quarter of a second); they share it evenly, and a warning says how many did not get enough.
        num_processes: Answers that math-verify marks side by side.

    Raises:
        ValueError: A setting is out of range, or a source has no answers; from `problems`, a source cannot be read.
    """

    def __init__(
        self,
        train: DataSource | list[DataSource] | None = None,
        validation: DataSource | list[DataSource] | None = None,
        test: DataSource | list[DataSource] | None = None,
        system_prompt: str | None = None,
        suffix: str | None = BOXED_SUFFIX,
        strip: list[str] | None = None,
        accept: AnswerForm = "marked",
        drop_duplicates: bool = False,
        drop_contradictions: bool = False,
        seconds_per_answer: float = 3.0,
        seconds_per_step: float = 60.0,
        num_processes: int = 8,
    ) -> None:
        if accept not in ("box", "marked", "last_number"):
            raise ValueError(f"task.accept: expected 'box', 'marked' or 'last_number', got {accept!r}.")
        self._sources = SplitSources(train, validation, test)
        self._word(suffix, system_prompt, strip)
        if without := [source.path for source in self._sources if source.answer is None]:
            raise ValueError(
                f"task: MathTask marks answers, but source.answer of {without[0]} is null. Name the column with the"
                " answers, or use PromptTask."
            )
        self.accept: AnswerForm = accept
        self.drop_duplicates = drop_duplicates
        self.drop_contradictions = drop_contradictions
        self._checker = AnswerChecker(seconds_per_answer, seconds_per_step, num_processes)

    def _word(self, suffix: str | None, system_prompt: str | None, strip: Sequence[str] | None) -> None:
        for name, text in (("suffix", suffix), ("system_prompt", system_prompt)):
            if text and "\b" in text:
                raise ValueError(
                    rf"task.{name} contains a backspace character: YAML reads \b in double quotes as one, so"
                    r' "\boxed{}" loses its start. Use single quotes or no quotes.'
                )
        self._sources.check_system_prompt(system_prompt)
        self._wording = {"suffix": suffix, "system_prompt": system_prompt, "strip": strip}
        self.system_prompt = system_prompt or None
        self.suffix = suffix or ""
        self.strip = _longest_first([*(strip or ()), self.suffix, self.suffix.replace("{}", "{{}}")])

    def reworded(self, wording: Mapping[str, Any]) -> Task:
        """The same task with another `suffix`, `system_prompt` or `strip`.

        Raises:
            ValueError: Something else is to change, or the new words cannot be used.
        """
        super().reworded({name: value for name, value in wording.items() if name not in self._wording})
        other = copy.copy(self)
        other._word(**{**self._wording, **wording})
        return other

    def problems(self, split: Split) -> list[Problem]:
        """Read the problems of a split, source after source in file order; none when the split has no source.

        Raises:
            ValueError: A source cannot be read, or two sources of the split have the same name.
        """
        problems = [self._ask(problem) for problem in self._sources.read(split, _final_answer)]
        training = split == "train"
        return report_repeats(
            problems,
            split,
            drop_duplicates=training and self.drop_duplicates,
            drop_contradictions=training and self.drop_contradictions,
        )

    def grade(self, problem: Problem, response: str) -> float:
        """Return 1 when the response's final answer equals the reference, otherwise 0."""
        return self._mark([problem], [response])[0]

    def grade_rollouts(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Mark rollouts side by side; answers that occur several times are compared once."""
        return self._mark([rollout.problem for rollout in rollouts], [rollout.text for rollout in rollouts])

    def _mark(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[float]:
        answers = [find_answer(response, self.accept) or "" for response in responses]
        return [float(equal) for equal in self._checker.equal_all([str(p.answer) for p in problems], answers)]

    def _ask(self, problem: Problem) -> Problem:
        if is_raw(problem):
            return problem
        *before, question = problem.messages
        messages = (*before, {"role": "user", "content": self._with_suffix(question["content"])})
        return with_system_prompt(replace(problem, messages=messages), self.system_prompt)

    def _with_suffix(self, question: str) -> str:
        text = question.strip()
        for instruction in self.strip:
            text = text.removesuffix(instruction).removeprefix(instruction).strip()
        separator = "" if not self.suffix or self.suffix[0].isspace() else " "
        return text + separator + self.suffix


def _final_answer(text: str) -> str:
    answer = read_reference(text)
    if not 0 < len(answer) <= MAX_ANSWER_CHARACTERS:
        raise UnusableRow(
            f"expected a final answer of 1 to {MAX_ANSWER_CHARACTERS} characters (after ####, in \\boxed{{}}, or the"
            f" whole column), got {len(answer)}."
        )
    return answer


def _longest_first(texts: Sequence[str]) -> list[str]:
    return sorted({text.strip() for text in texts if text.strip()}, key=lambda text: (-len(text), text))
