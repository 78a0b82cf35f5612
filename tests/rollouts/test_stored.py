"""Answers from a file: token ids as they are, matched by uid, and every way in which a file does not fit."""

import json
from pathlib import Path

import pytest
import torch
from conftest import CHARACTERS, END_OF_TURN, make_tokenizer
from toys import LetterTask, adamw, make_data, make_module, make_trainer, weights_of

from opd_lightning.backends.hf import HFStudent, HFTokenizer
from opd_lightning.interfaces import Problem, Prompt, Sampling, StepPrompts
from opd_lightning.objectives import NLL, SampledTokenObjective
from opd_lightning.rollouts.answer_files import FORMAT, describe_tokenizer, header_path
from opd_lightning.rollouts.recording import Recording
from opd_lightning.rollouts.stored import Stored

SAMPLING = Sampling(max_new_tokens=8)
PROBLEMS = LetterTask(num_train=4).problems("train")


class Live:
    weight_version = 7

    def __init__(self, folder):
        self.spec = HFStudent(str(folder))


@pytest.fixture(scope="module")
def tokenizer(tiny_qwen3_folder):
    return HFStudent(str(tiny_qwen3_folder)).tokenizer


def make_rows(tokenizer, problems=PROBLEMS, num_samples=2):
    rows = []
    for problem in problems:
        for sample in range(num_samples):
            text = problem.answer * (1 + sample)
            ids = [*tokenizer.encode(text), END_OF_TURN]
            rows.append(
                {
                    "uid": problem.uid,
                    "messages": [dict(message) for message in problem.messages],
                    "reference": problem.answer,
                    "response": text,
                    "reward": 1.0,
                    "finished": True,
                    "num_tokens": len(ids),
                    "seed": 10 + sample,
                    "sample": sample,
                    "attempt": 0,
                    "prompt_ids": tokenizer.render(problem.messages),
                    "response_ids": ids,
                    "log_probs": [-0.5] * len(ids),
                    "student_wrote": None,
                }
            )
    return rows


def write(target: Path, rows, tokenizer, *, sampling=None, has_log_probs=True):
    for path in (target, header_path(target)):
        path.unlink(missing_ok=True)
    settings = {"tokenizer": describe_tokenizer(tokenizer), "sampling": sampling or {"max_new_tokens": 8}}
    recording = Recording(target, settings)
    recording.open({"format": FORMAT, "weights": "", "has_log_probs": has_log_probs})
    recording.append(rows, num_done=1, counts={})
    recording.finish()
    return str(target)


@pytest.fixture
def path(tmp_path, tokenizer):
    return write(tmp_path / "answers.jsonl", make_rows(tokenizer), tokenizer)


def step_of(tokenizer, problems, seeds):
    prompts = [Prompt(problem, tuple(tokenizer.render(problem.messages)), tuple(seeds)) for problem in problems]
    return StepPrompts(3, tuple(range(len(prompts))), tuple(prompts))


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_tokens_come_as_they_are_in_the_order_that_is_asked(tmp_path, tokenizer, tiny_qwen3_folder, ending):
    source = Stored(write(tmp_path / f"answers.{ending}", make_rows(tokenizer), tokenizer))
    assert source.admit(PROBLEMS, tokenizer, SAMPLING, 2) == PROBLEMS
    asked = [PROBLEMS[2], PROBLEMS[0]]
    batch = source.rollouts(step_of(tokenizer, asked, [4, 9]), SAMPLING, Live(tiny_qwen3_folder))
    assert batch.staleness is None and source.staleness is None and batch.step == 3 and batch.weight_version == 7
    assert [rollout.problem for rollout in batch.rollouts] == [asked[0], asked[0], asked[1], asked[1]]
    assert [rollout.text for rollout in batch.rollouts] == ["c", "cc", "a", "aa"]
    first = batch.rollouts[1]
    assert first.response_ids.tolist() == [*tokenizer.encode("cc"), END_OF_TURN]
    assert first.prompt_ids.tolist() == tokenizer.render(asked[0].messages)
    assert first.log_probs.tolist() == [-0.5] * 3 and first.finished and first.seed == 11
    assert first.response_ids.dtype == torch.int64


def test_of_more_answers_the_seeds_of_the_step_choose_different_ones(path, tokenizer, tiny_qwen3_folder):
    source = Stored(path)
    source.admit(PROBLEMS, tokenizer, SAMPLING, 1)
    live = Live(tiny_qwen3_folder)
    chosen = [source.rollouts(step_of(tokenizer, PROBLEMS[:1], [s]), SAMPLING, live).rollouts[0] for s in (4, 5, 4)]
    assert [rollout.text for rollout in chosen] == ["a", "aa", "a"]


