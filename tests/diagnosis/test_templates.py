"""What both sides make of the same prompts."""

import pytest
from conftest import make_tokenizer
from rollouts_by_hand import PROBLEM

from opd_lightning.backends.hf.tokenizer import HFTokenizer
from opd_lightning.diagnosis.templates import NO_TEMPLATE, SAME_PROMPTS, UNKNOWN, find_differences, render_both
from opd_lightning.interfaces import Prompt

STUDENT = HFTokenizer(make_tokenizer(), eos_ids=[1])
PROMPTS = [Prompt(PROBLEM, tuple(STUDENT.render(PROBLEM.messages)), (0,))]


@pytest.mark.parametrize(
    ("teacher", "shown", "finding"),
    [
        (
            HFTokenizer(make_tokenizer(), eos_ids=[1]),
            "<|im_start|>user\nsay a<|im_end|>\n<|im_start|>assistant\n",
            SAME_PROMPTS,
        ),
        (
            HFTokenizer(make_tokenizer(), chat_template="{{ messages[0]['content'] }}"),
            "say a",
            "1 of 1 prompts look different",
        ),
        (HFTokenizer(make_tokenizer(chat_template=None)), None, NO_TEMPLATE),
        (None, None, UNKNOWN),
    ],
)
def test_the_other_template(teacher, shown, finding):
    prompt = render_both(STUDENT, teacher, PROMPTS)
    assert prompt.student == "<|im_start|>user\nsay a<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.teacher == shown
    assert find_differences(STUDENT, teacher, prompt, 1)[-1].startswith(finding)


def test_stop_ids_that_differ_are_named():
    teacher = HFTokenizer(make_tokenizer())
    findings = find_differences(STUDENT, teacher, render_both(STUDENT, teacher, PROMPTS), 1)
    assert findings[1] == (
        "The student's answers end with '<|endoftext|>', '<|im_end|>', the teacher's with '<|im_end|>'; the student's"
        " end both."
    )
