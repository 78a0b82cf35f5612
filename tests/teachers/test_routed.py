"""Teachers by column, one at a time in memory if wanted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import CHARACTERS, make_model, make_tokenizer, save_folder
from scoring import CPU, EVERYTHING, make_batches

from opd_lightning.backends.hf import HFStudent, HFTeacher
from opd_lightning.rollouts.batching import collate
from opd_lightning.teachers import MixtureTeacher, Routed


def by_level(*levels):
    """A batch whose rollouts have these levels, one after the other."""
    _, (rollouts,) = make_batches()
    problems = [
        replace(rollout.problem, uid=f"u{level}", columns={"level": level})
        for rollout, level in zip(rollouts, levels, strict=True)
    ]
    return collate([replace(rollout, problem=problem) for rollout, problem in zip(rollouts, problems, strict=True)], 0)


@pytest.fixture
def folders(tiny_qwen3_folder, tiny_teacher_folder):
    return {"small": str(tiny_qwen3_folder), "large": str(tiny_teacher_folder)}


def ready(teacher, folders):
    student = HFStudent(folders["small"])
    teacher.preflight(student)
    teacher.setup(student, torch.nn.Identity(), CPU)
    return teacher


def make(folders, kind=Routed, **options):
    return kind({name: HFTeacher(path) for name, path in folders.items()}, **options)


ROUTES = {"column": "level", "routes": {"1": "small", "2": "large"}}


def test_each_rollout_is_scored_by_its_own_teacher(folders):
    routed = ready(make(folders, **ROUTES), folders)
    batch = by_level(2, 1, 2)
    scores = routed.score(batch, EVERYTHING)
    alone = {name: ready(HFTeacher(path), folders).score(batch, EVERYTHING) for name, path in folders.items()}
    lengths = [5, 2, 9]
    owner = torch.tensor([2, 1, 2]).repeat_interleave(torch.tensor(lengths))[:, None]
    expected = torch.where(owner == 1, alone["small"].full(), alone["large"].full())
    torch.testing.assert_close(scores.full(), expected, atol=1e-5, rtol=1e-5)
    ids = torch.randint(7, 80, (16, 3), generator=torch.Generator().manual_seed(0))
    for part, rows in ((scores, slice(None)), (scores.slice(3, 9), slice(3, 9))):
        torch.testing.assert_close(part.at(ids[rows]), scores.full()[rows].gather(-1, ids[rows]))
        torch.testing.assert_close(part.sampled(), scores.full()[rows].gather(-1, batch.tokens.ids[rows, None])[:, 0])
        torch.testing.assert_close(part.topk(4)[1], scores.full()[rows].topk(4)[0])
        assert torch.equal(part.full(), scores.full()[rows])
    assert scores.knows_full and scores.columns() is None


def test_a_batch_of_one_route_is_that_teacher_bit_for_bit(folders):
    routed = ready(make(folders, **ROUTES), folders)
    batch = by_level(1, 1, 1)
    assert torch.equal(
        routed.score(batch, EVERYTHING).full(),
        ready(HFTeacher(folders["small"]), folders).score(batch, EVERYTHING).full(),
    )


@pytest.mark.parametrize(("kind", "options"), [(Routed, ROUTES), (MixtureTeacher, {})], ids=["routed", "mixture"])
def test_paged_teachers_are_there_one_at_a_time_and_score_the_same(kind, options, folders):
    paged, plain = (
        ready(make(folders, kind, paged=True, **options), folders),
        ready(make(folders, kind, **options), folders),
    )
    batches = [by_level(2, 1, 2), by_level(1, 2, 1), by_level(2, 2, 2)]
    bodies = {name: teacher._model.get_decoder() for name, teacher in paged.teachers.items()}
    resting = {name: [*map(id, body.parameters())] for name, body in bodies.items()}
    seen = []

    def look(name):
        # weights that visit stand in for those that rest: on the CPU, where a device is no other place, as well
        there = [other for other, body in bodies.items() if [*map(id, body.parameters())] != resting[other]]
        seen.append((name, there))

    for name, body in bodies.items():
        body.register_forward_pre_hook(lambda module, arguments, name=name: look(name))
    for mine, other in zip(paged.score_all(batches, EVERYTHING), plain.score_all(batches, EVERYTHING), strict=True):
        assert torch.equal(mine.full(), other.full())
    assert seen and all(there == [name] for name, there in seen)
    visits = [name for place, (name, _) in enumerate(seen) if place == 0 or seen[place - 1][0] != name]
    assert visits == ["small", "large"] or visits == ["large", "small"]  # each comes once per step


def test_unknown_values_are_refused_before_training_with_all_the_routes(folders):
    routed = make(folders, **ROUTES)
    problems = [rollout.problem for rollout in by_level(1, 2, 3).rollouts]
    with pytest.raises(ValueError, match=r"problem 'u3' has 3 in the column 'level'.*Routes: '1', '2'\. Add one, or"):
        routed.check_problems(problems)
    make(folders, **ROUTES, default="large").check_problems(problems)
    with pytest.raises(
        ValueError,
        match=r"problem 'u1' has the columns source, level, but no column 'domain', and there is no route for that",
    ):
        make(folders, column="domain").check_problems(problems)
    with pytest.raises(ValueError, match=r"'default' in the column 'source'.*Routes: 'small', 'large'"):
        make(folders, column="source").check_problems(problems)
    with pytest.raises(ValueError, match=r"routes\.1: expected the name of a teacher \(small, large\), got 'huge'"):
        make(folders, column="level", routes={"1": "huge"})


def test_each_teacher_is_checked_and_named(folders, tmp_path):
    other = save_folder(tmp_path / "other", make_model(seed=3), make_tokenizer(CHARACTERS[::-1]))
    with pytest.raises(ValueError, match=r"model\.teacher\.teachers\.strange: teacher\.path: the tokenizers"):
        make({**folders, "strange": str(other)}, column="level").preflight(HFStudent(folders["small"]))
    quantized = HFTeacher(folders["small"], quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ValueError, match=r"teachers\.small: teacher\.offload: quantised weights cannot move"):
        Routed({"small": quantized}, "level", paged=True).preflight(HFStudent(folders["small"]))
