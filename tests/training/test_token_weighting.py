"""Weighted steps of the whole trainer against a float64 model that knows nothing of micro-batches."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import VOCAB_SIZE
from toys import make_data, make_module, make_trainer, weights_of
from weighted_run import NORMALIZERS, Fading

from opd_lightning.interfaces import TokenWeighting

PROGRAM = Path(__file__).parent / "weighted_run.py"


class Same(TokenWeighting):
    """A number for every token."""

    def __init__(self, weight, normalizer):
        self.weight, self.normalizer = weight, normalizer

    def __call__(self, facts, micro_batch):
        return torch.full_like(micro_batch.tokens.rollout_log_probs, self.weight)


class Uncertain(TokenWeighting):
    """Only tokens at which the student wavers."""

    reads = ("student_entropy",)
    normalizer = "kept_tokens"

    def __call__(self, facts, micro_batch):
        return facts["student_entropy"] > 0.5


class Misread(TokenWeighting):
    reads = ("overlap_ratio", "reverse_KL")

    def __call__(self, facts, micro_batch):
        raise AssertionError("never asked")


class EverySecond(TokenWeighting):
    """Every second token of a response counts: said by weights of 0, or by leaving the others out beforehand."""

    reads = ("student_entropy",)
    normalizer = "kept_tokens"

    def __init__(self, looks_first):
        self.looks_first = looks_first

    def look(self, step):
        self.seen = step
        return [replace(each.rollout, student_wrote=torch.arange(len(each.losses)) % 2 == 0) for each in step]

    def __call__(self, facts, micro_batch):
        assert bool(facts) != self.looks_first
        return micro_batch.tokens.positions % 2 == 0


class Careless(TokenWeighting):
    """Changes rollouts in a way that is not its own to choose."""

    looks_first = True

    def __init__(self, change):
        self.look = lambda step: change([each.rollout for each in step])

    def __call__(self, facts, micro_batch):
        raise AssertionError("never asked")


@pytest.fixture
def train(tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    def step(weighting, **options):
        module = make_module(tiny_qwen3_folder, tiny_teacher_folder, token_weighting=weighting, **options)
        trainer = make_trainer(tmp_path, 1)
        trainer.fit(module, make_data())
        return module, trainer

    return step


def reference_step(rollouts, student_folder, teacher_folder, weigh, normalizer):
    """Weights after one SGD step of size 1 on the weighted full-vocabulary reverse KL, in float64."""
    from transformers import AutoModelForCausalLM

    student = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float64)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float64)
    sums, total_weight, num_tokens = [], 0.0, 0
    for rollout in rollouts:
        ids = torch.cat([rollout.prompt_ids, rollout.response_ids])[None]
        at = slice(len(rollout.prompt_ids) - 1, -1)
        p = student(ids).logits[0, at, :VOCAB_SIZE].log_softmax(-1)
        with torch.no_grad():
            q = teacher(ids).logits[0, at, :VOCAB_SIZE].log_softmax(-1)
            weights = weigh(p, torch.arange(len(p)))
        loss = (weights * (p.exp() * (p - q)).sum(-1)).sum()
        sums.append(loss / len(p) if normalizer == "sequences" else loss)
        total_weight += weights.sum()
        num_tokens += len(p)
    divisor = {"all_tokens": num_tokens, "kept_tokens": total_weight, "sequences": len(sums)}[normalizer]
    (sum(sums) / divisor).backward()
    return {
        name: (parameter - parameter.grad).detach().float() for name, parameter in student.named_parameters()
    }, total_weight / num_tokens


def assert_same_weights(module, expected, **tolerances):
    actual = weights_of(module)
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, msg=name, **tolerances)


CASES = [
    *((Fading(normalizer), lambda p, positions: 0.8 ** positions.double()) for normalizer in NORMALIZERS),
    (Uncertain(), lambda p, positions: (-(p.exp() * p).sum(-1) > 0.5).double()),
]


@pytest.mark.parametrize(("weighting", "weigh"), CASES, ids=lambda value: getattr(value, "normalizer", None))
def test_a_weighted_step_is_that_of_a_float64_model(train, tiny_qwen3_folder, tiny_teacher_folder, weighting, weigh):
    module, trainer = train(weighting)
    expected, mean_weight = reference_step(
        module.last_rollouts, tiny_qwen3_folder, tiny_teacher_folder, weigh, weighting.normalizer
    )
    assert_same_weights(module, expected, rtol=1e-4, atol=2e-5)
    assert trainer.callback_metrics["train/token_weight"] == pytest.approx(float(mean_weight), rel=1e-5)
    untrained = make_module(tiny_qwen3_folder, tiny_teacher_folder).spec.load()
    assert any(not torch.equal(weight, expected[name]) for name, weight in untrained.named_parameters())


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_weighted_steps_do_not_depend_on_micro_batches(train, normalizer):
    whole, _ = train(Fading(normalizer))
    cut, _ = train(Fading(normalizer), max_tokens_per_micro_batch=48)
    assert_same_weights(cut, weights_of(whole), rtol=1e-4, atol=1e-5)


def test_weights_of_1_change_nothing(train):
    plain, _ = train(None)
    weighted, _ = train(Same(1.0, "all_tokens"))
    assert all(torch.equal(weight, weights_of(plain)[name]) for name, weight in weights_of(weighted).items())
    kept, _ = train(Same(1.0, "kept_tokens"))
    assert_same_weights(kept, weights_of(plain), rtol=1e-4, atol=1e-5)


def test_only_kept_tokens_makes_the_scale_of_the_weights_irrelevant(train):
    plain, _ = train(None, optimizer=partial(torch.optim.SGD, lr=1.0))
    kept, _ = train(Same(0.25, "kept_tokens"))
    assert_same_weights(kept, weights_of(plain), rtol=1e-4, atol=1e-5)
    quarter, _ = train(Same(0.25, "all_tokens"), optimizer=partial(torch.optim.SGD, lr=4.0))
    assert_same_weights(quarter, weights_of(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_when_no_token_weighs_anything_nothing_moves(train, normalizer):
    module, trainer = train(Same(0.0, normalizer))
    untrained = dict(module.spec.load().named_parameters())
    assert all(torch.equal(weight, untrained[name]) for name, weight in weights_of(module).items())
    assert trainer.callback_metrics["train/grad_norm"] == 0
    assert trainer.callback_metrics["train/skipped_steps"] == 0


def test_what_is_left_out_after_a_first_look_is_what_weighs_nothing(train):
    weighed, trainer = train(EverySecond(looks_first=False))
    looked, other = train(EverySecond(looks_first=True))
    assert_same_weights(looked, weights_of(weighed), rtol=1e-4, atol=1e-5)
    cut, _ = train(EverySecond(looks_first=True), max_tokens_per_micro_batch=48)
    assert_same_weights(cut, weights_of(weighed), rtol=1e-4, atol=1e-5)
    assert other.callback_metrics.keys() == trainer.callback_metrics.keys()  # both of all tokens of the step
    for name in ("train/loss", "train/reverse_kl", "train/token_weight"):
        assert other.callback_metrics[name] == trainer.callback_metrics[name], name
    assert 0.5 <= other.callback_metrics["train/token_weight"] < 1
    assert all(set(each.facts) >= {"reverse_kl"} for each in looked.token_weighting.seen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rollouts: rollouts[1:], r"Careless\.look must return the same rollouts in the same order"),
        (
            lambda rollouts: [replace(r, student_wrote=torch.zeros(len(r.response_ids)).bool()) for r in rollouts],
            r"Careless\.look must keep some of the tokens .* of every rollout .* is left with 0 tokens",
        ),
    ],
)
def test_a_first_look_may_leave_out_tokens_and_nothing_else(train, change, message):
    with pytest.raises(ValueError, match=message):
        train(Careless(change))


def test_facts_are_there_for_a_weighting_even_when_no_metrics_are_wanted(train):
    with_metrics, _ = train(Uncertain())
    without, _ = train(Uncertain(), top_k_metrics=0)
    assert_same_weights(without, weights_of(with_metrics), rtol=0, atol=0)


def test_reading_what_cannot_be_known_is_refused_before_anything_is_loaded(train):
    with pytest.raises(ValueError, match=r"model\.token_weighting: Misread reads reverse_KL, which .* Known are: "):
        train(Misread())
    with pytest.raises(ValueError, match=r"model\.token_weighting\.normalizer: expected one of .* got 'tokens'"):
        train(Same(1.0, "tokens"))


@pytest.mark.slow
def test_two_processes_make_the_weighted_steps_of_one(forks, tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    folders = {}
    for num_processes in (1, 2):
        folder = folders[num_processes] = tmp_path / str(num_processes)
        words = [PROGRAM, num_processes, tiny_qwen3_folder, tiny_teacher_folder, folder]
        done = forks.run(*words, processes=num_processes)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    for normalizer in NORMALIZERS:
        one = torch.load(folders[1] / f"{normalizer}_rank0.pt")
        for rank in (0, 1):
            for name, weight in torch.load(folders[2] / f"{normalizer}_rank{rank}.pt").items():
                torch.testing.assert_close(weight, one[name], rtol=1e-4, atol=1e-5, msg=f"{normalizer} {name}")
