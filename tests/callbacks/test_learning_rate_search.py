"""The callback in real fits: which rate it finds, what it leaves alone, what a resumed run does."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn

from opd_lightning import EffOPD, HeldOutLoss, LearningRateLineSearch
from opd_lightning.interfaces import Score
from opd_lightning.training.schedules import WarmupDecay

NUM_STEPS = 8


class Batches:
    """Goes on, after a resume, where the saved run stopped."""

    def __init__(self, num=2 * NUM_STEPS):
        x = torch.randn(num, 16, 6, generator=torch.Generator().manual_seed(0))
        self.batches, self.position = [(part, part.sum(1, keepdim=True).tanh()) for part in x], 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Regression(LightningModule):
    def __init__(self, rate, schedule=False, num_optimizers=1):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        self.rate, self.schedule, self.num_optimizers, self.num_moves = rate, schedule, num_optimizers, 0
        self.automatic_optimization = num_optimizers == 1

    def on_weights_moved(self):
        self.num_moves += 1

    def loss(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()
        return None

    def configure_optimizers(self):
        if self.num_optimizers == 2:
            return [torch.optim.AdamW(self.net[i].parameters(), lr=self.rate) for i in (0, 2)]
        groups = [{"params": self.net[0].parameters()}, {"params": self.net[2].parameters(), "lr": 3 * self.rate}]
        optimizer = torch.optim.AdamW(groups, lr=self.rate)
        if not self.schedule:
            return optimizer
        scheduler = WarmupDecay(optimizer, 3, "linear", 10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def held_out():
    return HeldOutLoss(list(Batches(4)))


def fit(path, module, *callbacks, ckpt_path=None, **options):
    settings = {
        "accelerator": "cpu",
        "max_steps": NUM_STEPS,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(default_root_dir=path, callbacks=list(callbacks), **(settings | options))
    trainer.fit(module, Batches(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def rates(trainer):
    return [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]


def weights(module):
    return [weight.detach().clone() for weight in module.parameters()]


def test_every_start_leads_to_the_same_rate_and_the_run_is_one_started_with_it(tmp_path, capsys):
    found = {}
    for start in (1e-6, 1e-4, 1e-2, 1.0):
        search, module = LearningRateLineSearch(held_out()), Regression(start)
        trainer = fit(tmp_path, module, search)
        found[start] = rates(trainer)[0]
        assert search.last_search.is_final and search.last_search.step == 1
        assert rates(trainer)[1] == pytest.approx(3 * found[start])
        assert module.num_moves >= len(search.last_search.found.trials)
        printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Line search")]
        assert printed == [str(search.last_search)]
        fresh = Regression(found[start])
        fit(tmp_path, fresh)
        for one, other in zip(weights(module), weights(fresh), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=5e-3)
    assert max(found.values()) < 1.6 * min(found.values())


def test_a_schedule_is_scaled_as_a_whole_and_accumulation_waits_for_the_step(tmp_path):
    search, module = LearningRateLineSearch(held_out()), Regression(1e-5, schedule=True)
    monitor = LearningRateMonitor(logging_interval="step")
    trainer = fit(
        tmp_path,
        module,
        search,
        monitor,
        accumulate_grad_batches=2,
        logger=CSVLogger(tmp_path, flush_logs_every_n_steps=1),
        log_every_n_steps=1,
        max_steps=5,
    )
    fresh = Regression(search.last_search.new_rate, schedule=True)
    expected = rates(fit(tmp_path, fresh, accumulate_grad_batches=2, max_steps=5))
    assert rates(trainer) == pytest.approx(expected)
    for one, other in zip(weights(module), weights(fresh), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=5e-3)
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "learning_rate_search/learning_rate" in rows and "learning_rate_search/num_scores" in rows


@pytest.mark.parametrize("stop", [1, 3])
@pytest.mark.parametrize("score", ["finds", "never"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, stop, score):
    def make():
        return LearningRateLineSearch(held_out() if score == "finds" else lambda module: 0.0)

    whole, search = Regression(1e-5, schedule=True), make()
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = fit(tmp_path, whole, search, keep)
    again, later = Regression(1e-5, schedule=True), make()
    resumed = fit(tmp_path, again, later, ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert all(torch.equal(one, other) for one, other in zip(weights(whole), weights(again), strict=True))
    assert rates(trainer) == rates(resumed)
    assert (later.last_search is None) == (score == "finds")
    if score == "never":
        assert later.last_search.step == search.last_search.step == 8


def test_a_checkpoint_from_before_the_search_is_searched_at_its_next_step(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    fit(tmp_path, Regression(1e-6), keep)
    search = LearningRateLineSearch(held_out())
    trainer = fit(tmp_path, Regression(1e-6), search, ckpt_path=tmp_path / "step=2.ckpt")
    assert search.last_search.step == 1
    assert rates(trainer)[0] > 1e-4


def test_a_second_fit_searches_for_another_module_only(tmp_path):
    search = LearningRateLineSearch(held_out())
    trainer, module = fit(tmp_path, Regression(1e-5), search, max_steps=2), Regression(1e-5)
    found = search.last_search
    trainer.fit_loop.epoch_loop.max_steps = 3
    trainer.fit(trainer.lightning_module, Batches())
    assert search.last_search is found
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(module, Batches())
    assert search.last_search is not found


def test_each_optimiser_has_a_search_of_its_own(tmp_path):
    search = LearningRateLineSearch(held_out(), optimizer_index=1)
    first, second = rates(fit(tmp_path, Regression(1e-5, num_optimizers=2), search))
    assert first == 1e-5 and second > 1e-4
    both = [LearningRateLineSearch(held_out(), optimizer_index=i) for i in (0, 1)]
    assert min(rates(fit(tmp_path, Regression(1e-5, num_optimizers=2), *both))) > 1e-4


@pytest.mark.parametrize(
    ("callbacks", "options", "message"),
    [
        (lambda: [LearningRateLineSearch(held_out(), optimizer_index=1)], {}, r"optimizer_index.*from 0 to 0.*got 1"),
        (lambda: [EffOPD(held_out()), LearningRateLineSearch(held_out())], {}, "Put LearningRateLineSearch first"),
        (lambda: [LearningRateLineSearch(held_out()) for _ in range(2)], {}, "an optimizer_index of its own"),
        (lambda: [LearningRateLineSearch(HeldOutLoss([], loss="loss"))], {}, "at least one held-out batch"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(tmp_path, callbacks, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        fit(tmp_path, Regression(1e-4), *callbacks(), **options)
    assert "\n" not in str(caught.value)


def test_a_strategy_with_flat_copies_of_the_weights_is_refused():
    search = LearningRateLineSearch(held_out())
    with pytest.raises(ValueError, match=r"under FSDPStrategy. Use a single device, DDP, or FSDP2"):
        search.setup(SimpleNamespace(strategy=FSDPStrategy(), callbacks=[search]), None, "fit")


def test_a_score_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"LearningRateLineSearch\.score: expected a Score or a function"):
        LearningRateLineSearch("TeacherKL")


def test_the_score_hears_of_each_search_before_it_is_asked(tmp_path):
    heard = []

    class OnNewData(Score):
        def begin(self, trainer, module):
            heard.append("begin")

        def __call__(self, trainer, module):
            heard.append("score")
            return held_out()(trainer, module)

    fit(tmp_path, Regression(1e-4), LearningRateLineSearch(OnNewData()), max_steps=3)
    assert heard[0] == "begin" and heard.count("begin") == 1 and heard.count("score") >= 5
