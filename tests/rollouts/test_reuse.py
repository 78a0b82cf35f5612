"""Rollouts used several times: which mini-batch when, how stale, what is kept, what a checkpoint holds of it."""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from toys import adamw, make_data, make_module, make_trainer, weights_of

from opd_lightning.backends.hf import HFTeacher
from opd_lightning.callbacks.effopd import EffOPD
from opd_lightning.callbacks.effopd_scores import TeacherKLOnNewRollouts
from opd_lightning.extrapolation.optimizer import EffOPDOptimizer
from opd_lightning.interfaces import Score
from opd_lightning.objectives import Clipped, SampledTokenObjective, Truncated
from opd_lightning.rollouts.reuse import Reuse, shuffled
from opd_lightning.selection import DifficultyPool, Shuffled
from opd_lightning.teachers import MovingAverageTeacher, PrivilegedTeacher


class Recorder(Callback):
    def __init__(self):
        self.batches, self.metrics, self.outputs = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.outputs.append(outputs)


@pytest.fixture
def folders(tiny_qwen3_folder, tiny_teacher_folder):
    return tiny_qwen3_folder, tiny_teacher_folder


def fit(tmp_path, folders, steps, *, source=None, data=None, callbacks=(), ckpt_path=None, save=None, **options):
    recorder = Recorder()
    module = make_module(*folders, **({"optimizer": adamw} | options))
    data = make_data(source=source, **(data or {}))
    trainer = make_trainer(tmp_path, steps, callbacks=[*callbacks, recorder])
    trainer.fit(module, data, ckpt_path=ckpt_path)
    if save is not None:
        trainer.save_checkpoint(save)
    return module, recorder


def assert_same(run, other, start=0):
    """The same weights at the end, and the same batches and metrics from a step on."""
    for name, weight in weights_of(run[0]).items():
        assert torch.equal(weight, weights_of(other[0])[name]), name
    expected = [batch.rollouts for batch in other[1].batches[start:]]
    assert seeds_of(run[1]) == [[rollout.seed for rollout in rollouts] for rollouts in expected]
    for metrics, same in zip(run[1].metrics, other[1].metrics[start:], strict=True):
        assert untimed(metrics) == untimed(same)


def untimed(metrics):
    return {name: value for name, value in metrics.items() if "second" not in name and value == value}


def seeds_of(recorder):
    return [[rollout.seed for rollout in batch.rollouts] for batch in recorder.batches]


def column(recorder, name):
    return [metrics[f"train/{name}"] for metrics in recorder.metrics]


def test_a_round_is_generated_once_and_trained_in_every_pass(tmp_path, folders):
    _, notes = fit(tmp_path, folders, 7, source=Reuse(mini_batches=2, passes=3))
    assert column(notes, "round") == [0, 0, 0, 0, 0, 0, 1]
    assert column(notes, "pass") == [0, 0, 1, 1, 2, 2, 0]
    assert column(notes, "staleness") == [0, 1, 2, 3, 4, 5, 0]
    assert [batch.weight_version for batch in notes.batches] == [0] * 6 + [6]
    assert notes.metrics[0]["train/rollout_kl"] < 1e-6 < notes.metrics[5]["train/rollout_kl"]
    assert [value > 0 for value in column(notes, "seconds/generate")] == [True] + [False] * 5 + [True]
    seeds = seeds_of(notes)
    for first in (0, 2, 4):
        assert sorted(seeds[first] + seeds[first + 1]) == sorted(seeds[0] + seeds[1])
    assert len(set(seeds[0] + seeds[1])) == 16 and not set(seeds[6]) & set(seeds[0] + seeds[1])


@pytest.mark.parametrize("objective", [None, SampledTokenObjective()], ids=["divergence", "sampled"])
def test_a_round_of_one_step_is_on_policy_distillation(tmp_path, folders, objective):
    """Bit for bit; only the numbers that speak of rounds are more."""
    reuse = fit(tmp_path, folders, 3, source=Reuse(1, 1), objective=objective)
    plain = fit(tmp_path, folders, 3, objective=objective)
    for metrics in reuse[1].metrics:
        assert metrics.pop("train/kept_score_bytes") == 0
        del metrics["train/round"], metrics["train/pass"]
    assert_same(reuse, plain)


