import json
import warnings
from dataclasses import replace

import pytest
from toys import make_data, make_module, make_trainer

from opd_lightning.callbacks.answers import AnswersWriter
from opd_lightning.tasks import DataSource, PromptTask


@pytest.fixture
def write(tmp_path):
    def write(rows, name="chats.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return DataSource(str(tmp_path / name), question="prompt")

    return write


def test_prompts_have_no_answers_and_nothing_is_marked(write):
    task = PromptTask(write([{"prompt": "Tell me a joke."}, {"prompt": "And another.", "answer": ["x", {}]}]))
    first, second = task.problems("train")
    assert first.messages == ({"role": "user", "content": "Tell me a joke."},)
    assert first.answer is second.answer is None
    assert second.columns == {"answer": ["x", {}]}
    assert not task.is_graded
    with pytest.raises(AssertionError, match="PromptTask has no answers to mark"):
        task.grade(first, "Knock, knock.")


def test_splits_and_system_prompt(write):
    source = write([{"prompt": "Hello"}])
    task = PromptTask(source, validation=[source, replace(source, name="again")], system_prompt="Be kind.")
    assert [p.uid for p in task.problems("validation")] == ["chats/validation/0", "again/validation/0"]
    assert task.problems("train")[0].messages[0] == {"role": "system", "content": "Be kind."}
    assert task.problems("predict") == []


def test_raw_prompts(write):
    source = replace(write([{"prompt": "Once upon a time "}]), raw=True)
    (problem,) = PromptTask(source).problems("train")
    assert problem.messages == ({"role": "raw", "content": "Once upon a time "},)
    with pytest.raises(ValueError, match=r"task\.system_prompt: .*chats\.jsonl is raw.*Write the text into"):
        PromptTask(source, system_prompt="Be kind.")


def test_repeats_are_reported_and_dropped(write):
    source = write([{"prompt": "a"}, {"prompt": "a"}, {"prompt": "b"}])
    with pytest.warns(UserWarning, match="1 of 3 train problems repeat an earlier question") as warned:
        assert len(PromptTask(source, drop_duplicates=True).problems("train")) == 2
    assert len(warned) == 1, "prompts without answers contradict nothing"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PromptTask(write([{"prompt": "a"}])).problems("train")


def test_a_run_without_answers_logs_no_accuracy(tmp_path, write, tiny_qwen3_folder, tiny_teacher_folder):
    source = write([{"prompt": f"say {letter}"} for letter in "abcdef"])
    task = PromptTask(replace(source, limit=4), validation=source, test=source)
    module = make_module(tiny_qwen3_folder, tiny_teacher_folder)
    data = make_data(task=task, prompts_per_step=2)
    settings = {"limit_val_batches": 1, "val_check_interval": 2, "check_val_every_n_epoch": None}
    writer = AnswersWriter(str(tmp_path / "answers.jsonl"))
    trainer = make_trainer(tmp_path, 2, callbacks=[writer], **settings)
    with pytest.warns(
        UserWarning, match=r"4 of 6 validation questions are also in the training data \(4 word for word"
    ):
        trainer.fit(module, data)
    logged = {name: value.item() for name, value in trainer.logged_metrics.items()}
    assert logged["val/response_length"] > 0
    assert not [name for name, value in logged.items() if "accuracy" in name or "_at_" in name or value != value]
    trainer.predict(module, data)
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [(row["reference"], row["reward"]) for row in rows] == [(None, None)] * 6
