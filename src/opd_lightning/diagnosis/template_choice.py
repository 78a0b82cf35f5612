"""Which of several templates fits the pair best: the same problems, put in several ways, measured prompt by prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd_lightning.diagnosis.estimates import estimate_mean
from opd_lightning.diagnosis.measurements import Estimate, TemplateNumbers
from opd_lightning.diagnosis.pair import Pair
from opd_lightning.diagnosis.prompt_rows import PROMPT_NUMBERS, PromptRow, measure_prompts
from opd_lightning.diagnosis.verdicts import Verdict
from opd_lightning.interfaces import Problem, Tokenizer
from opd_lightning.rollouts.answering import render_prompts

REFERENCE = "as configured"
SIGNALS = ("overlap_ratio", "teacher_log_prob")  # what decides between templates that are right equally often
TEMPLATE_SOURCE = (
    "arXiv 2604.13016, section 5.2: the template that the teacher was trained with gave a higher overlap from the start"
    " and a higher accuracy at the end (one pair, one seed, no numbers printed). Two standard errors are our choice;"
    " of forty templates that differ in nothing, about one will look certain."
)


@dataclass(frozen=True)
class PromptTemplate:
    """One way of putting the problems to both models.

    Attributes:
        name: In tables.
        tokenizer: Renders them.
        problems: The same as everybody else's, in the same order, in its words.
        settings: What makes a run put them so, nested as in its YAML.
    """

    name: str
    tokenizer: Tokenizer
    problems: Sequence[Problem]
    settings: Mapping[str, Any]


def compare_templates(
    pair: Pair,
    reference: TemplateNumbers,
    templates: Sequence[PromptTemplate],
    num_samples: int,
    say: Callable[..., None],
) -> tuple[TemplateNumbers, ...]:
    """Measure each template as the reference was: the same seeds, both models, the student's answers token by token.

    Args:
        pair: Loaded.
        reference: The run as it is configured.
        templates: The others.
        num_samples: Answers per problem.
        say: Told what is done next.
    """
    found = [reference]
    for template in templates:
        say(f"student and teacher answer {len(template.problems)} prompts of the template {template.name!r}")
        prompts = render_prompts(
            template.tokenizer,
            template.problems,
            range(len(template.problems)),
            num_samples=num_samples,
            seed_parts=(pair.seed, "diagnose"),
        )
        example = template.tokenizer.decode(prompts[0].token_ids, skip_special_tokens=False)
        rows = measure_prompts(pair, prompts)
        found.append(template_numbers(template.name, template.settings, example, rows))
    return tuple(found)


def template_numbers(
    name: str, settings: Mapping[str, Any], example: str, rows: Sequence[PromptRow]
) -> TemplateNumbers:
    """The rows of a template's prompts, as columns."""
    columns = {column: tuple(row[column] for row in rows) for column in PROMPT_NUMBERS}
    return TemplateNumbers(name, settings, example, columns)


def mean_of(template: TemplateNumbers, column: str) -> Estimate | None:
    """Mean over the prompts where a number is known; None where it is known nowhere."""
    known = [value for value in template.by_prompt[column] if value is not None]
    return estimate_mean([[value] for value in known]) if known else None


def difference(template: TemplateNumbers, other: TemplateNumbers, column: str) -> Estimate | None:
    """Mean of the differences, prompt by prompt: what the prompts have in common cancels."""
    pairs = zip(template.by_prompt[column], other.by_prompt[column], strict=True)
    known = [one - two for one, two in pairs if one is not None and two is not None]
    return estimate_mean([[value] for value in known]) if known else None


def choose_template(templates: Sequence[TemplateNumbers]) -> tuple[TemplateNumbers, str]:
    """Which template to take, and why, in words; the first is the run's own.

    Templates under which the teacher is certainly less often right than under its best are out. Of the others the one
    with the highest overlap (the teacher's log-likelihood, where no overlap is known) is taken, if that is certain or
    the run's own is out. Certain is by two standard errors of the paired differences.
    """
    own = templates[0]
    left = [each for each in templates if not _is_worse(each, templates, "teacher_accuracy")]
    signal = _signal(own)
    best = max(left, key=lambda each: _value(each, signal))
    if own not in left:
        return best, "under the present one the teacher is less often right"
    if _is_above(best, own, signal):
        return best, "student and teacher agree more under it"
    return own, "no other is certainly better"


def recommend_template(templates: Sequence[TemplateNumbers]) -> Verdict:
    """The choice as a verdict."""
    own, signal = templates[0], _signal(templates[0])
    chosen, reason = choose_template(templates)
    rule = (
        "A template under which the teacher is certainly less often right than under its best is out. Of the others the"
        f" highest {PROMPT_NUMBERS[signal]} counts; the run's own stays unless that is certain, or it is out."
    )
    because = "; ".join(_words(each, own, signal) for each in templates)
    words = f"Keep the template {REFERENCE}" if chosen is own else f"Take the template {chosen.name!r}"
    return Verdict(f"{words}: {reason}", f"{because[0].upper()}{because[1:]}.", rule, TEMPLATE_SOURCE)


def _signal(own: TemplateNumbers) -> str:
    return next((name for name in SIGNALS if mean_of(own, name) is not None), SIGNALS[-1])


def _is_worse(template: TemplateNumbers, templates: Sequence[TemplateNumbers], column: str) -> bool:
    if mean_of(template, column) is None:
        return False
    best = max(templates, key=lambda each: _value(each, column))
    return _is_above(best, template, column)


def _is_above(template: TemplateNumbers, other: TemplateNumbers, column: str) -> bool:
    gain = difference(template, other, column)
    return gain is not None and gain.lower > 0


def _value(template: TemplateNumbers, column: str) -> float:
    mean = mean_of(template, column)
    return float("-inf") if mean is None else mean.value


def _words(template: TemplateNumbers, own: TemplateNumbers, signal: str) -> str:
    shown = []
    for column in ("teacher_accuracy", signal):
        if (mean := mean_of(template, column)) is None:
            continue
        against = difference(template, own, column) if template is not own else None
        error = "" if against is None or against.error is None else f", {against.value:+.3f} ± {against.error:.3f}"
        shown.append(f"{PROMPT_NUMBERS[column]} {mean.value:.3f}{error}")
    return f"{template.name}: {', '.join(shown) or 'nothing is known'}"
