"""Only the first tokens are generated and trained on: how many, what becomes of cut answers, and who is told."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from toys import CopyEngine, adamw, make_data, make_module, make_trainer, weights_of

from opd_lightning.interfaces import Rollout, Sampling, StepFacts, TrainedRollout
from opd_lightning.rollouts.horizon import AdaptiveHorizon, ConstantHorizon, GrowingHorizon, StepSampling
from opd_lightning.rollouts.one_step_ahead import OneStepAhead
from opd_lightning.rollouts.reuse import Reuse
from opd_lightning.selection import DifficultyPool


class Recorder(Callback):
    def __init__(self):
        self.batches, self.metrics, self.outputs = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(batch)
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.outputs.append(outputs)


@pytest.fixture
def folders(tiny_qwen3_folder, tiny_teacher_folder):
    return tiny_qwen3_folder, tiny_teacher_folder


def fit(tmp_path, folders, steps, *, data, ckpt_path=None, save=None, validate=False, **options):
    recorder = Recorder()
    module = make_module(*folders, optimizer=adamw, **options)
    data = make_data(**data)
    trainer = make_trainer(tmp_path, steps, callbacks=[recorder], limit_val_batches=1.0 if validate else 0)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    if save is not None:
        trainer.save_checkpoint(save)
    if validate:
        recorder.validation = trainer.validate(module, data, verbose=False)[0]
    return module, recorder


def column(recorder, name):
    return [metrics[f"train/{name}"] for metrics in recorder.metrics]


def test_a_horizon_generates_the_beginning_of_the_same_answers_and_no_end(tmp_path, folders):
    cut, notes = fit(tmp_path, folders, 1, data={"horizon": ConstantHorizon(3)}, validate=True)
    _, whole = fit(tmp_path, folders, 1, data={})
    facts, expected = notes.outputs[0]["facts"].rollouts, whole.outputs[0]["facts"].rollouts
    by_seed = {trained.rollout.seed: trained for trained in expected}
    assert any(len(trained.rollout.response_ids) > 3 for trained in expected)
    for trained in facts:
        full, ids = by_seed[trained.rollout.seed], trained.rollout.response_ids
        assert torch.equal(ids, full.rollout.response_ids[:3])
        assert trained.rollout.finished == (full.rollout.finished and len(full.rollout.response_ids) <= 3)
        assert trained.rollout.finished == (int(ids[-1]) in cut.spec.tokenizer.stop_ids)  # no end is made up
        torch.testing.assert_close(trained.losses, full.losses[:3])
    assert column(notes, "horizon") == [3]
    assert notes.metrics[0]["train/horizon_cut_rate"] > 0
    assert not notes.metrics[0].keys() & {"train/truncation_rate", "train/accuracy"}
    assert notes.validation["val/response_length"] > 3 and "val/avg_at_1" in notes.validation


def test_a_horizon_beyond_the_longest_answer_is_none(tmp_path, folders):
    far, notes = fit(tmp_path, folders, 2, data={"horizon": ConstantHorizon(8)})
    plain, _ = fit(tmp_path, folders, 2, data={})
    for name, weight in weights_of(far).items():
        assert torch.equal(weight, weights_of(plain)[name]), name
    assert "train/truncation_rate" in notes.metrics[0]


def lengths(horizon, steps, most=100):
    sampling = StepSampling(Sampling(max_new_tokens=most), horizon)
    return [sampling.of_step(step).max_new_tokens for step in steps]


def test_a_growing_horizon_is_monotone_and_capped():
    assert lengths(GrowingHorizon(10, every=2, add=30), range(9)) == [10, 10, 40, 40, 70, 70, 100, 100, 100]
    assert lengths(GrowingHorizon(10, every=3), [0, 2, 3, 6, 9, 12, 10**6]) == [10, 10, 20, 40, 80, 100, 100]
    assert lengths(ConstantHorizon(200), [0, 5]) == [100, 100]


def told(values, name="reverse_kl"):
    values = torch.tensor(values)
    ids = torch.arange(len(values))
    rollout = Rollout(None, ids, ids, values, False, 0)
    return StepFacts(0, (TrainedRollout(rollout, values, {name: values}),))


@pytest.mark.parametrize("name", ["reverse_kl", "sampled_log_ratio"])
def test_an_adaptive_horizon_doubles_when_its_last_quarter_is_learned(name):
    horizon = AdaptiveHorizon(4, close=0.1)
    horizon.observe(told([0.0, 0.0, 0.0, 0.5], name))  # the last token is far
    horizon.observe(told([0.0, 0.0, 0.0], name))  # nothing is known of it
    assert horizon.num_tokens(1) == 4
    horizon.observe(told([2.0, 2.0, 2.0, 0.05], name))
    assert horizon.num_tokens(1) == 8
    other = AdaptiveHorizon(4)
    other.load_state_dict(horizon.state_dict())
    assert other.num_tokens(0) == 8
    other.load_state_dict({})
    assert other.num_tokens(0) == 4


def test_what_is_settled_stays_so():
    horizon = AdaptiveHorizon(4)
    sampling = StepSampling(Sampling(max_new_tokens=64), horizon)
    assert sampling.of_step(1).max_new_tokens == 4
    sampling.observe(told([0.0] * 4))
    assert [sampling.of_step(step).max_new_tokens for step in (1, 2)] == [4, 8]
    resumed = StepSampling(Sampling(max_new_tokens=64), AdaptiveHorizon(4))
    resumed.load_state_dict(sampling.state_dict())
    assert [resumed.of_step(step).max_new_tokens for step in (1, 2, 3)] == [4, 8, 8]


@pytest.mark.parametrize(
    "make_source",
    [lambda: Reuse(2, 2), pytest.param(OneStepAhead, marks=pytest.mark.slow)],
    ids=["reuse", "ahead"],
)
def test_with_any_source_stop_and_resume_equals_one_run(tmp_path, folders, make_source):
    def data():
        return {"source": make_source(), "engine": CopyEngine(), "horizon": AdaptiveHorizon(2, close=100.0)}

    whole, expected = fit(tmp_path, folders, 6, data=data())
    fit(tmp_path, folders, 3, data=data(), save=tmp_path / "stop.ckpt")
    resumed, notes = fit(tmp_path, folders, 6, data=data(), ckpt_path=tmp_path / "stop.ckpt")
    assert column(notes, "horizon") == column(expected, "horizon")[3:]
    assert len(set(column(expected, "horizon"))) > 1
    for name, weight in weights_of(resumed).items():
        assert torch.equal(weight, weights_of(whole)[name]), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConstantHorizon(0), r"data\.horizon\.tokens"),
        (lambda: GrowingHorizon(every=0), r"data\.horizon\.every"),
        (lambda: GrowingHorizon(add=0), r"data\.horizon\.add"),
        (
            lambda: AdaptiveHorizon(close=0),
            r"data\.horizon\.close: expected a positive number of nats per token, got 0",
        ),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rewards_and_distances_that_a_horizon_does_not_have_are_refused(tmp_path, folders):
    with pytest.raises(ValueError, match=r"data\.horizon: DifficultyPool learns from rewards, .* Use Shuffled, or"):
        fit(tmp_path, folders, 1, data={"horizon": ConstantHorizon(3), "selector": DifficultyPool()})
    with pytest.raises(
        ValueError, match=r"data\.horizon: AdaptiveHorizon follows sampled_log_ratio, .* GrowingHorizon"
    ):
        fit(tmp_path, folders, 1, data={"horizon": AdaptiveHorizon(3)}, top_k_metrics=0)
