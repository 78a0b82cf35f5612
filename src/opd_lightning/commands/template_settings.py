"""Templates that `diagnose` compares: named by the settings of a run that make them, and given back as such."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_lightning.backends.hf import HFStudent, HFTeacher
from opd_lightning.diagnosis.pair import Pair
from opd_lightning.diagnosis.template_choice import REFERENCE, PromptTemplate
from opd_lightning.interfaces import Problem, Split, Task, Tokenizer
from opd_lightning.rollouts.prompt_limits import check_context

TEACHERS_OWN = "the teacher's own"
_OF_TASK = ("suffix", "system_prompt", "strip")
_OF_STUDENT = ("chat_template", "template_kwargs")


@dataclass(frozen=True)
class TemplateSettings:
    """One way of putting the problems, by what it changes in the run's settings; null leaves a setting as it is.

    Args:
        name: In tables; null is made of the settings.
        suffix: `suffix` of the task; '' adds nothing.
        system_prompt: `system_prompt` of the task; '' is none.
        strip: `strip` of the task.
        chat_template: `chat_template` of the student: its text, or a file that holds it.
        template_kwargs: `template_kwargs` of the student.
    """

    name: str | None = None
    suffix: str | None = None
    system_prompt: str | None = None
    strip: list[str] | None = None
    chat_template: str | None = None
    template_kwargs: dict[str, Any] | None = None

    @property
    def changes(self) -> dict[str, Any]:
        """The settings that it changes."""
        given = {name: getattr(self, name) for name in (*_OF_TASK, *_OF_STUDENT)}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def label(self) -> str:
        """Its name."""
        return self.name or ", ".join(f"{name} {_shorten(value)}" for name, value in self.changes.items())


def make_templates(
    given: Sequence[TemplateSettings], pair: Pair, problems: Sequence[Problem], split: Split, folder: Path
) -> list[PromptTemplate]:
    """Make templates of settings, and of the teacher's own chat template where it puts the problems otherwise.

    Args:
        given: What was asked for.
        pair: Its student, task and teacher; not loaded.
        problems: As the run puts them.
        split: Where they are from.
        folder: Takes a file with the teacher's template, which settings then name.

    Raises:
        ValueError: A setting does not exist here, or changes nothing; names repeat; prompts are too long.
    """
    found: list[PromptTemplate] = []
    seen = {_rendered(pair.student.tokenizer, problems): REFERENCE}
    for place, settings in enumerate(given):
        who = f"templates[{place}]"
        if not settings.changes:
            raise ValueError(f"{who}: it changes no setting. Give one of {', '.join((*_OF_TASK, *_OF_STUDENT))}.")
        template = _make(settings, pair, problems, split, who)
        prompts = _rendered(template.tokenizer, template.problems)
        if prompts in seen:
            raise ValueError(
                f"{who}: {template.name!r} makes the same prompts as the template {seen[prompts]!r}. Leave it out."
            )
        if template.name in (*seen.values(), TEACHERS_OWN):
            raise ValueError(f"{who}.name: {template.name!r} is the name of another template. Choose another.")
        _check_length(prompts, pair, who)
        seen[prompts] = template.name
        found.append(template)
    own = _teachers_own(pair, problems, split, folder, seen)
    return [*found, *([own] if own is not None else [])]


def _make(
    settings: TemplateSettings, pair: Pair, problems: Sequence[Problem], split: Split, who: str
) -> PromptTemplate:
    wording = {name: value for name, value in settings.changes.items() if name in _OF_TASK}
    rendering = {name: value for name, value in settings.changes.items() if name in _OF_STUDENT}
    nested: dict[str, Any] = {}
    tokenizer = pair.student.tokenizer
    if rendering:
        if not isinstance(pair.student, HFStudent):
            raise ValueError(
                f"{who}.{next(iter(rendering))}: {type(pair.student).__name__} has no setting of this name that could"
                " be changed; an HFStudent has. Leave it out."
            )
        tokenizer = pair.student.with_template(rendering).tokenizer
        nested["model"] = {"student": {"init_args": rendering}}
    if wording:
        problems = _reworded(pair.task, wording, problems, split, who)
        nested["data"] = {"task": _inside(pair.task, wording)}
    return PromptTemplate(settings.label, tokenizer, problems, nested)


def _reworded(
    task: Task, wording: Mapping[str, Any], problems: Sequence[Problem], split: Split, who: str
) -> list[Problem]:
    by_uid = {problem.uid: problem for problem in task.reworded(wording).problems(split)}
    if missing := [problem.uid for problem in problems if problem.uid not in by_uid]:
        raise ValueError(
            f"{who}: put so, the problem {missing[0]!r} is not in the {split} split (drop_duplicates may leave it out)."
            " Leave duplicates in to compare templates."
        )
    return [by_uid[problem.uid] for problem in problems]


def _inside(task: Task, wording: Mapping[str, Any]) -> dict[str, Any]:
    """The settings where they belong: in the innermost of tasks around a task."""
    inner = getattr(task, "inner", None)
    return {"init_args": dict(wording) if inner is None else {"inner": _inside(inner, wording)}}


def _teachers_own(
    pair: Pair, problems: Sequence[Problem], split: Split, folder: Path, seen: Mapping[Any, str]
) -> PromptTemplate | None:
    text = pair.teacher.chat_template if isinstance(pair.teacher, HFTeacher) else None
    if text is None or not isinstance(pair.student, HFStudent):
        return None
    file = folder / "teacher_template.jinja"
    template = _make(TemplateSettings(TEACHERS_OWN, chat_template=text), pair, problems, split, TEACHERS_OWN)
    prompts = _rendered(template.tokenizer, problems)
    if prompts in seen:
        return None
    _check_length(prompts, pair, f"templates: {TEACHERS_OWN}")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    template.settings["model"]["student"]["init_args"]["chat_template"] = str(file)
    return template


def _rendered(tokenizer: Tokenizer, problems: Sequence[Problem]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tokenizer.render(problem.messages)) for problem in problems)


def _check_length(prompts: Sequence[Sequence[int]], pair: Pair, who: str) -> None:
    longest = max(map(len, prompts))
    for reader, limit in (("student", pair.student.context_length), ("teacher", pair.teacher.context_length)):
        check_context(f"{who}: the {reader} reads", limit, longest, pair.sampling)


def _shorten(value: Any) -> str:
    text = " ".join(str(value).split())
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