def test_one_pass_in_parts_is_several_updates_of_one_generation(tmp_path, folders):
    """What `updates_per_batch` did: one generation, cut in two, an optimiser step on each half."""
    objective = SampledTokenObjective(importance=Clipped())
    parts, notes = fit(tmp_path, folders, 2, source=Reuse(mini_batches=2, passes=1), objective=objective)

    class TwoSteps(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            whole = batch.rollouts
            batch.rollouts = whole[8:]
            assert seeds_of(notes) == [[r.seed for r in whole[:8]], [r.seed for r in whole[8:]]]
            pl_module.accumulate_gradients(pl_module.make_micro_batches(whole[:8]), pl_module.teacher)
            pl_module.update_weights()
            batch.staleness = 1

    class Clocked(Callback):
        def on_train_start(self, trainer, pl_module):
            from opd_lightning.training.stopwatch import Stopwatch

            pl_module.stopwatch = Stopwatch(pl_module.device, is_exact=False)

    double = {"prompts_per_step": 8}
    module, _ = fit(tmp_path, folders, 1, data=double, objective=objective, callbacks=[Clocked(), TwoSteps()])
    for name, weight in weights_of(module).items():
        assert torch.equal(weight, weights_of(parts)[name]), name


@pytest.mark.parametrize(
    ("stop", "selector"),  # a round is 6 steps, a pass over the problems 3
    [
        (5, DifficultyPool),
        pytest.param(3, Shuffled, marks=pytest.mark.slow),
        pytest.param(6, Shuffled, marks=pytest.mark.slow),
    ],
)
def test_stopped_in_a_round_and_resumed_equals_one_run(tmp_path, folders, selector, stop):
    source = {"mini_batches": 2, "passes": 3}
    whole = fit(tmp_path, folders, 8, source=Reuse(**source), data={"selector": selector()})
    path = tmp_path / "stop.ckpt"
    fit(tmp_path, folders, stop, source=Reuse(**source), data={"selector": selector()}, save=path)
    resumed = fit(tmp_path, folders, 8, source=Reuse(**source), data={"selector": selector()}, ckpt_path=path)
    assert_same(resumed, whole, stop)
    assert torch.load(path, weights_only=True)["OPDDataModule"]["source"].keys() == {"history"} | (
        {"round"} if stop < 6 else set()
    )


@pytest.mark.slow
def test_a_checkpoint_of_a_run_that_was_just_resumed_is_the_same(tmp_path, folders):
    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    fit(tmp_path, folders, 2, source=Reuse(2, 2), save=first)
    fit(tmp_path, folders, 2, source=Reuse(2, 2), ckpt_path=first, save=second)
    states = [torch.load(path, weights_only=True)["OPDDataModule"]["source"] for path in (first, second)]
    assert repr(states[0]) == repr(states[1])


def test_a_step_that_fails_in_a_round_is_done_again(tmp_path, folders):
    whole = fit(tmp_path, folders, 5, source=Reuse(2, 2))

    class Fails(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch.step == 3:
                raise KeyboardInterrupt

        def on_exception(self, trainer, pl_module, exception):
            trainer.save_checkpoint(tmp_path / "failed.ckpt")

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, folders, 5, source=Reuse(2, 2), callbacks=[Fails()])
    resumed = fit(tmp_path, folders, 5, source=Reuse(2, 2), ckpt_path=tmp_path / "failed.ckpt")
    assert_same(resumed, whole, 3)


# ------------------------------------------------------------------------------------------------- the checked distance


def lengths(recorder):
    """Steps of each round."""
    rounds = column(recorder, "round")
    return [rounds.count(index) for index in sorted(set(rounds))]


def test_a_round_ends_when_its_rollouts_are_too_far_from_the_weights(tmp_path, folders):
    _, notes = fit(tmp_path, folders, 5, source=Reuse(2, 3, max_kl=1e-4))
    assert lengths(notes) == [2, 2, 1]
    assert [output["ends_round"] for output in notes.outputs] == [False, True, False, True, False]
    assert column(notes, "rollout_kl")[1] > 1e-4


@pytest.mark.parametrize(("max_kl", "expected"), [(1e-4, [1, 2, 1, 2, 1]), (1e9, [1, 2, 3, 1])])
def test_passes_adapt_to_the_radius(tmp_path, folders, max_kl, expected):
    _, notes = fit(tmp_path, folders, 7, source=Reuse(1, "adaptive", max_passes=3, max_kl=max_kl), optimizer=jump)
    assert lengths(notes) == expected  # the first step of a round is on-policy, so that one pass is never too far


def jump(parameters):
    return torch.optim.AdamW(parameters, lr=0.1)


def distance(module):
    return sum(float((w - START[id(module)][name]).square().sum()) for name, w in module.student.named_parameters())


START = {}


class Start(Callback):
    def on_fit_start(self, trainer, pl_module):
        START[id(pl_module)] = weights_of(pl_module)


@pytest.mark.parametrize(("sign", "expected"), [(1, [2, 4, 1]), (-1, [2, 2, 2, 1])], ids=["forward", "back"])
def test_a_search_at_the_end_of_each_round_says_how_long_the_next_may_be(tmp_path, folders, sign, expected):
    effopd = EffOPD(lambda m: sign * distance(m), schedule="rounds", candidates=[0.5], backward=[-0.5])
    _, notes = fit(tmp_path, folders, 7, source=Reuse(2, "adaptive"), callbacks=[Start(), effopd])
    assert lengths(notes) == expected
    assert effopd.last_search.step == 6 and (effopd.last_search.best.factor > 0) == (sign > 0)


def test_a_search_that_goes_back_ends_the_round(tmp_path, folders):
    effopd = EffOPD(lambda m: -distance(m), schedule=[1], backward=[-0.5])
    _, notes = fit(tmp_path, folders, 3, source=Reuse(2, 2), callbacks=[Start(), effopd])
    assert lengths(notes) == [1, 2]


@pytest.mark.slow
def test_searched_adapted_and_resumed_equals_one_run(tmp_path, folders):
    def parts():
        score = TeacherKLOnNewRollouts(num_prompts=4)
        return {
            "callbacks": [EffOPD(score, schedule="rounds", candidates=[1, 2], backward=[-0.5])],
            "source": Reuse(2, "adaptive", max_kl=5.0),
        }

    whole = fit(tmp_path, folders, 8, **parts())
    fit(tmp_path, folders, 5, save=tmp_path / "stop.ckpt", **parts())
    assert_same(fit(tmp_path, folders, 8, ckpt_path=tmp_path / "stop.ckpt", **parts()), whole, 5)


def test_candidates_are_scored_on_answers_that_are_generated_once(tmp_path, folders):
    teacher, score = Asked(folders[1]), TeacherKLOnNewRollouts(num_prompts=4)
    values = []

    class Noted(Score):
        tokens = property(lambda self: score.tokens)

        def begin(self, trainer, module):
            score.begin(trainer, module)

        def __call__(self, trainer, module):
            values.append((score.tokens, sum(teacher.num_scored), score(trainer, module)))
            return -len(values)

    effopd = EffOPD(Noted(), schedule="rounds", candidates=[1], backward=[-1])
    fit(tmp_path, folders, 2, source=Reuse(1, 1), teacher_object=teacher, callbacks=[effopd])
    assert len(values) == 6  # two searches: where they stand, forward, back
    (_, before, start), (tokens, asked, forward), (_, _, back) = values[:3]
    assert tokens > 0 and asked == before + 4  # the teacher scores four answers, once
    assert [after[:2] for after in values[1:3]] == [(tokens, asked)] * 2
    assert len({start, forward, back}) == 3
    assert values[4][0] > tokens and effopd.last_search.tokens == values[4][0] - tokens


def test_who_does_not_say_when_a_round_ends_is_refused(tmp_path, folders):
    with pytest.raises(ValueError, match=r"schedule: an optimiser does not know when a round ends"):
        EffOPDOptimizer(adamw([torch.zeros(1, requires_grad=True)]), lambda: 0.0, schedule="rounds")

    class Silent(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            step = pl_module.training_step
            pl_module.training_step = lambda *arguments: {"other": step(*arguments)}

    with pytest.raises(
        ValueError, match=r"schedule: 'rounds' needs a training_step that returns .*; this one's says nothing"
    ):
        fit(tmp_path, folders, 1, callbacks=[EffOPD(lambda m: 0.0, schedule="rounds"), Silent()])


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ({"max_kl": 1.0}, {"top_k_metrics": 0}, r"data\.source\.max_kl: .* which model\.top_k_metrics: 0 leaves out"),
        ({"passes": "adaptive"}, {}, r"data\.source\.passes: 'adaptive' would only ever double.*EffOPD"),
    ],
)
def test_a_distance_that_nobody_checks_is_refused(tmp_path, folders, source, options, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, folders, 1, source=Reuse(2, **({"passes": 2} | source)), **options)


