"""`Filtered`: part of the problems."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from opd_lightning.interfaces import Problem, PromptOutcome, PromptSelector
from opd_lightning.interfaces.arguments import check_at_least
from opd_lightning.interfaces.columns import check_where, look_up, matches
from opd_lightning.randomness import derive_seed
from opd_lightning.selection.passes import Shuffled, check_num_problems


class Filtered(PromptSelector):
    """Another selector on part of the problems.

    Args:
        inner: Chooses among the problems that pass; None is `Shuffled()`.
        where: Keep problems whose column holds this value, or one of these values (``{"level": [1, 2]}``).
        max_prompt_characters: Keep problems whose messages have at most so many characters together.
        uids: Keep only these problems.
        most: Of those that pass, keep at most so many, drawn with the seed of the run.

    Raises:
        ValueError: A limit is below 1; from `setup`, no problem passes, or a uid is none of the training problems.
    """

    def __init__(
        self,
        inner: PromptSelector | None = None,
        where: dict[str, Any] | None = None,
        max_prompt_characters: int | None = None,
        uids: list[str] | None = None,
        most: int | None = None,
    ) -> None:
        check_at_least(1, "selector", most=most)
        if max_prompt_characters is not None and max_prompt_characters < 1:
            raise ValueError(
                f"selector.max_prompt_characters: expected an integer of at least 1, got {max_prompt_characters}."
            )
        self.inner = inner if inner is not None else Shuffled()
        self.needs_rewards = self.inner.needs_rewards
        self.where = where or {}
        check_where(self.where, "selector")
        self.max_prompt_characters = max_prompt_characters
        self.uids, self.most = uids, most

    def setup(self, problems: Sequence[Problem], seed: int) -> None:
        """Keep the problems that pass, and hand them on.

        Raises:
            ValueError: No problem passes, or a uid is none of them.
        """
        self._num_problems = len(problems)
        known = {problem.uid for problem in problems}
        if unknown := [uid for uid in self.uids or () if uid not in known]:
            raise ValueError(
                f"selector.uids: {len(unknown)} of {len(self.uids or ())} are no training problems, the first is"
                f" {unknown[0]!r}. A uid of this run is {problems[0].uid!r}."
            )
        self._kept = [i for i, problem in enumerate(problems) if self._passes(problem)]
        if not self._kept:
            seen = {path: sorted({str(look_up(p.columns, path)) for p in problems})[:8] for path in self.where}
            columns = ", ".join(map(str, problems[0].columns)) or "none"
            raise ValueError(
                f"selector: where={self.where} and max_prompt_characters={self.max_prompt_characters} leave none of the"
                f" {len(problems)} problems. Columns: {columns}; values seen: {seen}."
            )
        if self.most is not None:
            order = torch.randperm(
                len(self._kept), generator=torch.Generator().manual_seed(derive_seed(seed, "kept problems"))
            ).tolist()
            self._kept = sorted(self._kept[place] for place in order[: self.most])
        self._places = {index: place for place, index in enumerate(self._kept)}
        self.inner.setup([problems[i] for i in self._kept], seed)

    def _passes(self, problem: Problem) -> bool:
        length = sum(len(message["content"]) for message in problem.messages)
        short = self.max_prompt_characters is None or length <= self.max_prompt_characters
        named = self.uids is None or problem.uid in self.uids
        return short and named and matches(problem.columns, self.where)

    @property
    def epoch_length(self) -> int:
        """The inner selector's, over the kept problems."""
        return self.inner.epoch_length

    def select(self, num_problems: int) -> list[int]:
        """Indices of the next problems."""
        return [self._kept[place] for place in self.inner.select(num_problems)]

    def observe(self, outcomes: Iterable[PromptOutcome]) -> None:
        """Hand the outcomes on."""
        self.inner.observe([PromptOutcome(self._places[outcome.index], outcome.rewards) for outcome in outcomes])

    def state_dict(self) -> dict[str, Any]:
        """State of the inner selector."""
        return {"num_problems": self._num_problems, "inner": self.inner.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`.

        Raises:
            ValueError: The state belongs to another number of problems, before or after the filters.
        """
        check_num_problems(state, self._num_problems)
        self.inner.load_state_dict(state["inner"])

    def metrics(self) -> dict[str, float]:
        """The inner selector's."""
        return self.inner.metrics()
