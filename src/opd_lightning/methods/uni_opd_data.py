"""Uni-OPD's balanced data: prompts of middling difficulty more often, as many right answers as wrong ones."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from typing_extensions import override

from opd_lightning.distributed import gather_objects
from opd_lightning.interfaces import Problem, PromptBatch, Rollout, RolloutBatch, Sampling, Tokenizer
from opd_lightning.objectives.arguments import check_one_of
from opd_lightning.randomness import derive_seed
from opd_lightning.rollouts.answer_files import check_ending, read_answers, read_header
from opd_lightning.rollouts.on_policy import OnPolicy
from opd_lightning.selection import Weighted

Per = Literal["prompt", "step"]
Missing = Literal["refuse", "keep"]
Key = TypeVar("Key", bound=Hashable)
_COMMAND = (  # every answer counts: of those left out, a problem that is always solved alike would keep one
    "`opd-lightning rollout --role student --num_samples 8 --num_attempts 1 --reject.duplicates false"
    " --reject.truncated false --reject.repetitive false --output"
)


class UpsampledByPasses(Weighted):
    """Problems that the student gets right sometimes, but not always, come more often; none is left out.

    A file of the student's answers, several to each problem, says how often it was right. Problems with `least_passes`
    to `most_passes` right answers weigh `times` as much as the others (see `Weighted` for what a weight means).

    Args:
        answers: File of `opd-lightning rollout --role student --num_samples 8`, with marks, of which nothing was
            rejected (docs/methods/uni_opd_data.md has the whole command).
        least_passes: Fewest right answers of a problem that comes more often.
        most_passes: Most right answers: 7 of 8 in the paper, in one place 8.
        times: How many times as often. No published value was found: 2 is ours.
        right_from: The least mark of a right answer.
        missing: What becomes of problems without answers in the file: "refuse" the run, or "keep" them as others that
            weigh 1.

    Raises:
        ValueError: A setting is out of range; from `setup`, the file does not fit.

    Source: arXiv 2605.03677 (offline difficulty-aware balancing).
    """

    def __init__(
        self,
        answers: str,
        least_passes: int = 1,
        most_passes: int = 7,
        times: float = 2.0,
        right_from: float = 1.0,
        missing: Missing = "refuse",
    ) -> None:
        super().__init__(column=answers)
        check_ending("selector.answers", answers)
        if not 0 <= least_passes <= most_passes:
            raise ValueError(
                f"selector.most_passes: expected 0 <= least_passes={least_passes} <= most_passes, got {most_passes}."
            )
        check_one_of("selector.missing", missing, get_args(Missing))
        if not 1 <= times < math.inf:
            raise ValueError(f"selector.times: expected a finite number of at least 1 (1: all alike), got {times}.")
        if not 0 < right_from <= 1:
            raise ValueError(f"selector.right_from: expected a mark in (0, 1], got {right_from}.")
        self.answers, self.least_passes, self.most_passes = answers, least_passes, most_passes
        self.times, self.right_from, self.missing = times, right_from, missing
        self._passes: Counter[str] = Counter()

    @override
    def setup(self, problems: Sequence[Problem], seed: int) -> None:
        """Take the problems, and count right answers to each.

        Raises:
            ValueError: There is no such file, it has no marks, lacks answers, or is not all that the student answered.
        """
        self._passes = self._count()
        without = [problem.uid for problem in problems if problem.uid not in self._passes]
        if without and (self.missing == "refuse" or len(without) == len(problems)):
            remedy = "Have the student answer all of them, or set selector.missing: keep."
            if len(without) == len(problems):
                remedy = "Name the file of this data set."
            raise ValueError(
                f"selector.answers: {self.answers!r} has no answers to {len(without)} of {len(problems)} training"
                f" problems (the first: {without[0]!r}). {remedy}"
            )
        super().setup(problems, seed)

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "weights" in state and not torch.equal(state["weights"], self._weights):
            raise ValueError(
                f"selector.answers: the answers in {self.answers!r}, or how they are counted, are not those of the"
                " checkpoint. Resume with the same, or start a new run from the checkpoint's weights."
            )
        super().load_state_dict(state)

    @override
    def _weight(self, problem: Problem) -> float:
        return self.times if self.least_passes <= self._passes.get(problem.uid, -1) <= self.most_passes else 1.0

    def _count(self) -> Counter[str]:
        path = Path(self.answers).expanduser()
        if not path.is_file():
            raise ValueError(
                f"selector.answers: there is no file {self.answers!r} (relative paths start from {Path.cwd()}). Write"
                f" it with {self._command}."
            )
        self._check_header(read_header(path))
        passes: Counter[str] = Counter()
        numbers: Counter[str] = Counter()
        for place, row in read_answers(path):
            uid, reward = row.get("uid"), row.get("reward")
            if not isinstance(uid, str) or not isinstance(reward, int | float) or math.isnan(reward):
                raise ValueError(
                    f"selector.answers: {self.answers!r}, {place}: expected an answer with a uid and a reward, got"
                    f" {uid!r} and {reward!r}. Write the file with a task that marks all its problems."
                )
            passes[uid] += reward >= self.right_from
            numbers[uid] += 1
        if len(set(numbers.values())) > 1:
            (most, many), *_, (least, few) = numbers.most_common()
            self._refuse(f"has {many} answers to problem {most!r} and {few} to {least!r}, so right ones say nothing")
        return passes

    def _check_header(self, header: Mapping[str, Any] | None) -> None:
        """Refuse a file that says itself that it is not all that the student answered."""
        if header is None:  # others wrote it
            return
        if (role := header["settings"]["role"]) != "student":
            self._refuse(f"holds answers of the {role}, not of the student")
        lost = {name: n for name, n in header["counts"].items() if name.startswith("rejected: ") and n}
        if lost:
            what = ", ".join(f"{n} {name.removeprefix('rejected: ')}" for name, n in lost.items())
            self._refuse(f"lacks answers that were rejected ({what}), so right ones are miscounted")

    def _refuse(self, what: str) -> None:
        raise ValueError(f"selector.answers: {self.answers!r} {what}. Write it anew with {self._command}.")

    @property
    def _command(self) -> str:
        return f"{_COMMAND} {self.answers}`"


class BalancedMarks(OnPolicy):
    """The student's own answers, of which as many right ones are trained on as wrong ones.

    Where there are too many of one kind, some of them, drawn by chance, are left out: none of their tokens is scored or
    trained on, or counted. Where all are of one kind nothing is left out, as in the authors' code.

    Args:
        per: Balance the answers of each "prompt", as the authors' scripts do, or those of the whole "step".
        right_per_wrong: How many right answers for each wrong one; rounded down.
        right_from: The least mark of a right answer.

    Raises:
        ValueError: A setting is out of range; from `share`, an answer has no mark.

    Source: arXiv 2605.03677 (online correctness-aware balancing) and the authors' code.
    """

    needs_marks = True

    def __init__(self, per: Per = "prompt", right_per_wrong: float = 1.0, right_from: float = 1.0) -> None:
        check_one_of("source.per", per, get_args(Per))
        if not 0 < right_per_wrong < math.inf:
            raise ValueError(f"source.right_per_wrong: expected a positive number, got {right_per_wrong}.")
        if not 0 < right_from <= 1:
            raise ValueError(f"source.right_from: expected a mark in (0, 1], got {right_from}.")
        self.per, self.right_per_wrong, self.right_from = per, right_per_wrong, right_from

    @override
    def admit(
        self, problems: Sequence[Problem], tokenizer: Tokenizer, sampling: Sampling, num_rollouts: int
    ) -> list[Problem]:
        if self.per == "prompt" and num_rollouts < 2:
            raise ValueError(
                "data.rollouts_per_prompt: BalancedMarks balances the answers of a prompt, and there is one of each."
                " Set it to 2 or more (the paper takes 16), or source.per: step."
            )
        return list(problems)

    @override
    def share(self, asked: PromptBatch, graded: RolloutBatch | None, seed: int) -> RolloutBatch:
        assert graded is not None, "its own answers are asked for in every step"
        size = len(graded.rollouts) // max(1, len(asked.positions))
        keys = [(position, sample) for position in asked.positions for sample in range(size)]
        marks = {key: self._mark(rollout) for key, rollout in zip(keys, graded.rollouts, strict=True)}
        if self.per == "step":
            everywhere = {key: mark for part in gather_objects(marks) for key, mark in part.items()}
            left_out = self._surplus(everywhere, seed, asked.step)
        else:
            left_out = set()
            for position in asked.positions:
                group = {key: mark for key, mark in marks.items() if key[0] == position}
                left_out |= self._surplus(group, seed, asked.step, position)
        rollouts = [
            left_untrained(rollout) if key in left_out else rollout
            for key, rollout in zip(keys, graded.rollouts, strict=True)
        ]
        return replace(graded, rollouts=rollouts)

    def _surplus(self, marks: Mapping[tuple[int, int], float], *seed_parts: int) -> set[tuple[int, int]]:
        right = sorted(key for key, mark in marks.items() if mark >= self.right_from)
        wrong = sorted(key for key, mark in marks.items() if mark < self.right_from)
        return surplus(right, wrong, self.right_per_wrong, derive_seed("balanced marks", *seed_parts))

    def _mark(self, rollout: Rollout) -> float:
        if math.isnan(rollout.reward):
            raise ValueError(
                f"data.source: BalancedMarks needs marked answers, but those to problem {rollout.problem.uid!r} have no"
                " mark. Use a task that marks all its problems, and data.horizon: null."
            )
        return rollout.reward


def surplus(right: Sequence[Key], wrong: Sequence[Key], right_per_wrong: float, seed: int) -> set[Key]:
    """What must go for `right_per_wrong` right ones for each wrong one; nothing where one kind would vanish.

    Args:
        right: The right ones.
        wrong: The wrong ones.
        right_per_wrong: Wanted.
        seed: Draws those that go.
    """
    most_right, most_wrong = int(len(wrong) * right_per_wrong), int(len(right) / right_per_wrong)
    if len(right) > most_right >= 1:
        too_many, most = right, most_right
    elif len(wrong) > most_wrong >= 1:
        too_many, most = wrong, most_wrong
    else:
        return set()
    order = torch.randperm(len(too_many), generator=torch.Generator().manual_seed(seed)).tolist()
    return {too_many[i] for i in order[most:]}


def left_untrained(rollout: Rollout) -> Rollout:
    """The same answer, with no token to be scored or trained on."""
    return replace(rollout, student_wrote=torch.zeros(len(rollout.response_ids), dtype=torch.bool))