@pytest.mark.parametrize("size", [1, 4])
def test_every_place_of_a_mini_batch_is_shuffled_on_its_own(size):
    order = shuffled(8, size, (0, 3, 1))
    assert sorted(position for part in order for position in part) == list(range(8 * size))
    assert all(position % size == place for part in order for place, position in enumerate(part))
    assert order == shuffled(8, size, (0, 3, 1)) != shuffled(8, size, (0, 3, 2))
    assert shuffled(2, 3, None) == [[0, 1, 2], [3, 4, 5]]


def test_an_estimator_without_a_ratio_is_refused(tmp_path, folders):
    with pytest.raises(ValueError, match=r"data\.source: Reuse: some rollouts .* Set objective\.importance"):
        fit(tmp_path, folders, 1, source=Reuse(2, 2), objective=SampledTokenObjective(importance=None))


def test_later_mini_batches_see_a_ratio(tmp_path, folders):
    plain, notes = fit(tmp_path, folders, 4, source=Reuse(2, 2), objective=SampledTokenObjective())
    free, _ = fit(tmp_path, folders, 4, source=Reuse(2, 2), objective=SampledTokenObjective(importance=Truncated(1.0)))
    assert any(not torch.equal(weight, weights_of(free)[name]) for name, weight in weights_of(plain).items())
    assert notes.metrics[-1]["train/rollout_mismatch"] > 1e-3


