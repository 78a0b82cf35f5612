"""A diagnosis as words, tables and curves, and as plain numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import yaml

from opd_lightning.diagnosis.measurements import (
    Alignment,
    AnswerFacts,
    Continuation,
    Diagnosis,
    Estimate,
    Gradients,
    PositionBin,
    TemplateNumbers,
)
from opd_lightning.diagnosis.prompt_rows import PROMPT_NUMBERS
from opd_lightning.diagnosis.template_choice import choose_template, difference, mean_of, recommend_template
from opd_lightning.diagnosis.verdicts import Verdict, recommend_loss, verdicts
from opd_lightning.reports.contents import Curve, Panel, Report, Statement, Table, Text, number, share
from opd_lightning.reports.printable import printable

SHARES = ("overlap_ratio", "overlap_mass_student", "overlap_mass_teacher", "student_top_mass")
FACTS = {  # in words, in the order of the table
    "overlap_ratio": "overlap ratio",
    "overlap_mass_student": "student's mass on the overlap",
    "overlap_mass_teacher": "teacher's mass on the overlap",
    "student_top_mass": "student's mass on its top k",
    "student_entropy": "student's entropy",
    "teacher_entropy": "teacher's entropy",
    "entropy_gap": "gap of the entropies",
    "reverse_kl": "reverse KL (student to teacher)",
    "forward_kl": "forward KL (teacher to student)",
    "overlap_reverse_kl": "reverse KL on the overlap",
    "overlap_advantage": "overlap-token advantage",
    "sampled_log_ratio": "log p(y) - log q(y) of the sampled tokens",
    "rollout_mismatch": "engine against student, |log p(y)|",
}
TEMPLATE_COLUMNS = {  # narrow heads, for a terminal
    "teacher_accuracy": "teacher right",
    "student_accuracy": "student right",
    "overlap_ratio": "overlap",
    "reverse_kl": "reverse KL",
    "teacher_log_prob": "log q(y)",
}
TEMPLATE_SHARES = ("teacher_accuracy", "student_accuracy", "overlap_ratio")
BY_POSITION = ("reverse_kl", "student_entropy", "teacher_entropy", "overlap_ratio", "overlap_mass_teacher")


def as_json(numbers: Diagnosis) -> dict[str, Any]:
    """Every number and every verdict, plain."""
    plain = asdict(replace(numbers, prompts=()))  # they have a file of their own
    del plain["prompts"]
    for described, loss in zip(plain["gradients"]["losses"], numbers.gradients.losses, strict=True):
        described["noise_scale"] = loss.noise_scale
    plain["verdicts"] = [asdict(each) for each in verdicts(numbers)]
    plain["loss"] = asdict(recommend_loss(numbers.gradients, numbers.facts.get("student_top_mass")))
    for described, template in zip(plain["templates"], numbers.templates, strict=True):
        described["means"] = {name: _plain(mean_of(template, name)) for name in PROMPT_NUMBERS}
        first = numbers.templates[0]
        described["beside_first"] = {name: _plain(difference(template, first, name)) for name in PROMPT_NUMBERS}
    plain["template"] = asdict(recommend_template(numbers.templates)) if numbers.templates else None
    return {"version": 1, **plain}


def make_report(numbers: Diagnosis) -> Report:
    """What people read."""
    loss = recommend_loss(numbers.gradients, numbers.facts.get("student_top_mass"))
    tables = [_pair_table(numbers), _answer_table(numbers)]
    if numbers.continuations:
        tables.append(_continuation_table(numbers.continuations))
    chosen = [recommend_template(numbers.templates)] if numbers.templates else []
    if numbers.templates:
        tables.append(_template_table(numbers.templates))
    tables += [
        _position_table(numbers.positions),
        _gradient_table(numbers.gradients),
        *([_alignment_table(numbers.alignment)] if numbers.alignment is not None else []),
        _settings_table(numbers.settings),
    ]
    return Report(
        title="Diagnosis before training",
        subtitle=(
            f"{numbers.num_prompts} prompts, {numbers.num_rollouts} answers of the student, {numbers.num_tokens}"
            " response tokens. Nothing was trained."
        ),
        statements=[_statement(each) for each in (*verdicts(numbers), loss, *chosen)],
        tables=tables,
        panels=_panels(numbers),
        texts=[*_prompt_texts(numbers), *_template_texts(numbers.templates)],
        notes=[*numbers.findings, *(f"Left out: {each}" for each in numbers.left_out)],
    )


def _statement(verdict: Verdict) -> Statement:
    return Statement(verdict.words, (("because", verdict.because), ("rule", verdict.rule), ("source", verdict.source)))


def _pair_table(numbers: Diagnosis) -> Table:
    rows = [
        (words, share(value) if name in SHARES else number(value), "" if name in SHARES else "nats per token")
        for name, words in FACTS.items()
        if (value := numbers.facts.get(name)) is not None
    ]
    rows.append(
        ("AUROC of the global reward", number(numbers.reward_auroc), f"{number(numbers.num_right)} right answers")
    )
    if (found := numbers.quantization) is not None:
        rows.append(("KL of the teacher in full to the quantised", _with_error(found.kl, number), "nats per token"))
        rows.append(("same likeliest token as in full", share(found.agreement), f"of {found.num_tokens} tokens"))
    note = (
        f"Means over all response tokens, k = {numbers.k} of {numbers.vocab_size} tokens (see docs/metrics.md)."
        " The AUROC is the probability that the teacher's mean log-ratio is higher on a right answer than on another."
    )
    return Table("Student and teacher on the student's answers", ("", "value", "unit"), rows, note)


def _answer_table(numbers: Diagnosis) -> Table:
    columns: dict[str, AnswerFacts | None] = {
        "student": numbers.student,
        "teacher": numbers.teacher,
        "teacher, own template": numbers.teacher_own_template,
    }
    known = {name: facts for name, facts in columns.items() if facts is not None}
    rows = [
        ("accuracy", *(estimate(facts.accuracy) for facts in known.values())),
        ("prompts with right and wrong answers", *(share(facts.mixed_prompts) for facts in known.values())),
        ("response tokens", *(number(facts.response_length, 4) for facts in known.values())),
        ("cut at max_new_tokens", *(share(facts.truncation_rate) for facts in known.values())),
        ("repeated 8-grams", *(share(facts.repetition_rate) for facts in known.values())),
    ]
    note = "Both answered the same prompts, sampled alike. ± is one standard error over prompts."
    return Table("Answers", ("", *known), rows, note)


def _continuation_table(continuations: Sequence[Continuation]) -> Table:
    rows = [
        (
            str(each.depth) if each.depth else "0 (teacher alone)",
            str(each.num_rollouts),
            share(each.student),
            share(each.teacher),
            estimate(each.gain),
        )
        for each in continuations
    ]
    note = (
        "Answers of the student are cut at a depth and ended by the teacher. Only answers longer than the depth take"
        " part, on both sides; longer answers are often harder ones."
    )
    columns = ("tokens of the student", "answers", "student's accuracy", "ended by teacher", "gain")
    return Table("How deep is the teacher still useful", columns, rows, note)


def _position_table(positions: Sequence[PositionBin]) -> Table:
    known = [name for name in BY_POSITION if any(each.facts.get(name) is not None for each in positions)]
    rows = [
        (
            f"{each.first} to {each.last}",
            str(each.num_tokens),
            *((share if name in SHARES else number)(each.facts.get(name)) for name in known),
        )
        for each in positions
    ]
    return Table("By position in the response", ("positions", "tokens", *known), rows)


def _gradient_table(gradients: Gradients) -> Table:
    rows = [
        (
            each.loss,
            number(each.cosine),
            number(each.variance),
            number(each.error),
            number(each.norm),
            number(each.coherence),
            number(each.noise_scale),
        )
        for each in gradients.losses
    ]
    place = "all" if gradients.num_kept >= gradients.num_weights else f"{gradients.num_kept} evenly drawn ones of"
    note = (
        f"Gradients of {gradients.num_rollouts} answers, one of each prompt, over {place} {gradients.num_weights}"
        " trained weights; a gradient is the sum over an answer's tokens. + tail: one more class holds the mass of all"
        " other tokens. Cosine: of the summed gradient with that of the full vocabulary. Variance: spread of single"
        " answers' gradients, relative to it. Error: mean squared difference of single answers' gradients, relative to"
        " it. Coherence: ‖sum‖ / sum of ‖ ‖, 1 where all agree,"
        f" {gradients.num_rollouts**-0.5:.2f} where they have nothing in common. Noise scale: answers at which signal"
        " and noise are equal."
    )
    columns = ("loss", "cosine", "variance", "error", "norm", "coherence", "noise scale")
    return Table("Does the signal add up, and which loss carries it", columns, rows, note)


def _alignment_table(alignment: Alignment) -> Table:
    means = {"all": alignment.cosine, "right answers": alignment.after_right, "others": alignment.after_wrong}
    rows = [(name, _with_error(mean, number), str(mean.num_prompts if mean else 0)) for name, mean in means.items()]
    note = (
        f"At {alignment.num_nodes} tokens the student went on after each of its likeliest candidates; at"
        f" {alignment.num_informative} of them some led to right answers more often than others. Cosine of the reverse"
        " KL's gradient there with that of the expected reward (arXiv 2605.10889), ± one standard error over prompts."
    )
    return Table("Does the teacher push where rewards would", ("tokens in", "cosine", "prompts"), rows, note)


def _template_table(templates: Sequence[TemplateNumbers]) -> Table:
    known = {name: head for name, head in TEMPLATE_COLUMNS.items() if mean_of(templates[0], name) is not None}
    rows = []
    for each in templates:
        shown = {name: share if name in TEMPLATE_SHARES else number for name in known}
        rows.append((each.name, *(_with_error(mean_of(each, name), shown[name]) for name in known)))
        if each is not templates[0]:
            beside = (_with_error(difference(each, templates[0], name), shown[name]) for name in known)
            rows.append(("difference", *beside))
    note = (
        "Means over prompts (not over tokens), ± one standard error; differences are taken prompt by prompt, so that"
        " what prompts have in common cancels. log q(y) is the teacher's log-likelihood of the student's tokens."
    )
    return Table("Which template fits best", ("", *known.values()), rows, note)


def _template_texts(templates: Sequence[TemplateNumbers]) -> list[Text]:
    if not templates:
        return []
    texts = [Text(f"The first prompt in the template {each.name!r}", printable(each.example)) for each in templates]
    chosen, _ = choose_template(templates)
    if chosen.settings:
        pasted = yaml.safe_dump(dict(chosen.settings), sort_keys=False, allow_unicode=True)
        texts.append(Text(f"Settings of the template {chosen.name!r}, for the YAML of the run", pasted))
    return texts


def _settings_table(settings: Mapping[str, Any]) -> Table:
    return Table("What was measured", ("", ""), [(name, str(value)) for name, value in settings.items()])


def _panels(numbers: Diagnosis) -> list[Panel]:
    centres = [(each.first + each.last) / 2 for each in numbers.positions]
    curves = {}
    for name in BY_POSITION:
        known = [
            (x, y)
            for x, each in zip(centres, numbers.positions, strict=True)
            if (y := each.facts.get(name)) is not None
        ]
        if known:
            curves[name] = Curve(FACTS[name], *zip(*known, strict=True))
    nats = [curve for name, curve in curves.items() if name not in SHARES]
    shares = [curve for name, curve in curves.items() if name in SHARES]
    panels = [Panel("In nats, by position in the response", "position", "nats per token", nats)] if nats else []
    panels += [Panel("Agreement, by position in the response", "position", "share", shares)] if shares else []
    if numbers.continuations:
        gain = Curve(
            "gain",
            [each.depth for each in numbers.continuations],
            [each.gain.value for each in numbers.continuations],
            [2 * (each.gain.error or 0.0) for each in numbers.continuations],
        )
        title = "Gain when the teacher goes on (bars: two standard errors)"
        panels.append(Panel(title, "tokens of the student that were kept", "accuracy gained", [gain]))
    return panels


def _prompt_texts(numbers: Diagnosis) -> list[Text]:
    prompt = numbers.prompt
    uid = printable(prompt.uid)
    texts = [Text(f"Prompt {uid} as both models read it (the student's template)", printable(prompt.student))]
    if prompt.teacher is not None:
        same = "the same" if not prompt.num_different else printable(prompt.teacher)
        texts.append(Text(f"Prompt {uid} as the teacher's own template makes it", same))
    return texts


def _with_error(value: Estimate | None, show: Callable[[float | None], str]) -> str:
    if value is None:
        return "-"
    return show(value.value) + ("" if value.error is None else f" ± {show(value.error)}")


def _plain(value: Estimate | None) -> dict[str, float | int | None] | None:
    return None if value is None else asdict(value)


def estimate(value: Estimate | None) -> str:
    """A mean with one standard error, both as percentages; a dash for None."""
    return _with_error(value, share)
