"""Scores of prompts: a row each, the same whether the command was stopped or not, and of one setting only."""

import json
from dataclasses import replace

import pytest
import torch
from test_template_settings import make_pair
from toys import LetterTask

from opd_lightning.backends.hf import HFStudent, HFTeacher
from opd_lightning.commands import prompt_scores
from opd_lightning.commands.prompt_scores import describe_scores, score_prompts
from opd_lightning.diagnosis.prompt_rows import PROMPT_NUMBERS, measure_prompts
from opd_lightning.objectives import DivergenceObjective
from opd_lightning.rollouts.answering import render_prompts
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


def test_scores_of_other_settings_are_not_gone_on_with(tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    pair = make_pair(tiny_qwen3_folder, tiny_teacher_folder, task=LetterTask(5))
    target, problems = tmp_path / "scores.jsonl", pair.task.problems("train")[:1]

    def stop(words):
        raise KeyboardInterrupt

    pair.teacher.preflight(pair.student)
    with pytest.raises(KeyboardInterrupt):
        score_prompts(pair, problems, target, {}, num_samples=1, say=stop)
    teacher = HFTeacher(str(tiny_teacher_folder), dtype="float32")
    teacher.preflight(pair.student)
    changes = {
        "k was 16, now it is 4": {"k": 4},
        "teacher.dtype was auto, now it is float32": {"teacher": teacher},
        "student.init_args.dtype was float32, now it is bfloat16": {
            "student": HFStudent(str(tiny_qwen3_folder), dtype="bfloat16")
        },
        r"temperatures was \[1.0, 1.0\], now it is \[1.0, 2.0\]": {
            "objective": DivergenceObjective(teacher_temperature=2.0)
        },
    }
    for message, change in changes.items():
        with pytest.raises(ValueError, match=f"was begun with other settings: {message}"):
            score_prompts(replace(pair, **change), problems, target, {}, num_samples=1, say=print)
    assert not target.exists()


@pytest.mark.parametrize(("temperature", "is_known"), [(1.0, True), (0.5, False)])
def test_the_teacher_s_log_likelihood_is_its_own_or_unknown(
    tiny_qwen3_folder, tiny_teacher_folder, temperature, is_known
):
    """Answers carry log p of the temperature that they are drawn at; log p - log q is of the objective's."""
    pair = make_pair(tiny_qwen3_folder, tiny_teacher_folder, task=LetterTask(5))
    pair.sampling = replace(pair.sampling, temperature=temperature)
    pair.teacher.preflight(pair.student)
    prompts = render_prompts(
        pair.student.tokenizer, pair.task.problems("train")[:1], [0], num_samples=2, seed_parts=(0, "diagnose")
    )
    with pair.loaded():
        (row,) = measure_prompts(pair, prompts)
        batches = pair.cut([rollout for group in pair.answer(prompts) for rollout in group])
        told = torch.cat([each.sampled() for each in pair.teacher.score_all(batches, pair.request)])
    assert row["teacher_log_prob"] == (pytest.approx(float(told.mean()), abs=1e-4) if is_known else None)
