"""Guards judge means of steps, act once, remember across a resume, and stop where asked to."""

import csv
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from toys import CopyEngine, adamw, make_data, make_module, make_trainer, weights_of

from opd_lightning.callbacks.guard import Guard
from opd_lightning.callbacks.guards import (
    EntropyGuard,
    HeldOutGuard,
    LateEntropyGuard,
    LengthGuard,
    OverlapGuard,
    entropy_sums,
)
from opd_lightning.interfaces import Problem, Rollout, TrainedRollout
from opd_lightning.rollouts.horizon import ConstantHorizon, GrowingHorizon
from opd_lightning.rollouts.on_policy import OnPolicy
from opd_lightning.rollouts.one_step_ahead import OneStepAhead


class Run:
    """What a guard sees of a trainer and its module, with metrics that the test writes."""

    def __init__(self):
        self.callback_metrics, self.said, self.logged = {}, [], {}
        self.global_step, self.should_stop, self.checkpoint_callbacks = 0, False, []
        self.is_global_zero, self.sanity_checking, self.state = True, False, SimpleNamespace(fn="fit")
        reduce = lambda values, reduce_op: values  # noqa: E731
        self.strategy = SimpleNamespace(reduce=reduce, root_device=torch.device("cpu"))

    def log(self, name, value, **_):
        self.logged[name] = value

    def step(self, guard, outputs=None, **metrics):
        self.global_step += 1
        self.callback_metrics = {f"train/{name}": torch.tensor(value) for name, value in metrics.items()}
        guard.on_train_batch_end(self, self, outputs, None, 0)


def steps_with_alarm(guard, capsys, values, name):
    run, found = Run(), []
    for value in values:
        run.step(guard, **(value if isinstance(value, dict) else {name: value}))
        if capsys.readouterr().out:
            found.append(run.global_step)
    return found, run


CASES = [
    (EntropyGuard(window=2), "student_entropy", [0.3, 0.3, 0.3, 0.9, 0.9, 0.9, 0.3, 0.3, 0.9, 0.9], [5, 10]),
    (EntropyGuard(window=1), "student_entropy", [0.01, 0.05, 0.1], []),  # small numbers may double
    (EntropyGuard(window=1), "", [{"student_entropy": 0.1, "teacher_entropy": t} for t in (0.3, 0.5, 0.5)], [2]),
    (EntropyGuard(window=2), "", [{"student_entropy": 0.1, "teacher_entropy": t} for t in (0.3, 0.45, 0.45)], [3]),
    (
        EntropyGuard(window=2),
        "",
        [{"student_entropy": 0.1}, *[{"student_entropy": 0.1, "teacher_entropy": 1.0}] * 2],
        [3],
    ),
    (EntropyGuard(window=1), "", [{"student_entropy": 1e-4, "teacher_entropy": 0.002}], []),
    (OverlapGuard(window=1), "overlap_ratio", [0.7, 0.8, 0.71, 0.69, 0.6, 0.75], [4]),
    (LengthGuard(window=2), "response_length", [10.0, 10.0, 20.0, 20.0, 21.0], [5]),
    (LengthGuard(window=1), "", [{}, {"response_length": math.nan}, {"response_length": 3.0}], []),
]


@pytest.mark.parametrize(("guard", "name", "values", "expected"), CASES)
def test_an_alarm_rings_once_when_a_threshold_is_crossed(guard, name, values, expected, capsys):
    found, run = steps_with_alarm(guard, capsys, values, name)
    assert found == expected
    assert not run.should_stop


def test_the_smoothed_number_is_logged(capsys):
    _, run = steps_with_alarm(LengthGuard(window=2), capsys, [10.0, 11.0, 12.0], "response_length")
    assert run.logged == {"guard/response_length": 11.5}


def replay(path):
    """The metrics that a real run logged, step by step: all guards that read them look on."""
    guards, run = [EntropyGuard(), OverlapGuard(), LengthGuard(), HeldOutGuard()], Run()
    for row in csv.DictReader(path.open()):
        known = {name: float(value) for name, value in row.items() if value and "/" in name}
        run.callback_metrics |= known
        for guard in guards:
            if "train/loss" in known:
                guard.on_train_batch_end(run, run, None, None, 0)
            if "val/avg_at_1" in known:
                guard.on_validation_end(run, run)
    return guards


