"""Scores of prompts: a row each, the same whether the command was stopped or not, and of one setting only."""

import json

import pytest
from test_template_settings import make_pair
from toys import LetterTask

from opd_lightning.commands import prompt_scores
from opd_lightning.commands.prompt_scores import describe_scores, score_prompts
from opd_lightning.diagnosis.prompt_rows import PROMPT_NUMBERS
from opd_lightning.tasks import ScoredTask


def score(target, folders, said=None, num_prompts=5, **settings):
    pair = make_pair(*folders, task=LetterTask(5))
    pair.teacher.preflight(pair.student)
    problems = pair.task.problems("train")[:num_prompts]
    say = print if said is None else said
    score_prompts(pair, problems, target, {"seed": 0} | settings, num_samples=2, say=say)
    return target.read_text()


def test_a_stopped_command_goes_on_and_tasks_read_what_it_wrote(
    tmp_path, tiny_qwen3_folder, tiny_teacher_folder, monkeypatch
):
    folders = tiny_qwen3_folder, tiny_teacher_folder
    monkeypatch.setattr(prompt_scores, "_AT_ONCE", 2)
    whole = score(tmp_path / "whole" / "scores.jsonl", folders)
    target, said = tmp_path / "parts" / "scores.jsonl", []

    def stop(words):
        if words.startswith("4 of 5"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(target, folders, stop)
    assert not target.exists()
    assert score(target, folders, said.append) == whole
    assert said == ["5 of 5 prompts are scored"]  # only what was missing
    score(target, folders, said.append)
    assert said[-1].endswith("scores.jsonl is complete already")
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["uid"] for row in rows] == [f"train/{i}" for i in range(5)]
    assert all(set(PROMPT_NUMBERS) < set(row) and row["num_answers"] == 2 for row in rows)
    task = ScoredTask(LetterTask(5), str(target), where={"reverse_kl": {">=": 0}})
    assert [problem.columns["scores"] for problem in task.problems("train")] == rows
    (table,) = describe_scores(target).tables
    spread = {row[0]: row[1:] for row in table.rows}
    assert spread["truncation_rate"][0] == f"{sum(row['truncation_rate'] for row in rows) / 5:.3g}"
    with pytest.raises(ValueError, match=r"scores.jsonl' was begun with other settings: seed was 0, now it is 1"):
        score(target, folders, seed=1)
