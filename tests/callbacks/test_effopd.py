"""The callback in real fits: when it acts, what it leaves alone, what a resumed run does."""

import random
from itertools import count
from types import SimpleNamespace

import numpy
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opd_lightning import EffOPD, HeldOutLoss
from opd_lightning.interfaces import Score

NUM_BATCHES = 12


def make_batches(num=NUM_BATCHES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * num, 6, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).tanh()), batch_size=4)


class Stream:
    """Batches that a resumed run goes on with where the saved one stopped."""

    def __init__(self):
        self.batches, self.position = list(make_batches()), 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.position %= len(self.batches)
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Regression(LightningModule):
    """Dropout draws from the global random state at every step, so a disturbed state shows up in the weights."""

    def __init__(self, rate=1e-3, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1)).to(dtype)
        self.rate = rate
        self.weight_version = 0

    def on_weights_moved(self):
        self.weight_version += 1

    def loss(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self.net(x).float(), y.float())

    def training_step(self, batch, batch_idx):
        # what a resumed run needs of its random state, without saving it
        torch.manual_seed(1000 + self.global_step)
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.rate)


class WithValidation(Regression):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))


def held_out(module):
    return -float(module.loss(next(iter(make_batches(1, seed=9)))))


def rising():
    """A score that every point beats the one before on."""
    values = count()
    return lambda module: float(next(values))


def make_trainer(path, *callbacks, **options):
    settings = {
        "accelerator": "cpu",
        "max_steps": NUM_BATCHES,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(default_root_dir=path, callbacks=list(callbacks), **(settings | options))


def fit(path, module, *callbacks, ckpt_path=None, validation=None, **options):
    trainer = make_trainer(path, *callbacks, **options)
    trainer.fit(module, Stream(), validation, ckpt_path=ckpt_path, weights_only=True)
    return trainer


class Steps(Callback):
    """Global step and report of every search, noted right after it."""

    def __init__(self, effopd):
        self.effopd, self.seen, self.reports = effopd, [], []

    def on_train_batch_end(self, trainer, *_):
        if self.effopd.last_search is not None and self.effopd.last_search not in self.reports:
            self.reports.append(self.effopd.last_search)
            self.seen.append(trainer.global_step)


def weights_of(module):
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first) and first.keys() == second.keys()


@pytest.mark.parametrize(
    ("schedule", "options", "expected"),
    [
        ("powers_of_two", {}, [1, 2, 4, 8]),
        (5, {}, [5, 10]),
        ([3, 7], {}, [3, 7]),
        ("powers_of_two", {"accumulate_grad_batches": 2, "max_steps": 6}, [1, 2, 4]),
        (1, {"accumulate_grad_batches": 5, "max_steps": -1, "max_epochs": 1}, [1, 2, 3]),
        (3, {"limit_train_batches": 4, "max_steps": -1, "max_epochs": 2}, [3, 6]),
    ],
)
def test_searches_at_the_scheduled_optimiser_steps_only(tmp_path, schedule, options, expected):
    effopd = EffOPD(held_out, schedule=schedule)
    steps = Steps(effopd)
    fit(tmp_path, Regression(), effopd, steps, **options)
    assert steps.seen == expected
    assert [report.step for report in steps.reports] == expected


def test_moves_from_the_last_accepted_point_along_the_update(tmp_path):
    """Every move of the run is recomputed here from the weights seen before and after it."""
    effopd = EffOPD(rising(), schedule=3, candidates=(2, 5))
    module = Regression()
    before, after = [], []

    class Before(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            before.append(weights_of(pl_module))

    class After(Before):
        def on_train_batch_end(self, trainer, pl_module, *_):
            after.append(weights_of(pl_module))

    start = weights_of(module)
    fit(tmp_path, module, Before(), effopd, After())
    anchor = start
    for step in range(1, NUM_BATCHES + 1):
        current, moved = before[step - 1], after[step - 1]
        for name in current:
            expected = current[name] + 5 * (current[name] - anchor[name]) if step % 3 == 0 else current[name]
            torch.testing.assert_close(moved[name], expected, rtol=1e-6, atol=1e-7)
        anchor = moved if step % 3 == 0 else anchor


@pytest.mark.parametrize(
    "score", [lambda module: float("nan"), lambda module: 0.0, None], ids=["nan", "all tie", "worse"]
)
def test_a_run_whose_searches_all_fail_is_the_plain_run(tmp_path, score):
    calls = []

    def always_worse(module):
        calls.append(0)
        random.random(), numpy.random.rand(), torch.rand(3), module.train()
        return -len(calls)

    class GlobalNoise(Regression):
        def training_step(self, batch, batch_idx):
            return self.loss(batch) * (1 + random.random() + numpy.random.rand())

    states = []
    for callbacks in ([], [EffOPD(score or always_worse, schedule=1)]):
        random.seed(0), numpy.random.seed(0)
        module = GlobalNoise()
        module.net[1].eval()
        trainer = fit(tmp_path, module, *callbacks)
        states.append((weights_of(module), trainer.optimizers[0].state_dict()["state"][0]["exp_avg"].clone()))
        assert [part.training for part in module.net] == [True, False, True, True]
    assert same(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])
    assert score or len(calls) == 2 * NUM_BATCHES