def test_log_probs_are_known_as_the_file_says(tmp_path, tokenizer):
    cases = [({}, True), ({"has_log_probs": False}, False), ({"sampling": {"top_p": 0.95}}, False)]
    for options, expected in cases:
        source = Stored(write(tmp_path / "a.jsonl", make_rows(tokenizer), tokenizer, **options))
        source.admit(PROBLEMS, tokenizer, SAMPLING, 1)
        assert source.knows_log_probs(SAMPLING) is expected
    other = Stored(str(tmp_path / "a.jsonl"), other_prompts=True)
    other.admit(PROBLEMS, tokenizer, SAMPLING, 1)
    assert not other.knows_log_probs(SAMPLING)


def test_what_a_file_lacks_is_counted_and_skipped_if_asked(tmp_path, tokenizer):
    rows = make_rows(tokenizer)
    rows[2]["response_ids"] = [20] * 9 + [END_OF_TURN]  # too long
    rows[2]["log_probs"] = None
    rows = [*rows[:4], rows[4]]  # the third has one answer, the fourth none
    path = write(tmp_path / "a.jsonl", rows, tokenizer)
    with pytest.raises(ValueError, match="lacks usable answers to 3 of 4 training problems") as caught:
        Stored(path).admit(PROBLEMS, tokenizer, SAMPLING, 2)
    for part in (
        "1 have none (first: 'train/3')",
        "1 have fewer than the 2 that a step takes",
        "1 have longer ones than sampling.max_new_tokens=8",
        "`opd-lightning rollout --num_samples 2 --reject.duplicates false`, or lower data.rollouts_per_prompt. Set",
        "Set skip_unusable: true beside its path",
    ):
        assert part in str(caught.value)
    assert Stored(path, skip_unusable=True).admit(PROBLEMS, tokenizer, SAMPLING, 2) == PROBLEMS[:1]
    with pytest.raises(ValueError, match="Use the data set"):
        Stored(path, skip_unusable=True).admit(LetterTask().problems("test"), tokenizer, SAMPLING, 2)


def test_other_prompts_are_refused_unless_they_are_meant(path, tokenizer, tiny_qwen3_folder):
    asked = [Problem(p.uid, ({"role": "user", "content": "another question"},), p.answer) for p in PROBLEMS]
    with pytest.raises(ValueError, match="renders the prompt of problem 'train/0' otherwise"):
        Stored(path).admit(asked, tokenizer, SAMPLING, 1)
    source = Stored(path, other_prompts=True)
    source.admit(asked, tokenizer, SAMPLING, 1)
    (rollout,) = source.rollouts(step_of(tokenizer, asked[:1], [0]), SAMPLING, Live(tiny_qwen3_folder)).rollouts
    assert rollout.prompt_ids.tolist() == tokenizer.render(asked[0].messages)
    assert rollout.log_probs.isnan().all()


def test_another_vocabulary_is_refused_or_encoded_anew(path, tokenizer):
    turned = HFTokenizer(make_tokenizer(CHARACTERS[::-1]), [END_OF_TURN])
    with pytest.raises(ValueError, match="token ids of another vocabulary"):
        Stored(path).admit(PROBLEMS, turned, SAMPLING, 1)
    source = Stored(path, reencode=True)
    assert source.admit(PROBLEMS, turned, SAMPLING, 2) == PROBLEMS
    assert not source.knows_log_probs(SAMPLING)
    answer = source._answers["train/0"][0]
    assert answer.response_ids.tolist() == [*turned.encode("a"), END_OF_TURN]
    assert answer.response_ids.tolist() != [*tokenizer.encode("a"), END_OF_TURN]


