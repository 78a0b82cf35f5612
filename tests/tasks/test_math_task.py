import json
import pickle
import random
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opd_lightning.interfaces import Problem, Rollout, Task
from opd_lightning.tasks import DataSource, MathTask
from opd_lightning.tasks.repeats import find_repeats

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
needs_gsm8k = pytest.mark.skipif(not GSM8K.is_dir(), reason="the GSM8K files are not there")


@pytest.fixture
def write(tmp_path):
    def write(rows, name="sums.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))
        return DataSource(str(path))

    return write


def problem(answer):
    return Problem("p", ({"role": "user", "content": "?"},), answer)


def answers(problems, responses):
    empty = torch.zeros(0, dtype=torch.int64)
    pairs = zip(problems, responses, strict=True)
    return [Rollout(problem, empty, empty, torch.zeros(0), True, 0, text) for problem, text in pairs]


def test_chat_form(write):
    path = write([("  1+1? ", "2")])
    default = MathTask(path).problems("train")[0]
    assert list(default.messages) == [
        {"role": "user", "content": r"1+1? Please reason step by step, and put your final answer within \boxed{}."}
    ]
    plain = MathTask(path, suffix=None).problems("train")[0]
    assert list(plain.messages) == [{"role": "user", "content": "1+1?"}]
    own = MathTask(path, suffix="\n\nBox it.", system_prompt="Be brief.").problems("train")[0]
    assert list(own.messages) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?\n\nBox it."},
    ]


@pytest.mark.parametrize(
    "question",
    [
        r"1+1? Please reason step by step, and put your final answer within \boxed{}.",
        "1+1?\n" + r"Please reason step by step, and put your final answer within \boxed{{}}.",
        "Solve this:\n\n1+1?\n\nEnd with Answer:",
        r"Solve this: 1+1? End with Answer: Please reason step by step, and put your final answer within \boxed{{}}.",
    ],
)
def test_instructions_of_the_data_are_taken_off_before_the_suffix_is_added(write, question):
    task = MathTask(write([(question, "2")]), strip=["Solve this:", "End with Answer:"])
    (asked,) = task.problems("train")
    assert asked.messages[-1]["content"] == f"1+1? {task.suffix}"


def test_system_prompt_of_the_data_wins(tmp_path):
    messages = [{"role": "system", "content": "Theirs."}, {"role": "user", "content": "1+1?"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"question": messages, "answer": "2"}))
    (asked,) = MathTask(DataSource(str(tmp_path / "chat.jsonl")), system_prompt="Ours.", suffix=None).problems("train")
    assert list(asked.messages) == messages


def test_references_are_reduced_to_the_final_answer(write):
    path = write([("a", "1+1=2\n#### 2"), ("b", r"so $\boxed{\frac{1}{2}}$."), ("c", "x^2")])
    assert [p.answer for p in MathTask(path).problems("train")] == ["2", r"\frac{1}{2}", "x^2"]