def test_a_raising_score_restores_the_weights_and_reaches_the_user(tmp_path):
    module, seen = Regression(), {}

    def breaks(module):
        if module.weight_version:
            raise ArithmeticError("no score here")
        seen.update(weights_of(module))
        return 0.0

    with pytest.raises(ArithmeticError, match="no score here"):
        fit(tmp_path, module, EffOPD(breaks, schedule=4))
    assert module.global_step == 4
    assert same(weights_of(module), seen)
    assert not module.optimizers(use_pl_optimizer=False)._optimizer_step_post_hooks


@pytest.mark.parametrize("stop", [3, 4, 6])
@pytest.mark.parametrize(
    ("schedule", "with_average"), [("powers_of_two", False), ("powers_of_two", True), ("adaptive", False)]
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, stop, schedule, with_average):
    def callbacks(folder):
        effopd = EffOPD(held_out, schedule=schedule)
        average = [EMAWeightAveraging(decay=0.8)] if with_average else []
        saver = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        return effopd, saver, [*average, effopd, Steps(effopd), saver]

    whole, first, resumed = Regression(), Regression(), Regression(rate=1.0)
    effopd, _, everything = callbacks(tmp_path / "whole")
    fit(tmp_path, whole, *everything)
    fit(tmp_path, first, *callbacks(tmp_path / "first")[2], max_steps=stop)
    again, _, everything = callbacks(tmp_path / "again")
    path = tmp_path / "first" / f"step={stop}.ckpt"
    fit(tmp_path, resumed, *everything, ckpt_path=path)
    assert same(weights_of(whole), weights_of(resumed))
    assert again.last_search.trials == effopd.last_search.trials
    assert again.last_search.cosine == effopd.last_search.cosine
    assert effopd.last_search.accepted
    ends = [torch.load(tmp_path / name / f"step={NUM_BATCHES}.ckpt", weights_only=True) for name in ("whole", "again")]
    assert same(ends[0]["effopd"]["anchor"], ends[1]["effopd"]["anchor"])
    assert same(ends[0]["state_dict"], ends[1]["state_dict"])


