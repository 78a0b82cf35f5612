import warnings
from pathlib import Path

import pytest

from opd_lightning.interfaces import Problem
from opd_lightning.tasks import ArithmeticTask, DataSource, MathTask
from opd_lightning.tasks.overlap import find_overlap, report_overlap

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"

SUFFIX = " Please reason step by step, and put your final answer within \\boxed{}."
PENS = "Tom has {n} red pens and twice as many blue ones. He gives a third of all his pens to Ann. How many are left?"
DOGS = "A dog runs {n} metres in a minute, and a cat half of that. How far apart are they after a quarter of an hour?"


def ask(*questions):
    return [Problem(f"q/{i}", ({"role": "user", "content": text + SUFFIX},), "1") for i, text in enumerate(questions)]


OTHERS = [f"Question number {n} is about the {n} hills of some town" for n in range(60)]


def test_same_words_and_nearly_the_same_words_are_found():
    train = ask(*OTHERS, PENS.format(n=3), DOGS.format(n=80))
    held_out = ask(
        "Something else", DOGS.format(n=80).upper() + " ", PENS.format(n=5), "Who runs 80 metres in a minute?"
    )
    overlap = find_overlap(train, held_out)
    assert overlap.same == ((1, 61),)
    assert overlap.near == ((2, 60),)
    with pytest.warns(
        UserWarning, match=r"2 of 4 validation questions .*\(1 word for word, 1 nearly; first: q/1 and q/61\)"
    ):
        report_overlap(train, held_out, "validation")


def test_instructions_and_short_questions_are_not_near():
    assert find_overlap(ask(*OTHERS), ask("Something else", "Question number 61 is about")).near == ()
    sums = ArithmeticTask(num_train=2000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report_overlap(sums.problems("train"), sums.problems("validation"), "validation")


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the GSM8K files are not there")
def test_gsm8k_has_a_few_near_repeats():
    task = MathTask(DataSource(str(GSM8K / "train.jsonl")), test=DataSource(str(GSM8K / "test.jsonl")))
    train, test = task.problems("train"), task.problems("test")
    overlap = find_overlap(train, test)
    assert overlap.same == ()
    words = [test[i].messages[0]["content"] + train[j].messages[0]["content"] for i, j in overlap.near]
    assert ["at the same rate" in text.lower() for text in words] == [True, False]
    assert ["snowflake stamps" in text for text in words] == [False, True]  # the same stories with other numbers
