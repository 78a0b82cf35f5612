"""`RubricJudge` against a chat server made of rules: what it asks, what it keeps, and what it refuses."""

import json

import pytest
import torch
from fake_chat_server import FakeChat
from fake_vllm_server import serve

from opd_lightning.backends.vllm.answers import UnfitAnswer
from opd_lightning.backends.vllm.server import Connection, RubricJudge, ServerUnreachable
from opd_lightning.backends.vllm.server.rubric_replies import read_marks, read_rubric
from opd_lightning.interfaces import Problem, Rollout

PROBLEMS = [Problem(f"train/{i}", ({"role": "user", "content": f"What is {i} + 2?"},)) for i in range(2)]
NONE = torch.zeros(0, dtype=torch.int64)


def groups_of(*texts):
    return [
        [Rollout(problem, NONE, NONE, torch.zeros(0), finished=True, seed=0, text=text) for text in texts]
        for problem in PROBLEMS
    ]


@pytest.fixture
def fake():
    return FakeChat()


@pytest.fixture
def judge(fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with serve(fake) as url:

        def make(patience=20.0, **options):
            connection = Connection([url], patience=patience, api_key="secret")
            return RubricJudge(connection, "strong", **options)

        yield make


def test_answers_are_marked_by_criteria_of_their_group(fake, judge):
    marks = judge().scores(groups_of("4", "four", "it is four"))
    assert marks == [pytest.approx([0, 0.4, 1.0])] * 2
    assert all(0 <= mark <= 1 for row in marks for mark in row)
    questions = [body["messages"][-1]["content"] for _, body in fake.requests]
    assert len(questions) == 2 + 2 + 6
    rubric = next(question for question in questions if '{"criteria"' in question)
    assert "The answer is 4." in rubric and "[3] it is four" in rubric and "What is " in rubric
    assert {question for question in questions if len(question) < 20} == {"What is 0 + 2?", "What is 1 + 2?"}
    assert set(fake.authorizations) == {"Bearer secret"} and {body["model"] for _, body in fake.requests} == {"strong"}


def test_no_question_is_asked_twice(fake, judge):
    first = judge().scores(groups_of("4", "4", "four"))  # equal answers are one question
    assert len(fake.requests) == 2 + 2 + 4
    fake.requests.clear()
    assert judge().scores(groups_of("4", "4", "four")) == first
    assert fake.requests == []
    judge().scores(groups_of("4", "other"))
    assert len(fake.requests) == 2 + 2  # the reference is kept, and what this rubric says of "4"; it is another group's
    fake.requests.clear()
    judge(num_references=2).scores(groups_of("4", "other"))
    assert {body["seed"] for _, body in fake.requests[:2]} == {1}


def test_a_rubric_may_be_written_once_for_a_problem(fake, judge):
    judge(reuse_rubrics=True).scores(groups_of("4", "four"))
    fake.requests.clear()
    judge(reuse_rubrics=True).scores(groups_of("5", "five"))
    assert not any('{"criteria"' in body["messages"][-1]["content"] for _, body in fake.requests)
    assert len(fake.requests) == 4


RUBRICS = {
    "no JSON": ("I cannot do that.", "expected JSON with 'criteria', got 'I cannot do that.'"),
    "cut": ('{"criteria": [{"text": "a", "wei', "expected JSON with 'criteria'"),
    "nested": ("[" * 10**5, "expected JSON with 'criteria'"),
    "nested in an object": ('{"criteria": ' + "[" * 10**5 + "}", "expected JSON with 'criteria'"),
    "another name": ('{"rules": []}', "expected JSON with 'criteria'"),
    "a list": ('[{"text": "a", "weight": 1}]', "expected JSON with 'criteria'"),
    "no list": ('{"criteria": "be good"}', "expected a list of criteria, got be good"),
    "none": ('{"criteria": []}', "expected 1 to 8 criteria, got 0"),
    "too many": (json.dumps({"criteria": [{"text": "a", "weight": 1}] * 9}), "expected 1 to 8 criteria, got 9"),
    "no text": ('{"criteria": [{"text": "", "weight": 1}]}', "expected a text in each criterion"),
    "no object": ('{"criteria": ["be good"]}', "expected a text in each criterion, got be good"),
    **{
        f"weight {weight}": ('{"criteria": [{"text": "a", "weight": ' + weight + "}]}", "expected a positive number")
        for weight in ("NaN", "Infinity", "-1", "0", '"5"', "true", "null", "1e400", "1" + "0" * 400)
    },
}
MARKS = {
    "too few": ('{"marks": [1, 0]}', "expected 3 marks, got 2"),
    "another number": ('{"marks": [1, 0, 2]}', "expected marks 0 or 1, got 2"),
    "NaN": ('{"marks": [1, 0, NaN]}', "expected marks 0 or 1, got nan"),
    "an object": ('{"marks": [1, 0, {"a": "\\u001b[2J"}]}', "expected marks 0 or 1, got"),
    "a word": ('{"marks": [1, 0, "yes"]}', "expected marks 0 or 1, got yes"),
    "text": ('{"marks": "101"}', "expected a list of marks, got 101"),
}


def refuses(judge, message, error=ValueError):
    with pytest.raises(error, match=message) as caught:
        judge.scores(groups_of("4", "four"))
    text = str(caught.value)
    assert text.isprintable() and len(text) < 700 and "secret" not in text
    return text


def test_criteria_and_marks_that_are_none_end_in_one_line(fake, judge):
    for read, count, cases in ((read_rubric, 8, RUBRICS), (read_marks, 3, MARKS)):
        for reply, message in cases.values():
            with pytest.raises(UnfitAnswer, match=message) as caught:
                read(reply, count)
            assert str(caught.value).isprintable() and len(str(caught.value)) < 200
    fake.replies = {'{"marks"': [MARKS["an object"][0]] * 100}
    text = refuses(judge(num_attempts=2), MARKS["an object"][1])
    assert text.startswith("objective.judge: 'strong' at http://127.0.0.1") and "in 2 attempts" in text


def test_a_reply_that_does_not_fit_is_asked_for_again_with_another_seed(fake, judge):
    expected = [pytest.approx([0, 0.4])] * 2
    fake.replies['{"marks"'], fake.replies['{"criteria"'] = ["no", "{}"], ["{"]
    assert judge().scores(groups_of("4", "four")) == expected
    assert {body["seed"] for _, body in fake.requests} == {0, 1000}
    fake.requests.clear()
    assert judge().scores(groups_of("4", "four")) == expected and not fake.requests  # kept as they came


def test_servers_that_fail_are_asked_again_and_given_up_in_the_end(fake, judge):
    fake.failures = [503, 0]
    assert len(judge().scores(groups_of("4", "four"))) == 2
    fake.tamper = lambda path, answer: {"choices": [{"message": {"content": None}}]}
    refuses(judge(cache="b"), "a reply without text")
    fake.tamper = lambda path, answer: {"login": "please"}
    refuses(judge(cache="b", patience=0.1), "an answer without choices", ServerUnreachable)
    fake.failures = [401] * 100
    refuses(judge(cache="b"), "refused the request .HTTP 401.")


def test_a_damaged_file_says_what_to_do(judge, tmp_path):
    judge().scores(groups_of("4", "four"))
    next((tmp_path / "rubrics").iterdir()).write_text("{")
    refuses(judge(), r"objective.judge.cache: .* is damaged. Remove it to ask again.")


def test_letters_that_cannot_be_sent_are_backslashed(fake, judge):
    judge().scores(groups_of("4", "\ud800 four"))
    assert any("\\ud800 four" in body["messages"][-1]["content"] for _, body in fake.requests)


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"judge.max_criteria: expected an integer of at least 1, got 0"):
        RubricJudge(Connection(["http://localhost:1"]), "strong", max_criteria=0)
