"""Scores from a file: bit for bit what was written, matched by uid, prompt and token ids."""

from dataclasses import replace

import pytest
import torch
from conftest import VOCAB_SIZE
from scoring import CPU, make_batches

from opd_lightning.backends.hf import HFStudent
from opd_lightning.interfaces import Problem, ScoreRequest, Teacher
from opd_lightning.objectives import ListedScores
from opd_lightning.rollouts.answer_files import FORMAT, describe_tokenizer, header_path
from opd_lightning.rollouts.answer_scores import score_answers
from opd_lightning.rollouts.batching import collate
from opd_lightning.rollouts.recording import Recording
from opd_lightning.rollouts.records import token_record
from opd_lightning.teachers import StoredTeacher


class Listed(Teacher):
    """Random numbers of every size, the same for a token whatever batch it is in."""

    offer = ScoreRequest(top_k=5)

    def setup(self, student, model, device):
        pass

    def score(self, batch, request):
        parts = []
        for rollout in batch.rollouts:
            bits = torch.Generator().manual_seed(int(rollout.response_ids.sum()))
            shape = (len(rollout.response_ids), request.top_k + 1)
            numbers = torch.randint(0x7F000000, shape, generator=bits, dtype=torch.int32).view(torch.float32)
            parts.append(-numbers[rollout.trained_positions])
            parts[-1][0, 0] = -torch.inf
        numbers = torch.cat(parts)
        ids = (numbers[:, 1:].view(torch.int32) % VOCAB_SIZE).long()
        return ListedScores(batch.tokens.ids, numbers[:, 0], ids, numbers[:, 1:])


@pytest.fixture(scope="module")
def student(tiny_qwen3_folder):
    return HFStudent(str(tiny_qwen3_folder))


def rollouts():
    _, (group,) = make_batches()
    group = [replace(each, problem=Problem(f"train/{i}", ()), seed=i) for i, each in enumerate(group)]
    wrote = torch.ones(9, dtype=torch.bool)
    wrote[[0, 3]] = False
    return [*group[:2], replace(group[2], student_wrote=wrote)]


def write(target, student, teacher=None, k=3, *, change=lambda rows: None, **settings):
    for path in (target, header_path(target)):
        path.unlink(missing_ok=True)
    request = ScoreRequest(top_k=k)
    found = rollouts()
    columns = score_answers(teacher or Listed(), found, request, max_tokens=20, pad_id=0, device=CPU)
    rows = [
        {"uid": each.problem.uid, "finished": True, **token_record(each), **scores}
        for each, scores in zip(found, columns, strict=True)
    ]
    change(rows)
    scores = {"scores": {"top_k": k, "temperature": 1.0}} | settings
    recording = Recording(target, {"tokenizer": describe_tokenizer(student.tokenizer), **scores})
    recording.open({"format": FORMAT, "weights": "", "has_log_probs": True})
    recording.append(rows, num_done=3, counts={})
    recording.finish()
    return str(target)


def ready(path, student):
    teacher = StoredTeacher(path)
    teacher.setup(student, None, CPU)
    return teacher


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_scores_come_back_bit_for_bit(tmp_path, student, ending, k):
    teacher = ready(write(tmp_path / f"a.{ending}", student, k=k), student)
    request = ScoreRequest(top_k=k)
    assert teacher.offer == request
    teacher.check(request)
    batch = collate(rollouts()[::-1], 0)
    told, expected = teacher.score(batch, request), Listed().score(batch, request)
    assert torch.equal(told.sampled().view(torch.int32), expected.sampled().view(torch.int32))
    for own, other in zip(told.topk(k), expected.topk(k), strict=True):
        assert own.dtype == other.dtype and torch.equal(own, other)


def test_the_first_tokens_of_an_answer_are_enough(tmp_path, student):
    teacher = ready(write(tmp_path / "a.jsonl", student), student)
    long = rollouts()[2]
    short = replace(
        long, response_ids=long.response_ids[:6], log_probs=long.log_probs[:6], student_wrote=long.student_wrote[:6]
    )
    whole = teacher.score(collate([long], 0), teacher.offer).sampled()
    assert teacher.score(collate([short], 0), teacher.offer).sampled().tolist() == whole[:4].tolist()


def test_a_rollout_that_is_not_in_the_file_names_the_nearest_row(tmp_path, student):
    teacher = ready(write(tmp_path / "a.jsonl", student), student)
    first, _, third = rollouts()
    other = first.response_ids.clone()
    other[3] += 1
    longer = torch.cat([first.response_ids, torch.tensor([9])])
    cases = {
        f"line 1 comes nearest and has token {other[3] - 1} at place 3 of the answer, where the rollout has"
        f" {other[3]}": replace(first, response_ids=other),
        "line 1 comes nearest and has no token at place 5 of the answer": replace(
            first, response_ids=longer, log_probs=torch.zeros(6)
        ),
        "line 1 comes nearest and has another prompt": replace(first, prompt_ids=first.prompt_ids + 1),
        "line 3 comes nearest and has other tokens that the student wrote": replace(third, student_wrote=None),
        "of problem 'x': no row has this uid": replace(first, problem=Problem("x", ())),
    }
    for message, rollout in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            teacher.score(collate([rollout], 0), teacher.offer)
        assert "\n" not in str(caught.value) and "data.source: Stored" in str(caught.value)


def test_what_does_not_fit_is_said_before_anything_is_trained(tmp_path, student):
    def fails(message, path, request=None):
        teacher = StoredTeacher(path)
        with pytest.raises(ValueError, match=message) as caught:
            teacher.check(request or teacher.offer)
            teacher.setup(student, None, CPU)
        assert "\n" not in str(caught.value)

    path = tmp_path / "a.jsonl"
    with pytest.raises(ValueError, match=r"StoredTeacher.path: expected a file ending in .jsonl or .parquet"):
        StoredTeacher("a.csv")
    fails("there is no file .*--score true", str(path))
    fails("StoredTeacher cannot give .*full vocabulary", write(path, student), ScoreRequest(full_vocabulary=True))
    fails("its own top 4", write(path, student), ScoreRequest(top_k=4))
    fails("written at 1.0. Set it to 1.0", write(path, student), ScoreRequest(temperature=2.0))
    fails("token ids of another vocabulary", write(path, student, tokenizer={"vocabulary": "another"}))
    fails("line 2: expected a list in the column 'teacher_ids', got 'None'", write(path, student, change=_without_ids))
    fails("line 1: expected scores of 5 tokens, 3 likeliest each", write(path, student, change=_one_less))
    header = header_path(path)
    header.write_text(header.read_text().replace('"scores"', '"others"'))
    fails("holds no scores of a teacher", str(path))


def _without_ids(rows):
    rows[1]["teacher_ids"] = None


def _one_less(rows):
    rows[0]["teacher_log_probs"].pop()