def test_a_healthy_run_rings_no_alarm(capsys):
    guards = replay(Path(__file__).parents[2] / "benchmarks" / "results" / "quickstart_cpu-2core.csv")
    assert capsys.readouterr().out == ""
    assert all(guard.best is not None for guard in guards)  # they have seen what they judge


def test_a_run_that_diverges_as_the_replication_did_is_noticed(capsys):
    entropies = [1.14 + (3.18 - 1.14) * step / 19 for step in range(20)] + [3.18] * 10
    found, _ = steps_with_alarm(EntropyGuard(), capsys, entropies, "student_entropy")
    assert found == [18]


def rollout(entropies):
    count = len(entropies)
    ids = torch.arange(count)
    whole = Rollout(Problem("u", ()), ids[:1], ids, torch.zeros(count), True, 0)
    return TrainedRollout(whole, torch.zeros(count), {"student_entropy": torch.tensor(entropies)})


def test_late_entropy_is_that_of_the_last_quarter(capsys):
    rollouts = [rollout([1.0, 1, 3, 3, 5, 6, 7, 9]), rollout([2.0])]
    assert entropy_sums(rollouts).tolist() == [8 + 2, 5, 16, 2]
    guard, run = LateEntropyGuard(window=1), Run()
    for late in (1.0, 1.9, 2.1):
        run.step(guard, {"facts": SimpleNamespace(rollouts=[rollout([1.0, 1.0, 1.0, late])])})
        said = capsys.readouterr().out
        assert ("now it is 2.10 times" in said) == (late == 2.1)
    run.step(guard, {"facts": SimpleNamespace(rollouts=[])})  # nothing known, nothing judged
    assert guard.recent == [pytest.approx(2.1)]


def test_held_out_problems_count_against_training(capsys):
    guard, run, found = HeldOutGuard(), Run(), []
    for held_out, training in ((0.5, 0.4), (0.6, 0.3), (0.5, 0.35), (0.5, 0.2), (0.4, 0.1), (0.6, 0.1), (0.5, 0.05)):
        run.callback_metrics = {"val/avg_at_1": held_out, "train/reverse_kl": training}
        guard.on_validation_end(run, run)
        found.append(bool(capsys.readouterr().out))
    assert found == [False, False, False, True, False, False, True]


def test_a_guard_that_sees_nothing_says_so_once():
    run, guard, held_out = Run(), OverlapGuard(), HeldOutGuard()
    with pytest.warns(UserWarning, match=r"OverlapGuard: overlap_ratio is not known in this run") as said:
        run.step(guard, loss=1.0)
        run.step(guard, loss=1.0)
    assert len(said) == 1
    run.callback_metrics = {"val/avg_at_1": 0.5}
    held_out.on_validation_end(run, run)  # before the first step there are no metrics of training
    with pytest.warns(UserWarning, match=r"HeldOutGuard: val/avg_at_2 is not known in this run"):
        HeldOutGuard("val/avg_at_2").on_validation_end(run, run)
    blind = HeldOutGuard()
    run.step(blind, loss=1.0)
    run.callback_metrics |= {"val/avg_at_1": 0.5}
    with pytest.warns(UserWarning, match=r"HeldOutGuard: train/reverse_kl is not known in this run"):
        blind.on_validation_end(run, run)