def test_a_file_of_somebody_elses_is_encoded(tmp_path, tokenizer):
    rows = [{"uid": p.uid, "response": "by hand"} for p in PROBLEMS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = str(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"has no header.*set reencode: true"):
        Stored(path).admit(PROBLEMS, tokenizer, SAMPLING, 1)
    with pytest.raises(ValueError, match=r"Stored\.closing_token: None does not close .* one of \['<\|endoftext\|>'"):
        Stored(path, reencode=True).admit(PROBLEMS, tokenizer, SAMPLING, 1)
    source = Stored(path, reencode=True, closing_token="<|im_end|>")
    source.admit(PROBLEMS, tokenizer, SAMPLING, 1)
    assert source._answers["train/0"][0].response_ids.tolist() == [*tokenizer.encode("by hand"), END_OF_TURN]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"uid": None}, "expected str in the column 'uid', got 'None'"),
        ({"response_ids": "12"}, "expected list in the column 'response_ids'"),
        ({"response_ids": [1, 10**6]}, "expected token ids from 0 to"),
        ({"log_probs": [0.0]}, "expected one entry per token in log_probs"),
        ({"response_ids": [20, 21], "log_probs": None}, r"ends with token \[21\], which does not close"),
    ],
)
def test_damaged_rows_are_named(tmp_path, tokenizer, change, message):
    rows = make_rows(tokenizer)
    rows[1] |= change
    path = write(tmp_path / "a.jsonl", rows, tokenizer)
    with pytest.raises(ValueError, match=rf"Stored\.path: '.*a\.jsonl', line 2: .*{message}"):
        Stored(path).admit(PROBLEMS, tokenizer, SAMPLING, 1)


def test_files_that_cannot_be_read(tmp_path, tokenizer):
    def fails(message, path, **options):
        with pytest.raises(ValueError, match=message) as caught:
            Stored(str(path), **options).admit(PROBLEMS, tokenizer, SAMPLING, 1)
        assert "\n" not in str(caught.value)

    fails("Stored.path: there is no file .*StoredTeacher.*--role student --score true", tmp_path / "none.jsonl")
    fails("expected a file ending in", tmp_path / "a.txt")
    fails("holds no answers", write(tmp_path / "empty.jsonl", [], tokenizer))
    fails("Set reencode: true, too", tmp_path / "empty.jsonl", closing_token="x")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    fails("expected a parquet file", tmp_path / "a.parquet")
    path = Path(write(tmp_path / "cut.jsonl", make_rows(tokenizer), tokenizer))
    path.write_bytes(path.read_bytes()[:-20])
    fails("line 8: expected one JSON object", path)
    header_path(path).write_text("{}")
    fails("expected a header of the format", path)


def make_run(path, student, teacher, **options):
    module = make_module(student, teacher, objective=options.pop("objective", NLL()), optimizer=adamw)
    return module, make_data(task=LetterTask(num_train=4), source=Stored(path, **options), rollouts_per_prompt=1)


def test_training_on_a_file_raises_its_likelihood_and_resumes_exactly(
    path, tmp_path, tiny_qwen3_folder, tiny_teacher_folder, tokenizer
):
    module, data = make_run(path, tiny_qwen3_folder, tiny_teacher_folder)
    trainer = make_trainer(tmp_path, 4)
    trainer.fit(module, data)
    last = float(trainer.callback_metrics["train/loss"])
    assert "train/staleness" not in trainer.callback_metrics
    halfway, half_data = make_run(path, tiny_qwen3_folder, tiny_teacher_folder)
    first = make_trainer(tmp_path, 2)
    first.fit(halfway, half_data)
    assert last < float(first.callback_metrics["train/loss"])
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed, resumed_data = make_run(path, tiny_qwen3_folder, tiny_teacher_folder)
    make_trainer(tmp_path, 4).fit(resumed, resumed_data, ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True)
    for name, weight in weights_of(module).items():
        assert torch.equal(weight, weights_of(resumed)[name]), name
    rows = make_rows(tokenizer)
    rows[0]["seed"] = 99
    write(Path(path), rows, tokenizer)
    changed, changed_data = make_run(path, tiny_qwen3_folder, tiny_teacher_folder)
    with pytest.raises(ValueError, match=r"answers\.jsonl' has changed, but the checkpoint was written with"):
        make_trainer(tmp_path, 4).fit(changed, changed_data, ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True)


def test_an_estimator_that_does_not_correct_is_refused(path, tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    run = make_run(path, tiny_qwen3_folder, tiny_teacher_folder, objective=SampledTokenObjective(importance=None))
    with pytest.raises(ValueError, match="Stored: some rollouts come from other or older weights"):
        make_trainer(tmp_path, 1).fit(*run)


def test_under_a_horizon_the_first_tokens_are_trained(path, tokenizer, tiny_qwen3_folder):
    source = Stored(path)
    source.admit(PROBLEMS, tokenizer, SAMPLING, 2)
    step = step_of(tokenizer, PROBLEMS[:1], [0, 1])
    short, cut = source.rollouts(step, Sampling(max_new_tokens=2), Live(tiny_qwen3_folder)).rollouts
    assert short.finished and len(short.response_ids) == 2
    assert not cut.finished and cut.text == "aa" and cut.log_probs.tolist() == [-0.5] * 2
