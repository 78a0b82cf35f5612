"""The sources of a task, split by split, and what tasks do to all questions alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

from opd_lightning.interfaces import Problem, Split
from opd_lightning.tasks.sources import DataSource, load_problems

GivenSources = DataSource | list[DataSource] | None


class SplitSources:
    """The data sources of each split; prediction uses those of the test split."""

    def __init__(self, train: GivenSources, validation: GivenSources, test: GivenSources) -> None:
        given = {"train": train, "validation": validation, "test": test}
        self._sources = {
            split: [sources] if isinstance(sources, DataSource) else list(sources or ())
            for split, sources in given.items()
        }

    def __iter__(self) -> Iterator[DataSource]:
        for sources in self._sources.values():
            yield from sources

    def read(self, split: Split, read_answer: Callable[[str], str] | None) -> list[Problem]:
        """Read the problems of a split, source after source in file order; none when the split has no source.

        Raises:
            ValueError: A source cannot be read, or two sources of the split have the same name.
        """
        name = "test" if split == "predict" else split
        sources = self._sources[name]
        repeated = [label for label, count in Counter(source.label for source in sources).items() if count > 1]
        if repeated:
            raise ValueError(f"task.{name}: several sources are called {repeated[0]!r}. Give each its own `name`.")
        return [problem for source in sources for problem in load_problems(source, name, read_answer)]

    def check_system_prompt(self, system_prompt: str | None) -> None:
        """Refuse a system prompt that raw sources would leave out.

        Raises:
            ValueError: There is one, and a raw source.
        """
        if system_prompt is not None and (raw := [source.path for source in self if source.raw]):
            raise ValueError(
                f"task.system_prompt: {raw[0]} is raw, and raw prompts have no system message. Write the text into"
                " source.question, or remove one of the two."
            )


def is_raw(problem: Problem) -> bool:
    """Whether the problem's text is the whole prompt, without a chat template."""
    return problem.messages[0]["role"] == "raw"


def with_system_prompt(problem: Problem, system_prompt: str | None) -> Problem:
    """The problem with a system message in front, unless it brings its own."""
    if system_prompt is None or problem.messages[0]["role"] == "system":
        return problem
    return replace(problem, messages=({"role": "system", "content": system_prompt}, *problem.messages))
