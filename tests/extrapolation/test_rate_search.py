"""A run whose rate was found goes on as one that was started with it."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from opd_lightning import EffOPDOptimizer
from opd_lightning.extrapolation import RateSearch
from opd_lightning.training.schedules import WarmupDecay

OPTIMIZERS = {
    "sgd": lambda groups, rate: torch.optim.SGD(groups, lr=rate, momentum=0.9, weight_decay=0.1),
    "adamw": lambda groups, rate: torch.optim.AdamW(groups, lr=rate, weight_decay=0.1),
    "adagrad": lambda groups, rate: torch.optim.Adagrad(groups, lr=rate),
}
SCHEDULERS = {
    "constant": lambda optimizer: None,
    "warm-up": lambda optimizer: WarmupDecay(optimizer, 3, "cosine", 9),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=10, cycle_momentum=False
    ),
}


class Run:
    """A small regression in float64 whose batches are a function of the step."""

    def __init__(self, rate, optimizer="adamw", scheduler="constant"):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(64, 5, generator=generator, dtype=torch.float64)
        self.y = torch.sin(self.x.sum(1, keepdim=True))
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        groups = [{"params": self.model[0].parameters()}, {"params": self.model[2].parameters(), "lr": 2 * rate}]
        self.optimizer = OPTIMIZERS[optimizer](groups, rate)
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)
        self.step = 0

    @property
    def schedulers(self):
        return [] if self.scheduler is None else [self.scheduler]

    def loss(self, rows=slice(None)):
        return nn.functional.mse_loss(self.model(self.x[rows]), self.y[rows])

    def score(self):
        with torch.no_grad():
            return -float(self.loss())

    def train_step(self, search=None):
        self.optimizer.zero_grad()
        self.loss(slice(4 * self.step, 4 * self.step + 16)).backward()
        if search is not None:
            search.before_step()
        self.optimizer.step()
        if search is not None:
            search.count_step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.step += 1
        return search.search(self.score, self.schedulers) if search is not None and search.is_due else None

    def rates(self):
        return [group["lr"] for group in self.optimizer.param_groups]

    def weights(self):
        return [weight.detach().clone() for weight in self.model.parameters()]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("start", [1e-6, 1.0])
def test_the_run_goes_on_as_if_started_with_the_rate_found(optimizer, scheduler, start):
    run = Run(start, optimizer, scheduler)
    search = RateSearch(run.optimizer)
    report = run.train_step(search)
    assert report.accepted and report.is_final
    assert report.old_rate == pytest.approx(start)
    fresh = Run(report.new_rate, optimizer, scheduler)
    fresh.train_step()
    for _ in range(5):
        assert run.rates() == pytest.approx(fresh.rates(), rel=1e-12)
        for found, started in zip(run.weights(), fresh.weights(), strict=True):
            torch.testing.assert_close(found, started, rtol=1e-6, atol=1e-8)
        assert run.train_step(search) is None
        fresh.train_step()


def test_the_start_hardly_matters():
    found = [Run(start) for start in (1e-6, 1e-4, 1e-2, 1.0)]
    rates = [run.train_step(RateSearch(run.optimizer)).new_rate for run in found]
    assert max(rates) < 1.6 * min(rates)


def test_it_reports_what_it_did():
    run = Run(1e-5)
    report = run.train_step(RateSearch(run.optimizer))
    assert "learning rate 1e-05 -> " in str(report) and "\n" not in str(report)
    metrics = report.metrics()
    assert metrics["learning_rate_search/learning_rate"] == pytest.approx(run.rates()[0])
    assert metrics["learning_rate_search/factor"] == pytest.approx(run.rates()[0] / 1e-5)
    assert metrics["learning_rate_search/num_scores"] == 1 + len(report.found.trials)
    assert metrics["learning_rate_search/score_after"] == pytest.approx(run.score())


def test_where_nothing_is_better_nothing_changes_and_it_looks_again_at_powers_of_two():
    run, plain = Run(1e-3, scheduler="warm-up"), Run(1e-3, scheduler="warm-up")
    search = RateSearch(run.optimizer)
    reports = []
    run.score = lambda: 0.0
    for _ in range(9):
        reports.append(run.train_step(search))
        plain.train_step()
        assert all(torch.equal(a, b) for a, b in zip(run.weights(), plain.weights(), strict=True))
        assert run.rates() == plain.rates()
    assert [report.step for report in reports if report is not None] == [1, 2, 4, 8]
    assert "stays 0.001" in str(reports[0]) and "will look again" in str(reports[0])
    assert not reports[0].accepted and reports[0].metrics()["learning_rate_search/factor"] == 1.0


def test_a_score_that_raises_leaves_weights_and_rates_as_they_were():
    run, plain = Run(1e-3), Run(1e-3)
    calls = []

    def score():
        calls.append(None)
        if len(calls) == 3:
            raise RuntimeError("no")
        return 0.0

    run.score = score
    with pytest.raises(RuntimeError, match="no"):
        run.train_step(RateSearch(run.optimizer))
    plain.train_step()
    assert all(torch.equal(a, b) for a, b in zip(run.weights(), plain.weights(), strict=True))
    assert run.rates() == plain.rates()


def test_a_step_of_nothing_is_not_searched_but_the_next_power_of_two_is():
    run = Run(1e-3)
    run.scheduler = lr_scheduler.LambdaLR(run.optimizer, lambda step: min(1.0, step / 4))  # begins at 0
    search = RateSearch(run.optimizer)
    assert run.train_step(search) is None
    report = run.train_step(search)
    assert report.step == 2 and report.accepted
    assert report.old_rate == pytest.approx(1e-3)
    assert run.scheduler.base_lrs == pytest.approx([report.new_rate, 2 * report.new_rate])


def test_a_first_group_that_stands_still_does_not_end_the_search():
    run = Run(1e-4)
    run.optimizer.param_groups[0]["lr"] = 0.0
    report = run.train_step(RateSearch(run.optimizer))
    assert report.accepted and report.old_rate == 2e-4
    assert run.rates() == [0.0, report.new_rate]


def test_its_state_is_plain_numbers_and_goes_on():
    run = Run(1e-3)
    search = RateSearch(run.optimizer)
    run.train_step(search)
    state = copy.deepcopy(search.state_dict())
    assert all(isinstance(value, int) for value in state.values())
    again = RateSearch(run.optimizer)
    again.load_state_dict(state)
    assert not again.will_search and again.num_steps == 1


def test_attached_it_searches_inside_the_step_and_before_effopd():
    run = Run(1e-6, scheduler="warm-up")
    effopd = EffOPDOptimizer(run.optimizer, run.score, module=run.model)
    search = RateSearch(effopd.optimizer)
    search.attach(run.score, run.schedulers, module=run.model)
    for _ in range(3):
        effopd.zero_grad()
        run.loss(slice(0, 16)).backward()
        effopd.step()
        run.scheduler.step()
        if search.num_steps == 1:
            share = effopd.last_search.delta_norm
    assert search.last_search.is_final and search.last_search.step == 1
    assert run.rates()[0] == pytest.approx(search.last_search.new_rate)
    same = Run(search.last_search.new_rate, scheduler="warm-up")
    before = same.weights()
    same.train_step()
    moved = sum(float((new - old).square().sum()) for new, old in zip(same.weights(), before, strict=True)) ** 0.5
    assert share == pytest.approx(moved, rel=1e-6)