@pytest.mark.parametrize("stop", [6, 7, 9])  # the search after step 7 ties
def test_a_resumed_run_is_the_uninterrupted_one_when_some_searches_tie(tmp_path, stop):
    def score(module):  # too coarse for some of the searches
        return round(30 * held_out(module)) / 30

    def run(name, module, **options):
        effopd = EffOPD(score, schedule="adaptive", backward=(-0.5,))
        notes = Steps(effopd)
        saver = ModelCheckpoint(tmp_path / name, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        fit(tmp_path, module, effopd, notes, saver, **options)
        return [(report.step, report.tied, report.best) for report in notes.reports]

    whole, resumed = Regression(), Regression(rate=1.0)
    reports = run("whole", whole)
    assert {tied for _, tied, _ in reports} == {True, False}
    first = run("first", Regression(), max_steps=stop)
    later = run("again", resumed, ckpt_path=tmp_path / "first" / f"step={stop}.ckpt")
    assert first + later == reports
    assert same(weights_of(whole), weights_of(resumed))


def pair():
    """Two callbacks over different layers, on schedules of their own."""
    return [
        EffOPD(held_out, schedule=3, parameters=r"net\.0"),
        EffOPD(held_out, schedule="powers_of_two", parameters=r"net\.3", name="head"),
    ]


@pytest.mark.parametrize("stop", [3, 5])
def test_two_callbacks_resume_each_from_its_own_state(tmp_path, stop):
    def run(name, module, **options):
        callbacks = pair()
        saver = ModelCheckpoint(tmp_path / name, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        fit(tmp_path, module, *callbacks, saver, **options)
        return [callback.last_search for callback in callbacks]

    whole, resumed = Regression(), Regression(rate=1.0)
    searches = run("whole", whole)
    run("first", Regression(), max_steps=stop)
    again = run("again", resumed, ckpt_path=tmp_path / "first" / f"step={stop}.ckpt")
    assert same(weights_of(whole), weights_of(resumed))
    assert [(r.step, r.trials, r.cosine) for r in again] == [(r.step, r.trials, r.cosine) for r in searches]
    saved = torch.load(tmp_path / "again" / f"step={NUM_BATCHES}.ckpt", weights_only=True)
    assert [set(saved[key]["anchor"]) for key in ("effopd", "effopd/head")] == [
        {"net.0.weight", "net.0.bias"},
        {"net.3.weight", "net.3.bias"},
    ]


def test_two_callbacks_log_and_tell_apart(tmp_path, capsys):
    logger = CSVLogger(tmp_path, name="", version="")
    fit(tmp_path, Regression(), *pair(), logger=logger, max_steps=3)
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"effopd/factor", "effopd/head/factor", "effopd/num_tied", "effopd/head/num_tied"} <= set(header)
    told = [line for line in capsys.readouterr().out.splitlines() if "EffOPD" in line]
    head = [line for line in told if line.startswith("head: ")]
    assert [line.split(" (")[0].split(": ")[1] for line in head] == ["EffOPD step 1", "EffOPD step 2", "EffOPD"]
    assert [line[:14] for line in told if not line.startswith("head: ")] == ["EffOPD step 3:", "EffOPD: 1 sear"]


@pytest.mark.parametrize("name", [None, "head"])
def test_callbacks_that_cannot_be_told_apart_are_refused(tmp_path, name):
    twins = [EffOPD(held_out, parameters=layer, name=name) for layer in (r"net\.0", r"net\.3")]
    shared = "no name" if name is None else "the name 'head'"
    module = Regression()
    with pytest.raises(ValueError, match=f"callbacks: several EffOPD callbacks have {shared}, .* Give each a name"):
        fit(tmp_path, module, *twins)
    assert module.global_step == 0


def test_a_name_that_the_checkpoint_lacks_starts_the_count_with_a_warning(tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, filename="{step}", save_top_k=-1)
    fit(tmp_path, Regression(), saver, EffOPD(held_out), max_steps=4)
    named = EffOPD(held_out, name="head")
    with pytest.warns(UserWarning, match="the checkpoint was saved without an EffOPD named 'head'"):
        fit(tmp_path, Regression(), named, ckpt_path=tmp_path / "step=4.ckpt")
    assert named.last_search.step == 8


@pytest.mark.parametrize("device", ["cuda:300", "gpu", "meta", "cpu:1"])
def test_an_older_point_on_a_device_that_is_not_there_is_refused_before_training(tmp_path, device):
    module = Regression()
    with pytest.raises(
        ValueError, match=r"anchor_device: expected null .* a device of this machine \('cpu'.*got '" + device
    ):
        fit(tmp_path, module, EffOPD(held_out, anchor_device=device))
    assert module.global_step == 0
    fit(tmp_path, module, EffOPD(held_out, anchor_device="cpu"))


def test_an_optimiser_with_closures_is_searched_after_each_of_its_steps(tmp_path):
    class SecondOrder(Regression):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)

    effopd = EffOPD(held_out, candidates=(0.01,))
    steps = Steps(effopd)
    fit(tmp_path, SecondOrder(), effopd, steps)
    assert [report.step for report in steps.reports] == [1, 2, 4, 8]


def test_a_score_is_asked_once_whether_it_can_be_taken_before_anything_is_trained(tmp_path):
    asked = []

    class Checked(Score):
        def __call__(self, trainer, module):
            return 0.0

        def check(self, trainer, module):
            asked.append(module.global_step)
            raise ValueError("score: not here")

    with pytest.raises(ValueError, match="score: not here"):
        fit(tmp_path, Regression(), EffOPD(Checked(), schedule=[100]))
    assert asked == [0]


def test_adaptive_searches_without_success_become_rare(tmp_path):
    steps = []
    effopd = EffOPD(lambda module: steps.append(module.trainer.global_step) or -len(steps), schedule="adaptive")
    fit(tmp_path, Regression(), effopd)
    assert sorted(set(steps)) == [step for step in (1, 3, 7, 15, 31) if step <= NUM_BATCHES]