@pytest.mark.parametrize(
    ("cls", "steps"),
    [
        (OverlapGuard, [{"overlap_ratio": value} for value in (0.7, 0.7, 0.8, 0.8, 0.75, 0.68, 0.6)]),
        (EntropyGuard, [{"student_entropy": 0.1, "teacher_entropy": t} for t in (0.1, 0.1, 0.1, 0.1, 0.9)]),
    ],
)
def test_a_guard_goes_on_where_it_was(cls, steps, capsys):
    whole, run = cls(window=2), Run()
    for step in steps:
        run.step(whole, **step)
    first, second, run = cls(window=2), cls(window=2), Run()
    for step in steps[:4]:
        run.step(first, **step)
    second.load_state_dict(first.state_dict())
    for step in steps[4:]:
        run.step(second, **step)
    assert second.state_dict() == whole.state_dict() and whole.is_alarmed


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (OverlapGuard, {"action": "halt"}, "OverlapGuard.action: expected one of warn, shorten, stop, got 'halt'"),
        (LengthGuard, {"window": 0}, "LengthGuard.window: expected an integer of at least 1"),
        (EntropyGuard, {"most": 1.0}, "EntropyGuard.most: expected a number above 1, got 1.0"),
        (EntropyGuard, {"least": 1.5}, "EntropyGuard.least: expected a number above 0 and below 1"),
        (HeldOutGuard, {"most_lost": 0}, "HeldOutGuard.most_lost: expected a number above 0"),
    ],
)
def test_thresholds_out_of_range_are_refused(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(**options)


class Stopper(LateEntropyGuard):
    """Complains from the third step on."""

    def complaint(self, now, first, best):
        return "enough." if len(self.recent) >= 3 else None

    def judge(self, value, trainer, pl_module):
        self.count = getattr(self, "count", 0) + 1
        super().judge(value, trainer, pl_module)


@pytest.mark.slow
def test_a_real_run_stops_and_names_the_best_checkpoint(tmp_path, tiny_qwen3_folder, tiny_teacher_folder, capsys):
    guard = Stopper(action="stop", window=3)
    kept = ModelCheckpoint(tmp_path, monitor="train/reverse_kl", every_n_train_steps=1, save_top_k=1)
    trainer = make_trainer(tmp_path, 6, callbacks=[guard, kept], enable_checkpointing=True)
    trainer.fit(make_module(tiny_qwen3_folder, tiny_teacher_folder), datamodule=make_data())
    assert trainer.global_step == guard.count == 3
    assert "guard/late_entropy_ratio" in trainer.callback_metrics
    said = capsys.readouterr().out
    assert "Stopper, step 3: enough. The run stops here. The best checkpoint by train/reverse_kl is" in said
    saved = torch.load(kept.best_model_path, weights_only=True)["callbacks"]
    assert len(saved["Stopper"]["recent"]) >= 1


class EverySecond(Guard):
    """Complains in every second step, whatever happens; notes the horizon of each."""

    signal = "nothing"

    def __init__(self):
        super().__init__("shorten", window=1)
        self.horizons = []

    def measure(self, trainer, outputs):
        self.horizons.append(float(trainer.callback_metrics["train/horizon"]))
        return float(trainer.global_step)

    def complaint(self, now, first, best):
        return None if now % 2 else "again."


def shortened(folder, folders, steps, horizon, source=OnPolicy, ckpt_path=None, save=None):
    guard = EverySecond()
    module = make_module(*folders, optimizer=adamw)
    trainer = make_trainer(folder, steps, callbacks=[guard])
    data = make_data(horizon=horizon, source=source(), engine=CopyEngine())
    trainer.fit(module, data, ckpt_path=ckpt_path)
    if save is not None:
        trainer.save_checkpoint(save)
    return module, guard.horizons


@pytest.mark.parametrize(
    ("make", "expected", "source"),
    [
        (lambda: ConstantHorizon(8), [8, 8, 8, 4, 4, 2], OnPolicy),  # the step after an alarm is settled
        pytest.param(lambda: GrowingHorizon(1, every=1), [1, 2, 4, 2, 2, 1], OnPolicy, marks=pytest.mark.slow),
        pytest.param(lambda: ConstantHorizon(6), [6, 6, 6, 3, 3, 1], OneStepAhead, marks=pytest.mark.slow),
    ],
)
def test_a_guard_shortens_the_horizon_for_good_and_a_resumed_run_too(
    tmp_path, tiny_qwen3_folder, tiny_teacher_folder, make, expected, source, capsys
):
    folders = tiny_qwen3_folder, tiny_teacher_folder
    whole, horizons = shortened(tmp_path, folders, 6, make(), source)
    assert horizons == expected
    said = capsys.readouterr().out
    assert f"EverySecond, step 2: again. The horizon is cut from {expected[2]} to {expected[3]} tokens." in said
    shortened(tmp_path, folders, 4, make(), source, save=tmp_path / "stop.ckpt")  # an alarm rang in its last step
    resumed, horizons = shortened(tmp_path, folders, 6, make(), source, ckpt_path=tmp_path / "stop.ckpt")
    assert horizons == expected[4:]
    for name, weight in weights_of(resumed).items():
        assert torch.equal(weight, weights_of(whole)[name]), name


def test_without_a_horizon_there_is_nothing_to_shorten(tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    trainer = make_trainer(tmp_path, 1, callbacks=[LengthGuard(action="shorten")])
    with pytest.raises(ValueError, match=r"LengthGuard.action: 'shorten' needs a horizon .* data.horizon is null. Set"):
        trainer.fit(make_module(tiny_qwen3_folder, tiny_teacher_folder), datamodule=make_data())
