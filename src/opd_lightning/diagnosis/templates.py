"""What student and teacher make of the same prompts before a single weight is looked at."""

from __future__ import annotations

from collections.abc import Sequence

from opd_lightning.diagnosis.measurements import RenderedPrompt
from opd_lightning.interfaces import Problem, Prompt, Tokenizer

UNKNOWN = (
    "The teacher's tokenizer is not at hand here: that it speaks the student's token ids has been checked where the"
    " teacher can say so, its template has not."
)
NO_TEMPLATE = "The teacher has no chat template of its own for these prompts."
SAME_PROMPTS = "Both templates make the same prompts."


def render_both(student: Tokenizer, teacher: Tokenizer | None, prompts: Sequence[Prompt]) -> RenderedPrompt:
    """The first prompt as both templates make it; where some differ, the first of those.

    Args:
        student: Rendered the prompts.
        teacher: The teacher's own tokenizer; None where there is none at hand.
        prompts: At least one.
    """
    theirs = _render(teacher, prompts)
    different = [i for i, prompt in enumerate(prompts) if theirs is not None and theirs[i] != prompt.token_ids]
    shown = different[0] if different else 0
    return RenderedPrompt(
        uid=prompts[shown].problem.uid,
        student=student.decode(prompts[shown].token_ids, skip_special_tokens=False),
        # the ids are the same tokens on both sides, so either tokenizer may spell them out
        teacher=None if theirs is None else student.decode(theirs[shown], skip_special_tokens=False),
        num_different=None if theirs is None else len(different),
    )


def find_differences(
    student: Tokenizer, teacher: Tokenizer | None, prompt: RenderedPrompt, num_prompts: int
) -> tuple[str, ...]:
    """What is worth knowing about the two tokenizers and their templates, in words."""
    if teacher is None:
        return (UNKNOWN,)
    stops = f"Both end an answer with {_names(student, student.stop_ids)}."
    if set(teacher.stop_ids) != set(student.stop_ids):
        stops = (
            f"The student's answers end with {_names(student, student.stop_ids)}, the teacher's with"
            f" {_names(student, teacher.stop_ids)}; the student's end both."
        )
    templates = SAME_PROMPTS
    if prompt.num_different is None:
        templates = NO_TEMPLATE
    elif prompt.num_different:
        templates = (
            f"{prompt.num_different} of {num_prompts} prompts look different with the teacher's own template. The"
            " student's is used for both, so the teacher reads prompts it was not tuned on; student.chat_template can"
            " be set to the teacher's."
        )
    return (f"Both speak the same {student.vocab_size} token ids.", stops, templates)


def render_own(tokenizer: Tokenizer, problem: Problem) -> tuple[int, ...] | None:
    """A problem as a model's own template renders it; None where it has no template for it."""
    try:
        return tuple(tokenizer.render(problem.messages))
    except ValueError:  # no template, or one that does not know these roles; nobody asks the teacher with it
        return None


def _render(tokenizer: Tokenizer | None, prompts: Sequence[Prompt]) -> list[tuple[int, ...]] | None:
    if tokenizer is None:
        return None
    rendered = [render_own(tokenizer, prompt.problem) for prompt in prompts]
    known = [token_ids for token_ids in rendered if token_ids is not None]
    return known if len(known) == len(prompts) else None


def _names(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    return ", ".join(repr(tokenizer.decode([i], skip_special_tokens=False)) for i in token_ids) or "no token of its own"