def test_a_checkpoint_of_the_same_step_holds_the_moved_weights(tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, filename="{step}", save_top_k=-1)
    module = Regression()
    fit(tmp_path, module, saver, EffOPD(rising(), schedule=[4]), max_steps=4)
    saved = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    assert same(saved["state_dict"], weights_of(module))
    assert same(saved["effopd"]["anchor"], weights_of(module))


def test_a_checkpoint_without_effopd_starts_the_count_with_a_warning(tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, filename="{step}", save_top_k=-1)
    fit(tmp_path, Regression(), saver, max_steps=4)
    effopd = EffOPD(held_out)
    steps = Steps(effopd)
    with pytest.warns(UserWarning, match="the checkpoint was saved without EffOPD"):
        fit(tmp_path, Regression(), effopd, steps, ckpt_path=tmp_path / "step=4.ckpt")
    assert steps.seen == [5, 6, 8, 12]
    assert [report.step for report in steps.reports] == [1, 2, 4, 8]


def test_a_checkpoint_of_an_earlier_version_goes_on(tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, filename="{step}", save_top_k=-1)
    fit(tmp_path, Regression(), saver, EffOPD(held_out), max_steps=4)
    checkpoint = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    ends = []
    for late_comers in ((), ("num_tied", "pause")):
        for name in late_comers:
            del checkpoint["effopd"][name]
        torch.save(checkpoint, tmp_path / "old.ckpt")
        module, effopd = Regression(), EffOPD(held_out)
        fit(tmp_path, module, effopd, ckpt_path=tmp_path / "old.ckpt")
        assert effopd.last_search.step == 8
        ends.append(weights_of(module))
    assert same(*ends)


def test_validating_a_checkpoint_does_not_touch_the_callback(tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, filename="{step}", save_top_k=-1)
    fit(tmp_path, WithValidation(), saver, EffOPD(held_out), max_steps=4)
    trainer = make_trainer(tmp_path, EffOPD(held_out))
    assert trainer.validate(WithValidation(), make_batches(2), ckpt_path=tmp_path / "step=4.ckpt")


def test_a_second_fit_goes_on_and_another_module_starts_anew(tmp_path):
    whole, twice = Regression(), Regression()
    fit(tmp_path, whole, EffOPD(held_out))
    effopd = EffOPD(held_out)
    steps = Steps(effopd)
    trainer = make_trainer(tmp_path, effopd, steps, max_steps=-1, max_epochs=1, limit_train_batches=6)
    optimizers = twice.configure_optimizers()
    twice.configure_optimizers = lambda: optimizers  # Lightning makes new ones at every fit
    stream = Stream()
    trainer.fit(twice, stream)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(twice, stream)
    assert steps.seen == [1, 2, 4, 8]
    assert same(weights_of(twice), weights_of(whole))

    trainer = make_trainer(tmp_path, effopd, steps)
    trainer.fit(Regression(), make_batches())
    assert steps.seen[4:] == [1, 2, 4, 8]


