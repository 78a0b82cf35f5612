"""`PromptTask`: prompts without answers, from files or hub data sets."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from opd_lightning.interfaces import Problem, Split, Task
from opd_lightning.tasks.repeats import report_repeats
from opd_lightning.tasks.sources import DataSource
from opd_lightning.tasks.splits import SplitSources, with_system_prompt


class PromptTask(Task):
    """Prompts, and nothing to mark: on-policy distillation needs no answers.

    Rollouts have no reward, so what needs rewards (accuracy, `TaskAccuracy`, `DifficultyPool`) is not to be had. The
    answer column of the sources is not read and stays among the columns of a problem.

    Repeated prompts are reported as a warning; dropping them concerns the training split only.

    Args:
        train: Source or sources of the training prompts (in YAML ``{path: data/train.jsonl, question: prompt}``, or a
            list of such).
        validation: The same for validation.
        test: The same for testing; prediction uses it too.
        system_prompt: Text of a system message put first.
        drop_duplicates: Train only on the first of the same prompts.

    Raises:
        ValueError: There is a system prompt for raw prompts; from `problems`, a source cannot be read.
    """

    def __init__(
        self,
        train: DataSource | list[DataSource] | None = None,
        validation: DataSource | list[DataSource] | None = None,
        test: DataSource | list[DataSource] | None = None,
        system_prompt: str | None = None,
        drop_duplicates: bool = False,
    ) -> None:
        self._sources = SplitSources(train, validation, test)
        self._sources.check_system_prompt(system_prompt)
        self.system_prompt = system_prompt or None
        self.drop_duplicates = drop_duplicates

    def reworded(self, wording: Mapping[str, Any]) -> Task:
        """The same task with another `system_prompt`.

        Raises:
            ValueError: Something else is to change, or there are raw prompts.
        """
        super().reworded({name: value for name, value in wording.items() if name != "system_prompt"})
        other = copy.copy(self)
        other.system_prompt = wording.get("system_prompt", self.system_prompt) or None
        self._sources.check_system_prompt(other.system_prompt)
        return other

    def problems(self, split: Split) -> list[Problem]:
        """Read the prompts of a split, source after source in file order; none when the split has no source.

        Raises:
            ValueError: A source cannot be read, or two sources of the split have the same name.
        """
        prompts = [with_system_prompt(problem, self.system_prompt) for problem in self._sources.read(split, None)]
        return report_repeats(prompts, split, drop_duplicates=split == "train" and self.drop_duplicates)