# ------------------------------------------------------------------------------------------------------- teacher scores


class Asked(HFTeacher):
    """Counts the rollouts that it scores; may keep its scores to itself."""

    def __init__(self, path, keeps=True):
        super().__init__(str(path), dtype="float32")
        self.keeps, self.num_scored = keeps, []

    def score(self, batch, request):
        self.num_scored.append(len(batch.rollouts))
        scores = super().score(batch, request)
        if not self.keeps:
            scores.columns = lambda: None
        return scores


@pytest.mark.slow
def test_scores_are_kept_between_passes_and_are_those_of_asking_again(tmp_path, folders):
    kept, asked = (Asked(folders[1], keeps=keeps) for keeps in (True, False))
    options = {"max_tokens_per_micro_batch": 64, "source": Reuse(2, 2)}
    options["optimizer"] = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # does not blow rounding up
    once, notes = fit(tmp_path, folders, 4, teacher_object=kept, **options)
    options["source"] = Reuse(2, 2)
    with pytest.warns(
        UserWarning, match=r"model\.teacher: the scores of Asked cannot be kept, so the teacher is asked again"
    ):
        again, _ = fit(tmp_path, folders, 4, teacher_object=asked, **options)
    assert sum(kept.num_scored) == 16 and sum(asked.num_scored[1:]) == 32  # it is asked once whether they can be kept
    for name, weight in weights_of(once).items():  # another cut rounds otherwise
        torch.testing.assert_close(weight, weights_of(again)[name], rtol=1e-4, atol=1e-4, msg=name)
    num_tokens = sum(len(rollout.response_ids) for batch in notes.batches[:2] for rollout in batch.rollouts)
    assert notes.metrics[-1]["train/kept_score_bytes"] == num_tokens * (48 * 4 + 8)  # hidden states and token ids


def test_in_one_cut_the_kept_scores_are_the_same_to_the_last_bit(tmp_path, folders):
    once, _ = fit(tmp_path, folders, 3, teacher_object=Asked(folders[1]), source=Reuse(1, 3))
    with pytest.warns(UserWarning, match="cannot be kept"):
        again, _ = fit(tmp_path, folders, 3, teacher_object=Asked(folders[1], keeps=False), source=Reuse(1, 3))
    for name, weight in weights_of(once).items():
        assert torch.equal(weight, weights_of(again)[name]), name


class Told(PrivilegedTeacher):
    """Reads how many answers there are to a prompt; remembers whose numbers it was not told."""

    def __init__(self, teacher):
        super().__init__(teacher, "{question}{number}", missing="plain")
        self.plain = []

    def shape(self, groups):
        return [[replace(each, context={"number": str(len(group))}) for each in group] for group in groups]

    def score_all(self, batches, request):
        self.plain += [rollout for batch in batches for rollout in batch.rollouts if not rollout.context]
        return super().score_all(batches, request)


def test_a_teacher_that_sees_groups_sees_those_of_the_round_and_one_that_moves_is_asked_each_time(tmp_path, folders):
    told, moving = Told(HFTeacher(str(folders[1]))), Told(MovingAverageTeacher())
    _, notes = fit(tmp_path, folders, 2, teacher_object=told, source=Reuse(1, 2))
    assert not told.plain and notes.metrics[-1]["train/kept_score_bytes"] > 0
    _, notes = fit(tmp_path, folders, 2, teacher_object=moving, source=Reuse(1, 2))
    assert not moving.plain and "train/kept_score_bytes" not in notes.metrics[-1]


def test_scores_beyond_the_bound_are_not_kept(tmp_path, folders):
    teacher = Asked(folders[1])
    with pytest.warns(
        UserWarning, match=r"data\.source\.max_score_gb=1e-05: .* take about .* GB, so the teacher is asked again"
    ):
        _, notes = fit(tmp_path, folders, 5, teacher_object=teacher, source=Reuse(2, 2, max_score_gb=1e-5))
    assert notes.metrics[-1]["train/kept_score_bytes"] == 0
    assert sum(teacher.num_scored) >= 5 * 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mini_batches": 0}, r"data\.source\.mini_batches"),
        ({"passes": 0}, r"data\.source\.passes"),
        ({"max_passes": 0}, r"data\.source\.max_passes"),
        ({"max_kl": 0.0}, r"data\.source\.max_kl: expected a positive number of nats per token, or null, got 0\.0"),
        ({"max_score_gb": -1}, r"data\.source\.max_score_gb: expected a number of gigabytes of at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Reuse(**options)
