import json

import pytest
from toys import LetterTask, make_data, make_module, make_trainer

from opd_lightning.callbacks.answers import AnswersWriter


def test_predict_writes_every_answer_in_order(tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    data = make_data(task=LetterTask(num_held_out=5), validation_samples=2, validation_batch_size=2)
    module = make_module(tiny_qwen3_folder, tiny_teacher_folder)
    trainer = make_trainer(tmp_path, 1, callbacks=[AnswersWriter(str(tmp_path / "out" / "answers.jsonl"))])
    predictions = trainer.predict(module, data)
    rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [row["uid"] for row in rows] == [f"test/{i}" for i in range(5) for _ in range(2)]
    assert [row["response"] for row in rows] == [rollout.text for batch in predictions for rollout in batch]
    assert all(row["reward"] == float(row["reference"] in row["response"]) for row in rows)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["answers.jsonl"]


def test_what_was_answered_before_a_crash_is_on_disk(tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    class Breaks(LetterTask):
        def grade(self, problem, response):
            if problem.uid == "test/3":
                raise RuntimeError("no more")
            return 1.0

    data = make_data(task=Breaks(), validation_batch_size=2)
    module = make_module(tiny_qwen3_folder, tiny_teacher_folder)
    trainer = make_trainer(tmp_path, 1, callbacks=[AnswersWriter(str(tmp_path / "answers.jsonl"))])
    with pytest.raises(RuntimeError, match="no more"):
        trainer.predict(module, data)
    assert len((tmp_path / "answers.rank0.jsonl").read_text().splitlines()) == 2
