"""Templates are compared prompt by prompt, and another one is taken only where that is certain."""

import json

import pytest
from conftest import make_tokenizer
from diagnosed import make_diagnosis, make_pair

from opd_lightning.backends.hf.tokenizer import HFTokenizer
from opd_lightning.diagnosis.examination import diagnose
from opd_lightning.diagnosis.prompt_rows import PROMPT_NUMBERS
from opd_lightning.diagnosis.report import as_json, make_report
from opd_lightning.diagnosis.template_choice import (
    PromptTemplate,
    choose_template,
    difference,
    mean_of,
    template_numbers,
)

BARE = "{{ messages[0]['content'] }}"


def by_hand(name, accuracies, overlaps, **others):
    rows = [
        dict.fromkeys(PROMPT_NUMBERS) | {"teacher_accuracy": accuracy, "overlap_ratio": overlap} | others
        for accuracy, overlap in zip(accuracies, overlaps, strict=True)
    ]
    return template_numbers(name, {"data": {"task": {"init_args": {"suffix": name}}}}, f"1+1 {name}", rows)


OWN = by_hand("as configured", [0.5, 0.25, 0.75, 0.5], [0.6, 0.7, 0.65, 0.62])
ALIKE = by_hand("alike", [0.25, 0.5, 0.75, 0.5], [0.7, 0.65, 0.6, 0.63])
CLOSER = by_hand("closer", [0.5, 0.25, 0.5, 0.75], [0.65, 0.76, 0.71, 0.66])
WRONG = by_hand("wrong", [0.0, 0.0, 0.25, 0.0], [0.9, 0.9, 0.9, 0.95])


@pytest.mark.parametrize(
    ("templates", "name", "reason"),
    [
        ((OWN, ALIKE), "as configured", "no other is certainly better"),
        ((OWN, ALIKE, CLOSER), "closer", "student and teacher agree more under it"),
        ((OWN, WRONG), "as configured", "no other is certainly better"),  # agreement on wrong answers is none
        ((WRONG, ALIKE, OWN), "alike", "under the present one the teacher is less often right"),
        ((OWN, by_hand("unmarked", [None] * 4, [0.9] * 4)), "unmarked", "student and teacher agree more under it"),
    ],
)
def test_a_template_is_taken_where_that_is_certain(templates, name, reason):
    chosen, why = choose_template(templates)
    assert (chosen.name, why) == (name, reason)


def test_without_overlaps_the_teachers_likelihood_decides():
    def likelihoods(name, *values):
        return template_numbers(name, {}, "", [dict.fromkeys(PROMPT_NUMBERS) | {"teacher_log_prob": v} for v in values])

    own, other = likelihoods("as configured", -1.0, -0.9, -1.2), likelihoods("liked", -0.5, -0.45, -0.8)
    assert choose_template((own, other))[0] is other


def test_differences_are_paired():
    gain = difference(CLOSER, OWN, "overlap_ratio")
    assert gain.value == pytest.approx(0.0525) and gain.error == pytest.approx(0.0048, abs=1e-4)
    assert mean_of(OWN, "overlap_ratio").error > 4 * gain.error  # prompts differ more than templates do
    assert difference(CLOSER, OWN, "reverse_kl") is None


def test_the_report_shows_what_to_paste():
    diagnosis = make_diagnosis(templates=(OWN, CLOSER))
    report, plain = make_report(diagnosis), as_json(diagnosis)
    assert report.statements[-1].words == "Take the template 'closer': student and teacher agree more under it"
    table = next(each for each in report.tables if each.title == "Which template fits best")
    assert table.columns == ("", "teacher right", "overlap")
    assert [row[0] for row in table.rows] == ["as configured", "closer", "difference"]
    assert table.rows[2][2] == "5.3% ± 0.5%"
    assert report.texts[-1].text == "data:\n  task:\n    init_args:\n      suffix: closer\n"
    assert plain["templates"][1]["beside_first"]["overlap_ratio"]["value"] == pytest.approx(0.0525)
    assert plain["template"]["words"] == report.statements[-1].words and "prompts" not in plain


def test_a_pair_is_measured_under_each_template(tiny_qwen3_folder, tiny_teacher_folder):
    def measure(make_template):
        pair = make_pair(tiny_qwen3_folder, tiny_teacher_folder)
        pair.teacher.preflight(pair.student)
        problems = pair.task.problems("train")[:3]
        options = {"num_samples": 2, "num_bins": 2, "num_gradient_rollouts": 1}
        return diagnose(pair, problems, templates=[make_template(pair, problems)], **options)

    same = measure(lambda pair, problems: PromptTemplate("same", pair.student.tokenizer, problems, {}))
    own, again = same.templates
    assert own.by_prompt == again.by_prompt  # the same prompts and seeds, so the same answers
    weights = [row["num_answers"] * row["response_length"] for row in same.prompts]
    overlap = sum(w * row["overlap_ratio"] for w, row in zip(weights, same.prompts, strict=True)) / sum(weights)
    assert overlap == pytest.approx(same.facts["overlap_ratio"])
    means = [row["student_accuracy"] for row in same.prompts]
    assert sum(means) / len(means) == pytest.approx(same.student.accuracy.value)
    assert all(row["teacher_log_prob"] < 0 for row in same.prompts)

    bare = HFTokenizer(make_tokenizer(), eos_ids=[1], chat_template=BARE)
    other = measure(lambda pair, problems: PromptTemplate("bare", bare, problems, {}))
    assert other.templates[0] == own and other.templates[1].example == "say a"
    assert other.templates[1].by_prompt["overlap_ratio"] != own.by_prompt["overlap_ratio"]
    json.dumps(as_json(other), allow_nan=False)
