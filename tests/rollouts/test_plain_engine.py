"""Rollouts from any student: the same as those of the engine with a cache."""

from __future__ import annotations

import pytest
import torch
from conftest import END_OF_TURN, VOCAB_SIZE
from scoring import CPU

from opd_lightning.backends.hf import HFEngine, HFStudent
from opd_lightning.interfaces import Problem, Prompt, Sampling
from opd_lightning.rollouts.plain_engine import PlainEngine

NEVER = [VOCAB_SIZE - 1]


def make_prompt(length, num_seeds=1, name="p"):
    ids = torch.randint(7, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    return Prompt(Problem(uid=f"{name}/{length}", messages=(), answer=""), tuple(ids), tuple(range(num_seeds)))


PROMPTS = [make_prompt(5, 2), make_prompt(11, 0), make_prompt(3, 3), make_prompt(1)]


@pytest.fixture
def student(tiny_qwen3_folder):
    """In float64, so that what differs by more than rounding shows."""
    return HFStudent(str(tiny_qwen3_folder), dtype="float64")


@pytest.fixture
def model(student):
    return student.load()


def make_engine(student, model, kind=PlainEngine, **options):
    engine = kind(**options)
    engine.setup(student, CPU)
    engine.sync(model, 3)
    assert engine.weight_version == 3
    return engine


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=20),
        Sampling(max_new_tokens=20, temperature=0.7, top_k=9, top_p=0.9),
        Sampling(max_new_tokens=20, temperature=0),
        Sampling(max_new_tokens=9, stop_ids=[]),
        Sampling(max_new_tokens=30, stop_ids=[20, 30, 40, 50]),
    ],
    ids=str,
)
@pytest.mark.parametrize("max_batch_size", [1, 4, 256])
def test_same_rollouts_as_with_a_cache(student, model, sampling, max_batch_size):
    plain = make_engine(student, model, max_batch_size=max_batch_size).generate(PROMPTS, sampling)
    cached = make_engine(student, model, HFEngine).generate(PROMPTS, sampling)
    assert [rollout.problem.uid for rollout in plain] == ["p/5", "p/5", "p/3", "p/3", "p/3", "p/1"]
    for one, other in zip(plain, cached, strict=True):
        assert (one.problem, one.seed, one.finished, one.text) == (
            other.problem,
            other.seed,
            other.finished,
            other.text,
        )
        assert torch.equal(one.prompt_ids, other.prompt_ids)
        assert torch.equal(one.response_ids, other.response_ids)
        assert one.response_ids.dtype == torch.int64
        torch.testing.assert_close(one.log_probs, other.log_probs, atol=1e-5, rtol=0)  # their dtypes too


def test_without_stop_ids_every_response_runs_to_the_end(student, model):
    rollouts = make_engine(student, model).generate(PROMPTS, Sampling(max_new_tokens=40, stop_ids=[]))
    assert {len(rollout.response_ids) for rollout in rollouts} == {40}
    assert not any(rollout.finished for rollout in rollouts)
    assert any(END_OF_TURN in rollout.response_ids for rollout in rollouts)
    assert all(
        rollout.text.count("<|im_end|>") == int((rollout.response_ids == END_OF_TURN).sum()) for rollout in rollouts
    )


def test_mode_and_random_state_are_left_alone_and_the_listener_hears_all(student, model):
    model.model.layers[1].eval()
    modes, state, heard = [part.training for part in model.modules()], torch.get_rng_state(), []
    rollouts = make_engine(student, model).generate(PROMPTS, Sampling(max_new_tokens=4), heard.append)
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert heard == rollouts
    assert make_engine(student, model).generate([], Sampling()) == []


def test_mistakes_are_named(student, model):
    with pytest.raises(ValueError, match=r"engine\.max_batch_size: expected an integer of at least 1, got 0"):
        PlainEngine(max_batch_size=0)
    with pytest.raises(ValueError, match=r"sampling\.stop_ids: expected token ids from 0 to"):
        make_engine(student, model).generate(PROMPTS, Sampling(stop_ids=[VOCAB_SIZE]))
    with pytest.raises(ValueError, match=r"problem 'p/125': 125 prompt tokens .*max_new_tokens=8 .* 128 tokens"):
        make_engine(student, model).generate([make_prompt(125)], Sampling(max_new_tokens=8))
    with pytest.raises(ValueError, match=r"problem 'p/0': the prompt is empty"):
        make_engine(student, model).generate([make_prompt(0)], Sampling(max_new_tokens=8))


def test_broken_weights_are_reported(student, model):
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"not finite at response token 0 of problem 'p/.*learning rate"):
        make_engine(student, model).generate(PROMPTS, Sampling(max_new_tokens=4))
    assert model.training


def test_weights_are_those_of_the_last_sync(student, model):
    engine = make_engine(student, model)
    before = engine.generate(PROMPTS, Sampling(max_new_tokens=8, stop_ids=NEVER))
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)))
    after = engine.generate(PROMPTS, Sampling(max_new_tokens=8, stop_ids=NEVER))
    assert any(one.response_ids.tolist() != two.response_ids.tolist() for one, two in zip(before, after, strict=True))
