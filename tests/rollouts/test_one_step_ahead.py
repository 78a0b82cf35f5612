"""Generation one step ahead: whose weights, whose prompts, and what is left of it in a checkpoint."""

import copy
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from toys import CopyEngine, LetterTask, adamw, make_data, make_module, make_trainer, weights_of

from opd_lightning.backends.hf import HFEngine
from opd_lightning.backends.vllm.colocated import VLLMColocatedEngine
from opd_lightning.callbacks.effopd import EffOPD
from opd_lightning.callbacks.effopd_scores import TeacherKL
from opd_lightning.callbacks.rescue import RescueCheckpoint
from opd_lightning.interfaces import Problem, Rollout, Sampling, WeightsLost
from opd_lightning.objectives import SampledTokenObjective, Truncated
from opd_lightning.rollouts.batching import collate
from opd_lightning.rollouts.on_policy import OnPolicy
from opd_lightning.rollouts.one_step_ahead import OneStepAhead
from opd_lightning.rollouts.records import from_record, to_record
from opd_lightning.selection import DifficultyPool, Shuffled


class ToldEngine(CopyEngine):
    """Finishes what it generates in the background when it is told to; whoever touches it before is caught."""

    def __init__(self):
        super().__init__()
        self.is_told, self.finished, self.seconds = threading.Event(), threading.Semaphore(0), []
        self._lock = threading.Lock()

    @contextmanager
    def alone(self):
        assert self._lock.acquire(blocking=False), "somebody uses the engine while it generates"
        try:
            yield
        finally:
            self._lock.release()

    def generate(self, prompts, sampling, on_rollout=None):
        with self.alone():
            started = time.perf_counter()
            if threading.current_thread() is threading.main_thread():
                return super().generate(prompts, sampling, on_rollout)
            assert self.is_told.wait(100), "nobody told it to"
            self.is_told.clear()
            self.seconds.append(time.perf_counter() - started)
            rollouts = super().generate(prompts, sampling, on_rollout)
            self.finished.release()
            return rollouts

    def sync(self, model, weight_version):
        with self.alone():
            super().sync(model, weight_version)

    def invalidate(self):
        with self.alone():
            super().invalidate()


class Late(OneStepAhead):
    """Rollouts are complete when somebody waits for them, and no earlier."""

    def wait(self):
        self.engine.is_told.set()
        super().wait()
        self.engine.is_told.clear()