class TwoOptimisers(Regression):
    """Manual optimisation; the second optimiser steps twice per batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for optimizer in (first, second, second):
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[0].parameters(), lr=0.1), torch.optim.Adam(self.net[3].parameters())


@pytest.mark.parametrize(("index", "expected"), [(0, [1, 2, 4, 8]), (1, [2, 4, 8, 16])])
def test_manual_optimisation_counts_the_chosen_optimiser(tmp_path, index, expected):
    effopd = EffOPD(held_out, optimizer_index=index)
    steps = Steps(effopd)
    fit(tmp_path, TwoOptimisers(), effopd, steps, max_steps=-1, max_epochs=1)
    assert [report.step for report in steps.reports] == expected


def test_an_optimiser_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"optimizer_index: expected a number from 0 to 1.*got 2"):
        fit(tmp_path, TwoOptimisers(), EffOPD(held_out, optimizer_index=2))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)])
def test_scores_are_taken_in_the_precision_of_training(tmp_path, precision, dtype):
    seen = []

    class Watching(Regression):
        def training_step(self, batch, batch_idx):
            seen.append(("train", self.net(batch[0]).dtype))
            return super().training_step(batch, batch_idx)

    def score(module):
        batch = next(iter(make_batches(1, seed=9)))
        seen.append(("score", module.net(batch[0].to(dtype)).dtype))
        return -float(module.loss((batch[0].to(dtype), batch[1])))

    fit(tmp_path, Watching(dtype=dtype), EffOPD(score, schedule=4), max_steps=4, precision=precision)
    assert {dtype for _, dtype in seen} == {torch.bfloat16}
    assert {kind for kind, _ in seen} == {"train", "score"}


def test_only_the_chosen_weights_move_and_none_chosen_is_an_error(tmp_path):
    module, probe = Regression(rate=0.0), {}

    class Push(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            with torch.no_grad():
                for weight in pl_module.parameters():
                    weight += 1
            probe.update(weights_of(pl_module))

    fit(
        tmp_path,
        module,
        Push(),
        EffOPD(rising(), schedule=[1], parameters=r"net\.0", candidates=(2,)),
        max_steps=1,
    )
    for name, weight in module.named_parameters():
        torch.testing.assert_close(weight.detach(), probe[name] + (2 if "net.0" in name else 0), rtol=1e-6, atol=1e-5)
    message = "parameters: 'attn' matches none of the 4 trainable weights. Their names are: net.0.weight, net.0.bias"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, Regression(), EffOPD(held_out, parameters="attn"))


def test_every_edit_is_announced_to_the_module(tmp_path):
    module, versions = Regression(), []

    def score(module):
        versions.append(module.weight_version)
        return -len(versions)

    fit(tmp_path, module, EffOPD(score, schedule=[2, 4], candidates=(2, 4)), max_steps=4)
    assert versions == [0, 1, 2, 3]  # current, candidate; back to the start is version 2
    assert module.weight_version == 4


def test_searches_are_logged_told_and_summed_up(tmp_path, capsys):
    logger = CSVLogger(tmp_path, name="", version="")
    fit(tmp_path, Regression(), EffOPD(held_out), logger=logger, log_every_n_steps=50)
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    header, rows = rows[0], rows[1:]
    column = {name: [row[header.index(name)] for row in rows] for name in header}
    assert [step for step, factor in zip(column["step"], column["effopd/factor"], strict=True) if factor] == list(
        "1248"
    )
    for name in ("accepted", "num_candidates", "score_before", "score_after", "delta_norm", "seconds", "tokens"):
        assert all(float(value) >= 0 or "score" in name for value in column[f"effopd/{name}"] if value)
    assert [bool(value) for value in column["effopd/cosine"]][:4] == [False, True, True, True]
    assert float(column["effopd/num_searches"][-1]) == 4
    told = [line for line in capsys.readouterr().out.splitlines() if "EffOPD" in line]
    assert [line.split(":")[0] for line in told] == [*(f"EffOPD step {n}" for n in (1, 2, 4, 8)), "EffOPD"]
    assert told[-1].startswith("EffOPD: 4 searches, ")
    assert "% of wall-clock" in told[-1]


def test_scores_that_spend_tokens_say_so(tmp_path):
    class Spending(HeldOutLoss):
        tokens = 0

        def __call__(self, trainer, module):
            self.tokens += 7
            return super().__call__(trainer, module)

    effopd = EffOPD(Spending(make_batches(2, seed=9)), schedule=[2])
    fit(tmp_path, Regression(), effopd, max_steps=2)
    assert effopd.last_search.tokens == 7 * (1 + len(effopd.last_search.trials))


def test_it_helps_at_a_small_learning_rate(tmp_path):
    scores = []
    for callbacks in ([], [EffOPD(HeldOutLoss(make_batches(4, seed=9)))]):
        module = Regression(rate=1e-4)
        fit(tmp_path, module, *callbacks, max_steps=40, max_epochs=-1)
        module.eval()
        with torch.no_grad():
            scores.append(held_out(module))
    assert scores[1] > scores[0] + 0.1


def test_strategies_that_hold_other_copies_of_the_weights_are_refused():
    trainer = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(ValueError, match=r"strategy: EffOPD cannot edit weights under FSDPStrategy\. Use"):
        EffOPD(held_out).setup(trainer, Regression(), "fit")


def test_settings_are_checked_at_once():
    with pytest.raises(ValueError, match="score: expected a Score or a function of the module, got 3"):
        EffOPD(3)
    with pytest.raises(ValueError, match="candidates: expected positive"):
        EffOPD(held_out, candidates=[4, 2])
    with pytest.raises(ValueError, match="schedule: expected"):
        EffOPD(held_out, schedule="sometimes")
    for name in ("", "a/b"):
        with pytest.raises(ValueError, match=f"name: expected a word without slashes, or null, got '{name}'"):
            EffOPD(held_out, name=name)
