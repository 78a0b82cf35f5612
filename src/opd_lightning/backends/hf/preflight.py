"""Do student and teacher speak the same token ids? Asked before any weights are loaded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from opd_lightning.backends.hf.loading import ModelSource, load_config, load_eos_ids, load_tokenizer, most_tokens
from opd_lightning.backends.hf.tokenizer import HFTokenizer, check_vocabulary_rows
from opd_lightning.interfaces import Student, Tokenizer

_PROBE = ({"role": "user", "content": "What is 1 + 1?"},)
_NUM_NAMED = 3  # differences named in a message


@dataclass(frozen=True)
class Compatibility:
    """What the check found out.

    Attributes:
        vocab_size: V, the ids that student and teacher share.
        context_length: Most tokens that the teacher accepts; None when its configuration names none.
    """

    vocab_size: int
    context_length: int | None


def check_compatibility(student: Student, source: ModelSource) -> Compatibility:
    """Check a teacher's tokenizer and configuration against the student, reading no weights.

    Refused: different token ids; a teacher with fewer rows than ids; a teacher that ends its turn with a token which
    does not close the student's responses (the student would learn to write it and then run on to the length limit).
    Warned about: a different chat template (the student's is used for both) and a shorter context. More rows than ids
    are fine: they are cut off.

    Args:
        student: Any student; asked for its vocabulary, stop ids, context and for a rendered prompt.
        source: Where the teacher comes from.

    Raises:
        ValueError: The pair cannot be distilled; the message says what to do.
    """
    config = load_config(source)
    own = student.tokenizer
    teacher = HFTokenizer(
        load_tokenizer(source),
        load_eos_ids(source, config),
        template_kwargs=own.template_kwargs if isinstance(own, HFTokenizer) else None,
        role=source.role,
    )
    _compare_vocabularies(own, teacher, source)
    check_vocabulary_rows(source, config, teacher)
    _compare_stop_ids(own, teacher, source)
    _compare_rendering(own, teacher, source)
    limit = most_tokens(config)
    if limit is not None and limit < student.context_length:
        warnings.warn(
            f"{source.argument}: the teacher's context of {limit} tokens is shorter than the student's of"
            f" {student.context_length}; longer rollouts will be refused. Set student.max_context_length: {limit}.",
            stacklevel=2,
        )
    return Compatibility(own.vocab_size, limit)


def _compare_vocabularies(student: Tokenizer, teacher: HFTokenizer, source: ModelSource) -> None:
    own, other = dict(student.vocabulary), teacher.vocabulary
    if own == other:
        return
    different = sorted(own.items() ^ other.items(), key=lambda item: (item[1], item[0]))
    tokens = list(dict.fromkeys(token for token, _ in different))
    named = "; ".join(
        f"{token!r} is {_id(own, token)} for the student and {_id(other, token)} for the teacher"
        for token in tokens[:_NUM_NAMED]
    )
    raise ValueError(
        f"{source.argument}: the tokenizers of the student and of {source.path!r} differ in {len(tokens)} tokens:"
        f" {named}. The teacher scores the student's own token ids, so both must have the same vocabulary: choose a"
        " teacher of the same family."
    )


def _id(vocabulary: Mapping[str, int], token: str) -> str:
    return f"id {vocabulary[token]}" if token in vocabulary else "no token"


def _compare_stop_ids(student: Tokenizer, teacher: HFTokenizer, source: ModelSource) -> None:
    missing = [i for i in teacher.stop_ids if i not in student.stop_ids and i < student.vocab_size]
    if not missing:
        return
    names = [teacher.name_of(token_id) for token_id in missing]
    finding = (
        f"the teacher {source.path!r} ends its answers with {names}, which does not close the student's responses: it"
        " would learn to write it and run on to the length limit."
    )
    if not student.stop_ids:  # then `sampling.stop_ids` says what does, and nobody knows it here
        warnings.warn(
            f"sampling.stop_ids: the student's tokenizer names none. Unless you gave {missing}: {finding}",
            stacklevel=3,
        )
        return
    raise ValueError(
        f"student.extra_stop_tokens: {finding} Set student.extra_stop_tokens: {names} (a student of your own: the"
        " stop_ids of its tokenizer)."
    )


def _compare_rendering(student: Tokenizer, teacher: HFTokenizer, source: ModelSource) -> None:
    if not teacher.has_template:
        return
    if (rendered := _rendering(student)) is not None and rendered != _rendering(teacher):
        warnings.warn(
            f"{source.argument}: the chat templates of student and teacher differ. The student's is used for both, so"
            " the teacher sees prompts it was not tuned on. student.chat_template can be set to the teacher's.",
            stacklevel=3,
        )


def _rendering(tokenizer: Tokenizer) -> list[int] | None:
    """A probe as the tokenizer renders it; None without a template, or where it fails on the probe."""
    try:
        return tokenizer.render(_PROBE)
    except ValueError:  # raw prompts need no template, and the real prompts are rendered before this
        return None