class Recorder(Callback):
    def __init__(self):
        self.batches, self.weights, self.metrics = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch)
        self.weights.append(weights_of(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.metrics.append(dict(trainer.callback_metrics))


@pytest.fixture
def folders(tiny_qwen3_folder, tiny_teacher_folder):
    return tiny_qwen3_folder, tiny_teacher_folder


def make_run(folders, *, engine=None, source=None, selector=Shuffled, task=None, **options):
    module = make_module(*folders, optimizer=adamw, **options)
    engine = engine if engine is not None else CopyEngine()
    source = source if source is not None else OneStepAhead()
    return module, make_data(engine=engine, source=source, selector=selector(), task=task or LetterTask())


def fit(tmp_path, run, steps, *, callbacks=(), ckpt_path=None, **options):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, steps, callbacks=[*callbacks, recorder], **options)
    trainer.fit(*run, ckpt_path=ckpt_path)
    return recorder, trainer


def log_probs_under(module, weights, rollouts):
    student = copy.deepcopy(module.student)
    student.load_state_dict(weights, strict=False)
    batch = collate(rollouts, module.spec.tokenizer.pad_id)
    with torch.no_grad():
        logits = module.spec.head(student)(module.spec.hidden_states(student, batch))
    tokens = batch.tokens
    return logits.log_softmax(-1).gather(-1, tokens.ids[:, None]).squeeze(-1), tokens.rollout_log_probs


def assert_same_weights(module, other):
    for name, weight in weights_of(module).items():
        assert torch.equal(weight, weights_of(other)[name]), name


def test_rollouts_come_from_the_weights_one_step_before(tmp_path, folders):
    module, data = make_run(folders)
    recorder, _ = fit(tmp_path, (module, data), 4)
    assert [batch.weight_version for batch in recorder.batches] == [0, 0, 1, 2]
    assert [metrics["train/staleness"] for metrics in recorder.metrics] == [0, 1, 1, 1]
    for step, batch in enumerate(recorder.batches):
        actual, claimed = log_probs_under(module, recorder.weights[max(0, step - 1)], batch.rollouts)
        torch.testing.assert_close(actual, claimed, rtol=1e-4, atol=1e-4)


def test_prompts_and_seeds_are_those_of_an_on_policy_run(tmp_path, folders):
    ahead, _ = fit(tmp_path, make_run(folders), 4)
    module = make_module(*folders, optimizer=adamw)
    on_policy, _ = fit(tmp_path, (module, make_data(engine=CopyEngine())), 4)
    for batch, other in zip(ahead.batches, on_policy.batches, strict=True):
        assert [(r.problem.uid, r.seed) for r in batch.rollouts] == [(r.problem.uid, r.seed) for r in other.rollouts]
    assert all(metrics["train/staleness"] == 0 for metrics in on_policy.metrics)


def test_a_slow_engine_changes_nothing_but_the_waiting(tmp_path, folders):
    engine = ToldEngine()
    quick, slow = make_run(folders), make_run(folders, engine=engine, source=Late())
    fit(tmp_path, quick, 4)
    recorder, _ = fit(tmp_path, slow, 4)
    assert_same_weights(quick[0], slow[0])
    assert recorder.metrics[-1]["train/seconds/generate"] >= engine.seconds[2] > 0
    assert recorder.metrics[-1]["train/seconds/wait"] < recorder.metrics[-1]["train/seconds/generate"]


def test_generation_goes_on_while_the_step_trains(tmp_path, folders):
    engine = ToldEngine()

    class Meanwhile(Callback):
        num_seen = 0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            assert len(engine.seconds) == batch.step
            engine.is_told.set()
            assert engine.finished.acquire(timeout=100)  # the next step's rollouts, before this one has trained
            self.num_seen += len(engine.seconds) == batch.step + 1

    meanwhile = Meanwhile()
    recorder, _ = fit(tmp_path, make_run(folders, engine=engine), 3, callbacks=[meanwhile])
    assert meanwhile.num_seen == 3
    assert all("train/seconds/wait" in metrics for metrics in recorder.metrics[1:])


@pytest.mark.parametrize("selector", [pytest.param(Shuffled, marks=pytest.mark.slow), DifficultyPool])
@pytest.mark.parametrize("stop", [1, 3, pytest.param(4, marks=pytest.mark.slow)])  # a pass is 3 steps
def test_stop_and_resume_equals_one_run(tmp_path, folders, selector, stop):
    whole = make_run(folders, selector=selector)
    expected, _ = fit(tmp_path, whole, 6)
    first = make_run(folders, selector=selector)
    _, trainer = fit(tmp_path, first, stop)
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    second = make_run(folders, selector=selector)
    recorder, _ = fit(tmp_path, second, 6, ckpt_path=tmp_path / "stop.ckpt")
    assert_same_weights(second[0], whole[0])
    for batch, other in zip(recorder.batches, expected.batches[stop:], strict=True):
        assert (batch.step, batch.weight_version, batch.staleness) == (other.step, other.weight_version, 1)
        for rollout, same in zip(batch.rollouts, other.rollouts, strict=True):
            assert torch.equal(rollout.log_probs, same.log_probs)
            assert torch.equal(rollout.prompt_ids, same.prompt_ids)
            assert (rollout.text, rollout.finished, rollout.reward) == (same.text, same.finished, same.reward)


def test_a_step_that_asks_the_same_twice_is_resumed(tmp_path, folders):
    def ask_again():
        return make_run(folders, task=LetterTask(num_train=1))

    whole = ask_again()
    fit(tmp_path, whole, 3)
    _, trainer = fit(tmp_path, ask_again(), 1)
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    resumed = ask_again()
    recorder, _ = fit(tmp_path, resumed, 3, ckpt_path=tmp_path / "stop.ckpt")
    assert [batch.staleness for batch in recorder.batches] == [1, 1]
    assert_same_weights(resumed[0], whole[0])


def test_a_rollout_of_several_turns_survives_a_checkpoint(tmp_path):
    problem = Problem("p", ({"role": "user", "content": "?"},), "a")
    wrote = torch.tensor([True, False, True])
    rollout = Rollout(
        problem, torch.tensor([9, 8]), torch.tensor([4, 5, 3]), torch.tensor([-1.0, torch.nan, -2.0]), True, 7, "ab",
        student_wrote=wrote,
    )  # fmt: skip
    torch.save(to_record(rollout), tmp_path / "record.pt")
    back = from_record(torch.load(tmp_path / "record.pt", weights_only=True), problem)
    assert (back.problem, back.finished, back.seed, back.text) == (problem, True, 7, "ab")
    assert back.trained_positions.tolist() == [0, 2] and back.prompt_ids.dtype == back.response_ids.dtype == torch.int64
    torch.testing.assert_close(back.log_probs, rollout.log_probs, rtol=0, atol=0, equal_nan=True)


class Break(Callback):
    """Raises in the middle of a step."""

    def __init__(self, at_step):
        self.at_step = at_step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch.step == self.at_step:
            raise RuntimeError("the teacher's server is gone")


@pytest.mark.slow
@pytest.mark.parametrize("at_steps", [(2,), (2, 2), (2, 3)])
def test_a_step_that_failed_is_rescued_with_its_rollouts(tmp_path, folders, at_steps):
    whole = make_run(folders)
    fit(tmp_path, whole, 5)
    checkpoint = None
    for i, at_step in enumerate(at_steps):
        callbacks = [Break(at_step), RescueCheckpoint(f"rescue{i}")]
        with pytest.raises(RuntimeError, match="server is gone"):
            fit(tmp_path, make_run(folders), 5, callbacks=callbacks, ckpt_path=checkpoint)
        checkpoint = next(tmp_path.rglob(f"rescue{i}.ckpt"))
    resumed = make_run(folders)
    recorder, _ = fit(tmp_path, resumed, 5, ckpt_path=checkpoint)
    assert_same_weights(resumed[0], whole[0])
    assert all(batch.staleness == 1 for batch in recorder.batches)


@pytest.mark.slow
def test_a_resumed_run_that_stops_before_its_first_step_keeps_the_rollouts(tmp_path, folders):
    class BreakAtStart(Callback):
        def on_train_start(self, trainer, pl_module):
            raise RuntimeError("no disk")

    whole = make_run(folders)
    fit(tmp_path, whole, 3)
    _, trainer = fit(tmp_path, make_run(folders), 2)
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    with pytest.raises(RuntimeError, match="no disk"):
        callbacks = [BreakAtStart(), RescueCheckpoint()]
        fit(tmp_path, make_run(folders), 3, callbacks=callbacks, ckpt_path=tmp_path / "stop.ckpt")
    resumed = make_run(folders)
    recorder, _ = fit(tmp_path, resumed, 3, ckpt_path=next(tmp_path.rglob("rescue.ckpt")))
    assert [batch.staleness for batch in recorder.batches] == [1]
    assert_same_weights(resumed[0], whole[0])


def test_a_generation_that_fails_stops_the_run_at_the_step_that_needs_it(tmp_path, folders):
    engine = CopyEngine()
    engine.failures = [None, None, ConnectionError("no answer from http://localhost:1")]
    recorder = Recorder()
    trainer = make_trainer(tmp_path, 5, callbacks=[RescueCheckpoint(), recorder])
    with (
        pytest.raises(ConnectionError, match="no answer from"),
        pytest.warns(
            UserWarning, match=r"were not generated \(no answer from .*\), so they are not in this checkpoint"
        ),
    ):
        trainer.fit(*make_run(folders, engine=engine))
    assert len(recorder.batches) == 2
    resumed = make_run(folders)
    recorder, _ = fit(tmp_path, resumed, 5, ckpt_path=next(tmp_path.rglob("rescue.ckpt")))
    assert [batch.staleness for batch in recorder.batches] == [0, 1, 1]  # its rollouts are nowhere: generated anew
    assert [batch.weight_version for batch in recorder.batches] == [2, 2, 3]


def test_rollouts_of_an_engine_that_lost_its_weights_are_generated_anew(tmp_path, folders):
    engine = CopyEngine()
    engine.failures = [None, WeightsLost("engine: http://localhost:1 was restarted."), None]
    with pytest.warns(UserWarning, match=r"was restarted\. This step's rollouts are generated anew, on-policy"):
        recorder, _ = fit(tmp_path, make_run(folders, engine=engine), 3)
    assert [batch.staleness for batch in recorder.batches] == [0, 0, 1]
    assert [batch.weight_version for batch in recorder.batches] == [0, 1, 1]


@pytest.mark.slow
def test_a_step_that_was_generated_anew_is_rescued_with_its_rollouts(tmp_path, folders):
    def lossy():
        engine = CopyEngine()
        engine.failures = [None, WeightsLost("engine: restarted."), None]
        return make_run(folders, engine=engine)

    whole = lossy()
    fit(tmp_path, whole, 4)
    with pytest.raises(RuntimeError, match="server is gone"):
        fit(tmp_path, lossy(), 4, callbacks=[Break(1), RescueCheckpoint()])
    resumed = make_run(folders)
    recorder, _ = fit(tmp_path, resumed, 4, ckpt_path=next(tmp_path.rglob("rescue.ckpt")))
    assert [batch.staleness for batch in recorder.batches] == [0, 1, 1]
    assert_same_weights(resumed[0], whole[0])


def test_a_checkpoint_without_the_next_rollouts_says_so(tmp_path, folders):
    engine = CopyEngine()
    engine.failures = [None, ConnectionError("no answer")]
    _, trainer = fit(tmp_path, make_run(folders, engine=engine), 1)
    with pytest.warns(UserWarning, match=r"next step were not generated \(no answer\), so they are not in this check"):
        trainer.save_checkpoint(tmp_path / "without.ckpt")


def test_rollouts_for_another_question_are_not_taken_from_a_checkpoint(tmp_path, folders):
    _, trainer = fit(tmp_path, make_run(folders), 1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    module = make_module(*folders, optimizer=adamw)
    data = make_data(engine=CopyEngine(), source=OneStepAhead(), sampling=Sampling(max_new_tokens=5))
    with pytest.warns(UserWarning, match=r"for other prompts or another data\.sampling.* generated anew, on-policy"):
        recorder, _ = fit(tmp_path, (module, data), 3, ckpt_path=tmp_path / "first.ckpt")
    assert [batch.staleness for batch in recorder.batches] == [0, 1]


def test_a_failed_step_is_done_again_by_the_same_objects(tmp_path, folders):
    expected, _ = fit(tmp_path, make_run(folders), 3)
    module, data = make_run(folders)
    broken, recorder = Break(2), Recorder()
    trainer = make_trainer(tmp_path, 4, callbacks=[broken, recorder])
    with pytest.raises(RuntimeError, match="server is gone"):
        trainer.fit(module, data)
    broken.at_step = None
    trainer.fit(module, data)  # with a new optimiser: that is Lightning's
    assert [batch.step for batch in recorder.batches] == [0, 1, 2, 3]
    assert [batch.staleness for batch in recorder.batches] == [0, 1, 1, 1]
    for rollout, same in zip(recorder.batches[2].rollouts, expected.batches[2].rollouts, strict=True):
        assert torch.equal(rollout.log_probs, same.log_probs)


def test_after_an_error_nothing_keeps_the_process_alive(tmp_path, folders):
    class Closing(ToldEngine):
        interrupted = closed = False

        def interrupt(self):
            self.interrupted = True
            self.is_told.set()

        def close(self):
            assert self.interrupted
            with self.alone():
                self.closed = True

    class Tell(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            engine.is_told.set()

    engine = Closing()
    with pytest.raises(RuntimeError, match="server is gone"):
        fit(tmp_path, make_run(folders, engine=engine), 4, callbacks=[Break(1), Tell()])
    assert engine.closed and len(engine.seconds) == 2  # the second was under way


@pytest.mark.parametrize("drop", [False, True])
def test_an_engine_with_a_shorter_context_is_asked_at_the_start(tmp_path, folders, drop):
    class Short(CopyEngine):
        context_length = 36

    module = make_module(*folders, optimizer=adamw)
    data = make_data(engine=Short(), drop_long_prompts=drop)
    if drop:
        with pytest.warns(UserWarning, match="prompts are longer than 28 tokens"):
            recorder, _ = fit(tmp_path, (module, data), 1)
        assert all(len(rollout.prompt_ids) <= 28 for rollout in recorder.batches[0].rollouts)
    else:
        with pytest.raises(ValueError, match=r"longer than 28 tokens .*the context is 36 tokens"):
            fit(tmp_path, (module, data), 1)


def test_a_context_that_a_server_tells_later_is_checked_before_step_1(tmp_path, folders):
    class Late(CopyEngine):
        context_length = None

        def setup(self, student, device):
            super().setup(student, device)
            self.context_length = 24

    module = make_module(*folders, optimizer=adamw)
    with pytest.raises(ValueError, match=r"data\.engine: it takes at most 24 tokens, .* --max-model-len 41 or more"):
        fit(tmp_path, (module, make_data(engine=Late())), 1)


def test_validations_and_searches_wait_for_it_and_see_the_current_weights(tmp_path, folders):
    engine = ToldEngine()
    effopd = EffOPD(TeacherKL(4), schedule=2, candidates=(1.0, 2.0))
    module, data = make_run(folders, engine=engine, source=Late())
    validating = {"limit_val_batches": 1.0, "val_check_interval": 2, "check_val_every_n_epoch": None}
    recorder, trainer = fit(tmp_path, (module, data), 4, callbacks=[effopd], **validating)
    assert [batch.staleness for batch in recorder.batches] == [0, 1, 1, 1]
    for step, batch in enumerate(recorder.batches):
        actual, claimed = log_probs_under(module, recorder.weights[max(0, step - 1)], batch.rollouts)
        torch.testing.assert_close(actual, claimed, rtol=1e-4, atol=1e-4)
    assert trainer.callback_metrics["val/num_problems"] == 6
    assert engine.versions == sorted(engine.versions) and engine.versions[-1] == module.weight_version
    assert len(engine.seconds) == 4  # one under way in each of the four steps


def test_a_second_fit_starts_from_the_start(tmp_path, folders):
    module, data = make_run(folders)
    fit(tmp_path, (module, data), 2)
    recorder, _ = fit(tmp_path, (make_run(folders)[0], data), 2)
    assert [batch.staleness for batch in recorder.batches] == [0, 1]


def test_a_checkpoint_of_the_other_kind_is_refused(tmp_path, folders):
    _, trainer = fit(tmp_path, make_run(folders), 1)
    trainer.save_checkpoint(tmp_path / "ahead.ckpt")
    module = make_module(*folders, optimizer=adamw)
    with pytest.raises(ValueError, match=r"data\.source: the checkpoint was written with OneStepAhead"):
        fit(tmp_path, (module, make_data(engine=CopyEngine())), 2, ckpt_path=tmp_path / "ahead.ckpt")


@pytest.mark.parametrize("engine", [HFEngine(), VLLMColocatedEngine()])
def test_an_engine_that_shares_the_students_weights_is_refused(engine):
    message = r"data\.source: OneStepAhead .* this \w+Engine shares weights .* Use VLLMServerEngine"
    with pytest.raises(ValueError, match=message):
        OneStepAhead().setup(engine)


def test_that_is_noticed_before_the_student_is_loaded(tmp_path, folders):
    module, data = make_run(folders, engine=HFEngine())
    with pytest.raises(ValueError, match=r"data\.source: OneStepAhead needs an engine apart from the training"):
        fit(tmp_path, (module, data), 1)
    assert module.student is None


@pytest.mark.parametrize("engine", [VLLMColocatedEngine(own_process=True), VLLMColocatedEngine(devices=[1])])
def test_an_engine_in_a_process_of_its_own_is_taken(engine):
    source = OneStepAhead()
    source.setup(engine)
    assert source.engine is engine and source.staleness == 1 and OnPolicy().staleness == 0


def test_an_objective_that_does_not_correct_for_it_is_warned_about(tmp_path, folders):
    objective = SampledTokenObjective(importance=None)
    with pytest.warns(UserWarning, match=r"data\.source: OneStepAhead: .* Set objective\.importance, .*Truncated"):
        fit(tmp_path, make_run(folders, objective=objective), 1)


def test_the_importance_ratio_is_that_of_the_older_weights(tmp_path, folders):
    """One SGD step on stale rollouts equals the reference with explicit ratios."""
    objective = SampledTokenObjective(importance=Truncated(cap=1e6))
    module = make_module(*folders, objective=objective, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    data = make_data(engine=CopyEngine(), source=OneStepAhead(), sampling=Sampling(max_new_tokens=8))
    recorder, _ = fit(tmp_path, (module, data), 2)
    before, batch = recorder.weights[1], collate(recorder.batches[1].rollouts, module.spec.tokenizer.pad_id)
    after = weights_of(module)
    reference = copy.deepcopy(module)
    reference.student.load_state_dict(before, strict=False)
    spec, student = module.spec, reference.student.double()
    teacher = type(spec)(str(folders[1])).load().double().requires_grad_(False)
    ids = batch.tokens.ids[:, None]
    log_p = spec.head(student)(spec.hidden_states(student, batch)).log_softmax(-1).gather(-1, ids).squeeze(-1)
    with torch.no_grad():
        log_q = spec.head(teacher)(spec.hidden_states(teacher, batch)).log_softmax(-1).gather(-1, ids).squeeze(-1)
        ratio = (log_p - batch.tokens.rollout_log_probs).exp()
    assert (ratio - 1).abs().max() > 0.01
    loss = -(ratio * (log_q - log_p.detach()) * log_p).sum() / batch.num_tokens
    loss.backward()
    for name, parameter in student.named_parameters():
        expected = before[name] - parameter.grad.float()
        torch.testing.assert_close(after[name], expected, rtol=1e-3, atol=1e-4, msg=name)
