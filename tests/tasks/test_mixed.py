"""A second task's prompts among the first one's: in the shares asked for, marked by their own, resumed exactly."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from toys import LetterTask, adamw, make_data, make_module, make_trainer, weights_of

from opd_lightning.callbacks.source_metrics import SourceMetrics
from opd_lightning.interfaces import Problem, Rollout, Task
from opd_lightning.rollouts.answering import grade
from opd_lightning.selection import DifficultyPool, Mixture, Weighted
from opd_lightning.tasks import MixedTask, ScoredTask


class Chats(Task):
    """Prompts without answers; their uids are those of the letters."""

    def problems(self, split):
        return [Problem(f"{split}/{i}", ({"role": "user", "content": f"chat {i}"},)) for i in range(4)]


class Halves(LetterTask):
    """Marks everything as half right."""

    def grade(self, problem, response):
        assert problem in self.problems("train")
        return 0.5


def answered(problem, text):
    empty = torch.zeros(0, dtype=torch.int64)
    return Rollout(problem, empty, empty, torch.zeros(0), True, 0, text)


def test_each_part_is_marked_by_its_own_task_and_held_out_splits_stay():
    task = MixedTask(LetterTask(2), {"chat": Chats(), "half": Halves(1)}, name="letters")
    problems = task.problems("train")
    uids = ["letters/train/0", "letters/train/1", *(f"chat/train/{i}" for i in range(4)), "half/train/0"]
    assert [problem.uid for problem in problems] == uids
    assert [problem.source for problem in problems] == ["letters"] * 2 + ["chat"] * 4 + ["half"]
    for split in ("validation", "test", "predict"):
        assert task.problems(split) == LetterTask(2).problems(split)
    held_out = task.problems("validation")[0]
    marked = grade(task, [answered(problem, "a") for problem in (*problems, held_out)])
    assert str([each.reward for each in marked]) == "[1.0, 0.0, nan, nan, nan, nan, 0.5, 1.0]"
    assert [each.problem for each in marked] == [*problems, held_out]  # as they went in
    silent = MixedTask(Chats(), {"letters": LetterTask(2)})
    assert not silent.is_graded and not any(map(silent.can_grade, silent.problems("train")))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixedTask(Chats(), {}), r"task\.others: expected tasks by name to mix in, got none"),
        (lambda: MixedTask(Chats(), {"a/b": Chats()}), r"task\.others: expected names without slashes, got 'a/b'"),
        (
            lambda: MixedTask(Chats(), {"b": Chats()}, name="a/b"),
            r"task\.name: expected names without slashes, got 'a/b'",
        ),
        (
            lambda: MixedTask(LetterTask(0), {"b": Chats()}).problems("train"),
            r"task\.inner: it has no training questions\. Give it some, or use the others alone",
        ),
        (lambda: MixedTask(Chats(), {"main": Chats()}), r"task\.name: 'main' is also the name of another task"),
        (
            lambda: MixedTask(Chats(), {"empty": LetterTask(0)}).problems("train"),
            r"task\.others: 'empty' has no training questions",
        ),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Noted(Callback):
    def __init__(self):
        self.sources, self.metrics = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.sources.append([rollout.problem.source for rollout in batch.rollouts])
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(folder, folders, steps, make_task, selector, ckpt_path=None, save=None):
    noted = Noted()
    module = make_module(*folders, optimizer=adamw)
    trainer = make_trainer(folder, steps, callbacks=[SourceMetrics(), noted])
    trainer.fit(module, make_data(task=make_task(), selector=selector), ckpt_path=ckpt_path)
    if save is not None:
        trainer.save_checkpoint(save)
    return module, noted


def mixture():
    return MixedTask(LetterTask(6), {"chat": Chats()})


def test_shares_hold_and_stop_and_resume_equals_one_run(tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    folders = tiny_qwen3_folder, tiny_teacher_folder

    def run(*args, **options):
        return fit(tmp_path, folders, *args, **options)

    whole, expected = run(4, mixture, Mixture({"main": 3, "chat": 1}))
    drawn = [source for step in expected.sources for source in step]
    assert len(drawn) == 32 and drawn.count("chat") == 8  # two answers each of 4 of 16 prompts
    run(3, mixture, Mixture({"main": 3, "chat": 1}), save=tmp_path / "stop.ckpt")
    resumed, noted = run(4, mixture, Mixture({"main": 3, "chat": 1}), ckpt_path=tmp_path / "stop.ckpt")
    assert noted.sources == expected.sources[3:] and noted.metrics[-1].keys() == expected.metrics[-1].keys()
    for name, weight in weights_of(resumed).items():
        assert torch.equal(weight, weights_of(whole)[name]), name
    metrics = expected.metrics[-1]
    assert 0 < metrics["train/chat/share"] < 1 and "train/chat/accuracy" not in metrics
    parts = [(metrics[f"train/{part}/share"], metrics[f"train/{part}/response_length"]) for part in ("main", "chat")]
    assert sum(share * length for share, length in parts) == pytest.approx(metrics["train/response_length"])
    assert metrics["train/main/accuracy"] == pytest.approx(metrics["train/accuracy"])


def test_scored_and_weighted_prompts_resume_exactly_too(tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    folders = tiny_qwen3_folder, tiny_teacher_folder
    rows = [{"uid": f"train/{i}", "gain": i / 4} for i in range(6)]
    scores = tmp_path / "scores.jsonl"
    scores.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def task():
        return ScoredTask(LetterTask(6), str(scores), where={"gain": {">": 0}})

    with pytest.warns(UserWarning, match="5 of 6 training questions"):
        whole, _ = fit(tmp_path, folders, 3, task, Weighted("scores.gain"))
        fit(tmp_path, folders, 2, task, Weighted("scores.gain"), save=tmp_path / "stop.ckpt")
        resumed, _ = fit(tmp_path, folders, 3, task, Weighted("scores.gain"), ckpt_path=tmp_path / "stop.ckpt")
    for name, weight in weights_of(resumed).items():
        assert torch.equal(weight, weights_of(whole)[name]), name


def test_what_learns_from_rewards_refuses_prompts_without_answers(tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    with pytest.raises(
        ValueError, match=r"DifficultyPool learns from rewards, but MixedTask has some problems without"
    ):
        fit(tmp_path, (tiny_qwen3_folder, tiny_teacher_folder), 1, mixture, DifficultyPool())
    with pytest.raises(ValueError, match=r"selector.weights: 'chat' has no weight"):
        Mixture({"main": 1}).setup(mixture().problems("train"), 0)