def test_splits_and_several_sources(write):
    first, second = write([("a", "1")], "first.jsonl"), write([("b", "2"), ("c", "3")], "second.jsonl")
    task = MathTask([first, replace(second, limit=1)], validation=second, test=replace(first, name="held_out"))
    assert [p.uid for p in task.problems("train")] == ["first/train/0", "second/train/0"]
    assert [p.source for p in task.problems("validation")] == ["second", "second"]
    assert [p.uid for p in task.problems("predict")] == ["held_out/test/0"] == [p.uid for p in task.problems("test")]
    assert MathTask(first).problems("test") == []
    with pytest.raises(ValueError, match=r"task\.train: several sources are called 'first'\. Give each its own `name`"):
        MathTask([first, first]).problems("train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accept": "anything"}, r"task\.accept: expected 'box', 'marked' or 'last_number', got 'anything'"),
        ({"suffix": "in \boxed{}"}, r"task\.suffix contains a backspace character: YAML .* single quotes"),
        ({"seconds_per_answer": -1}, r"task\.seconds_per_answer: expected a positive number of seconds, got -1"),
        ({"seconds_per_step": 0}, r"task\.seconds_per_step: expected a positive number of seconds, got 0"),
        ({"num_processes": 0}, r"task\.num_processes: expected an integer of at least 1, got 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        MathTask(DataSource("a.jsonl"), **settings)


def test_a_reference_without_a_final_answer_is_left_out_or_refused(write):
    path = write([("a", "1"), ("b", "first this, then that " * 50)])
    with pytest.warns(UserWarning, match=r"1 of 2 rows .*line 2, column 'answer': expected a final answer of 1 to 500"):
        assert [p.uid for p in MathTask(path).problems("train")] == ["sums/train/0"]
    with pytest.raises(ValueError, match=r"line 2, .*: expected a final answer of 1 to 500 characters .* got 1099\."):
        MathTask(replace(path, strict=True)).problems("train")


def test_raw_questions_stay_as_they_are(write):
    source = replace(write([("Q: 1+1?\nA: ", "2")]), raw=True)
    (asked,) = MathTask(source).problems("train")
    assert asked.messages == ({"role": "raw", "content": "Q: 1+1?\nA: "},)
    with pytest.raises(ValueError, match=r"task\.system_prompt: .*sums\.jsonl is raw, and raw prompts have no system"):
        MathTask(source, system_prompt="Be brief.")


def test_answers_in_several_parts_are_right_in_any_order(write):
    (asked,) = MathTask(write([("x^2 = 4x - 3?", ["1", "$3$"])])).problems("train")
    responses = [r"\boxed{3, 1}", r"\boxed{1,3}", r"\boxed{1 \text{ and } 3}", r"\boxed{1}", r"\boxed{1,2}"]
    assert MathTask().grade_rollouts(answers([asked] * 5, responses)) == [1, 1, 1, 0, 0]


def test_a_source_without_answers_is_refused(write):
    with pytest.raises(
        ValueError, match=r"MathTask marks answers, but source\.answer of .*sums\.jsonl is null\..*PromptT"
    ):
        MathTask(validation=replace(write([("a", "1")]), answer=None))


def test_repeats_are_reported_and_left_out_when_asked_for(write):
    rows = [("a", "1"), ("a ", "1.0"), ("b", "2"), ("c", "3"), ("c", "3"), ("c", "4"), ("a", "01")]
    path = write(rows)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kept = MathTask(path).problems("train")
    assert len(kept) == len(rows)
    duplicates, contradictions = (str(warning.message) for warning in caught)
    assert duplicates == (
        "2 of 7 train problems repeat an earlier question (first: sums/train/1 repeats sums/train/0)."
        " They are kept; task.drop_duplicates: true leaves them out of training."
    )
    assert contradictions == (
        "1 train questions occur with different answers (first: '3' in sums/train/3 and '4' in sums/train/5)."
        " They are kept; task.drop_contradictions: true leaves them out of training."
    )
    task = MathTask(path, validation=path, drop_duplicates=True, drop_contradictions=True)
    with pytest.warns(UserWarning, match="They are left out"):
        kept = task.problems("train")
    assert [p.uid for p in kept] == ["sums/train/0", "sums/train/2"]
    with pytest.warns(UserWarning, match="They are kept"):
        kept = task.problems("validation")
    assert len(kept) == len(rows)


def test_no_warning_without_repeats(write):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(MathTask(write([("a", "1"), ("b", "1")])).problems("train")) == 2


@pytest.mark.parametrize(
    ("accept", "grades"),
    [("box", [1, 0, 0, 0, 0]), ("marked", [1, 1, 1, 0, 0]), ("last_number", [1, 1, 1, 1, 0])],
)
def test_what_counts_as_an_answer(accept, grades):
    responses = [r"\boxed{025}", "#### 25", "The answer is 25.0.", "5 * 5 = $25.00", "no idea"]
    task = MathTask(accept=accept)
    assert task.grade_rollouts(answers([problem("25")] * 5, responses)) == grades


def test_grades_are_one_or_zero():
    task = MathTask()
    assert task.grade(problem("142"), r"\boxed{142.0}") == 1.0
    assert task.grade(problem("142"), r"\boxed{143}") == 0.0
    assert task.grade(problem("142"), "") == 0.0
    assert task.grade(problem("x+1"), r"\boxed{1+x}") == 1.0
    assert task.grade_rollouts([]) == []


@pytest.mark.slow
def test_task_survives_pickling_after_marking(write):
    task = MathTask(write([("a", "x+1")]))
    assert task.grade(problem("x+1"), r"\boxed{1+x}") == 1.0
    other = pickle.loads(pickle.dumps(task))
    assert other.problems("train") == task.problems("train")
    assert other.grade(problem("x+1"), r"\boxed{1+x}") == 1.0


YAML = r"""
class_path: MathTask
init_args:
  train:
  - {path: 'TRAIN', question: question, where: {answer: ['1', '2']}}
  - {path: 'SECOND'}
  validation: {path: 'TRAIN', name: held_out, limit: 1}
  suffix: 'Put it in \boxed{}.'
"""


def test_task_is_built_from_yaml_and_printed_back(write, tmp_path):
    from jsonargparse import ArgumentParser

    train, second = write([("a", "1"), ("b", "2"), ("c", "3")]).path, write([("d", "4")], "second.jsonl").path
    (tmp_path / "task.yaml").write_text(YAML.replace("TRAIN", train).replace("SECOND", second))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Task, "task")
    arguments = parser.parse_args([f"--task={tmp_path / 'task.yaml'}", "--task.system_prompt=Be brief."])
    again = parser.parse_string(parser.dump(arguments))
    assert parser.dump(again) == parser.dump(arguments)
    task = parser.instantiate(again).task
    assert [p.uid for p in task.problems("train")] == ["sums/train/0", "sums/train/1", "second/train/0"]
    assert [p.uid for p in task.problems("validation")] == ["held_out/validation/0"]
    assert task.problems("train")[0].messages[-1]["content"] == r"a Put it in \boxed{}."


def test_conditions_and_joined_questions_come_from_yaml_and_flags(tmp_path):
    from jsonargparse import ArgumentParser

    rows = [{"Body": "Tom has 3 pens.", "Question": f"And {n}?", "level": n, "answer": str(n)} for n in range(5)]
    (tmp_path / "pens.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(
        f"""
class_path: MathTask
init_args:
  suffix: null
  train: {{path: '{tmp_path}/pens.jsonl', question: '{{Body}} {{Question}}', where: {{level: {{'>=': 2, '!=': 3}}}}}}
"""
    )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Task, "task")
    arguments = parser.parse_args([f"--task={tmp_path / 'task.yaml'}"])
    task = parser.instantiate(parser.parse_string(parser.dump(arguments, skip_unset=False))).task
    assert [p.messages[0]["content"] for p in task.problems("train")] == [f"Tom has 3 pens. And {n}?" for n in (2, 4)]
    flags = [f"--task.train.path={tmp_path}/pens.jsonl", "--task.train.question={Body} {Question}"]
    task = parser.instantiate(
        parser.parse_args(["--task=PromptTask", *flags, "--task.train.where", '{"level": 1}'])
    ).task
    assert [p.messages[0]["content"] for p in task.problems("train")] == ["Tom has 3 pens. And 1?"]


def test_task_is_built_from_flags(write):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Task, "task")
    path = write([("d", "4")]).path
    arguments = parser.parse_args(["--task=MathTask", f"--task.train.path={path}", "--task.train.limit=1"])
    assert len(parser.instantiate(arguments).task.problems("train")) == 1


@pytest.mark.slow
@needs_gsm8k
def test_gsm8k_references_mark_themselves_right_and_their_neighbours_wrong():
    task = MathTask(DataSource(str(GSM8K / "train.jsonl")), test=DataSource(str(GSM8K / "test.jsonl")))
    problems, held_out = task.problems("train"), task.problems("test")
    assert (len(problems), len(held_out)) == (7473, 1319)
    assert problems[0].uid == "gsm8k/train/0"
    assert held_out[-1].uid == "gsm8k/test/1318"
    rng = random.Random(0)
    values = [int(p.answer.replace(",", "")) for p in problems]
    formats = [r"So it is \boxed{%s}.", "#### %s", "The final answer is $%s$.", r"\boxed{%s.00}", r"\boxed{\$%s}"]
    right = [rng.choice(formats) % value for value in values]
    wrong = [rng.choice(formats) % (value + rng.choice([-10, -1, 1, 10])) for value in values]
    assert all(task.grade_rollouts(answers(problems, right)))
    assert not any(task.grade_rollouts(answers(problems, wrong)))
    assert task._checker._worker is None


@needs_gsm8k
@pytest.mark.slow
def test_gsm8k_solutions_mark_themselves_right_whatever_the_question_asks_for():
    solutions = [json.loads(line)["answer"] for line in (GSM8K / "train.jsonl").open()]
    task = MathTask(DataSource(str(GSM8K / "train.jsonl")))
    problems = task.problems("train")
    assert all(task.grade_rollouts(answers(problems, solutions)))
    # expressions that a model may leave unfinished go to math-verify
    some = random.Random(1).sample(range(len(problems)), 100)
    values = {index: int(problems[index].answer.replace(",", "")) for index in some}
    assert all(task.grade(problems[i], rf"\boxed{{{value - 3} + 2 + 1}}") for i, value in values.items())
    assert not any(task.grade(problems[i], rf"\boxed{{{value - 3} + 2 + 2}}") for i, value in values.items())


def test_find_repeats_by_position():
    def ask(question, answer):
        return Problem("p", ({"role": "user", "content": question},), answer)

    repeats = find_repeats([ask("a b", "1"), ask("a\n b", "1"), ask("b", "2"), ask("b", "x"), ask("c", "1")])
    assert repeats.duplicates == ((1, 0),)
    assert repeats.contradictions == ((2, 3),)
