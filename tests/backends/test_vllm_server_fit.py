"""A whole training run on fake servers: rollouts, scores, and what is left when a server dies."""

import re
import threading

import pytest
import torch
from conftest import make_model, make_tokenizer, save_folder
from fake_vllm_server import FakeVLLM, serve
from lightning.pytorch.callbacks import Callback
from toys import CopyEngine, make_data, make_module, make_trainer, weights_of

from opd_lightning.backends.vllm.server import Connection, ServerUnreachable, VLLMServerEngine, VLLMServerTeacher
from opd_lightning.callbacks.rescue import RescueCheckpoint
from opd_lightning.interfaces import Sampling
from opd_lightning.objectives import SampledTokenObjective
from opd_lightning.rollouts.one_step_ahead import OneStepAhead

SAMPLING = Sampling(max_new_tokens=6)
BEHIND_A_CUT = Sampling(max_new_tokens=6, top_p=0.9)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [
        save_folder(tmp_path_factory.mktemp(name), make_model(seed=seed), make_tokenizer())
        for name, seed in (("student", 1), ("teacher", 2))
    ]


def make_run(folders, urls, ahead=False, *, objective=None, sampling=SAMPLING, **connection):
    engine = VLLMServerEngine(Connection([urls[0]], **connection))
    teacher = VLLMServerTeacher(Connection([urls[1]], **connection), max_top_k=0)
    module = make_module(
        *folders,
        teacher_object=teacher,
        objective=objective or SampledTokenObjective(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )
    return module, make_data(engine=engine, sampling=sampling, source=OneStepAhead() if ahead else None)


class Watch(Callback):
    def __init__(self, at_step=None, do=None):
        self.at_step, self.do, self.mismatch = at_step, do, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.mismatch.append(float(trainer.callback_metrics["train/rollout_mismatch_max"]))
        if trainer.global_step == self.at_step:
            self.do()


def test_every_step_is_on_policy(folders, tmp_path):
    watch = Watch()
    with serve(FakeVLLM(folders[0])) as student_url, serve(FakeVLLM(folders[1])) as teacher_url:
        module, data = make_run(folders, (student_url, teacher_url), patience=5.0)
        make_trainer(tmp_path, 3, callbacks=[watch]).fit(module, data)
    assert len(watch.mismatch) == 3 and max(watch.mismatch) < 1e-4
    assert module.weight_version == 3


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [False, True])
def test_the_teacher_is_asked_as_rollouts_come_and_nothing_twice(folders, tmp_path, ahead):
    student, teacher = map(FakeVLLM, folders)

    class Count(Callback):
        asked = ()

        def on_train_start(self, trainer, pl_module):
            teacher.requests.clear()

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.asked += (len(teacher.requests),)

    with serve(student) as student_url, serve(teacher) as teacher_url:
        module, data = make_run(folders, (student_url, teacher_url), ahead, patience=5.0)
        count, watch = Count(), Watch()
        make_trainer(tmp_path, 3, callbacks=[count, watch]).fit(module, data)
        asked = [tuple(body["prompt"]) for _, body in teacher.requests if body]  # a request called off may have none
    assert count.asked[0] > 0  # before the first step began to train
    assert len(set(asked)) == len(asked)
    most = 8 * (4 if ahead else 3)  # of the step after the last some may be called off at the end
    assert 8 * 3 <= len(asked) <= most
    if not ahead:
        assert max(watch.mismatch) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("role", "ahead"), [("engine", False), ("teacher", False), ("teacher", True)])
def test_a_dead_server_leaves_a_checkpoint_and_one_error_that_names_it(folders, tmp_path, role, ahead):
    fakes = dict(zip(("engine", "teacher"), map(FakeVLLM, folders), strict=True))
    dying = fakes[role]
    with serve(fakes["engine"]) as student_url, serve(fakes["teacher"]) as teacher_url:
        urls = (student_url, teacher_url)
        module, data = make_run(folders, urls, ahead, patience=0.5)
        watch = Watch(2, lambda: dying.failures.extend([0] * 1000))
        trainer = make_trainer(tmp_path, 4, callbacks=[watch, RescueCheckpoint()])
        url = urls[role == "teacher"]
        with pytest.raises(ServerUnreachable, match=rf"{role}: no answer for 0\.5 s from {url}"):
            trainer.fit(module, data)
        dying.failures.clear()
        resumed, data = make_run(folders, urls, ahead, patience=5.0)
        checkpoint = next(tmp_path.rglob("rescue.ckpt"))
        watch = Watch()
        make_trainer(tmp_path, 4, callbacks=[watch]).fit(resumed, data, ckpt_path=checkpoint)
        assert resumed.weight_version == 4 and (ahead or max(watch.mismatch) < 1e-4)
        whole, data = make_run(folders, urls, ahead, patience=5.0)
        make_trainer(tmp_path, 4).fit(whole, data)
    for name, weight in weights_of(whole).items():
        torch.testing.assert_close(weights_of(resumed)[name], weight, rtol=0, atol=1e-5, msg=name)


def test_an_objective_that_needs_unknown_log_probs_is_refused_before_anything_is_loaded(folders, tmp_path):
    with serve(FakeVLLM(folders[0])) as student_url, serve(FakeVLLM(folders[1])) as teacher_url:
        objective = SampledTokenObjective(allow_biased_sampling=True)
        run = make_run(folders, (student_url, teacher_url), objective=objective, sampling=BEHIND_A_CUT)
        message = r"model\.objective: SampledTokenObjective needs .* OnPolicy with VLLMServerEngine .*importance: null"
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, 1).fit(*run)
    assert run[0].student is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:sampling.top_p=0.9")
def test_without_them_other_objectives_train_and_what_is_unknown_is_not_logged(folders, tmp_path):
    logged = []

    class Note(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert all(rollout.log_probs.isnan().all() for rollout in batch.rollouts)
            logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    with serve(FakeVLLM(folders[0])) as student_url, serve(FakeVLLM(folders[1])) as teacher_url:
        objective = SampledTokenObjective(importance=None, allow_biased_sampling=True)
        run = make_run(folders, (student_url, teacher_url), objective=objective, sampling=BEHIND_A_CUT)
        make_trainer(tmp_path, 2, callbacks=[Note()]).fit(*run)
    assert run[0].weight_version == len(logged) == 2
    for metrics in logged:
        assert not [name for name, value in metrics.items() if value != value]  # NaN
        assert "train/sampled_log_ratio" in metrics
        assert not [name for name in metrics if name.startswith(("train/rollout_mismatch", "train/rollout_kl"))]


@pytest.mark.parametrize(("role", "subject"), [("engine", "the context is 30 tokens"), ("teacher", "model.teacher")])
def test_a_short_context_ends_the_run_before_any_weight_is_loaded(folders, tmp_path, role, subject):
    engine, teacher = (FakeVLLM(folder, max_model_len=128) for folder in folders)
    fake = {"engine": engine, "teacher": teacher}[role]
    with serve(engine) as student_url, serve(teacher) as teacher_url:
        fake.max_model_len = 30
        module, data = make_run(folders, (student_url, teacher_url))
        with pytest.raises(ValueError, match=subject) as refusal:
            make_trainer(tmp_path, 1).fit(module, data)
        assert module.student is None and "/update_weights" not in [path for path, _ in engine.requests]
        if role == "engine":
            return
        assert "model.teacher: it reads at most 29 tokens" in str(refusal.value)
        (advice,) = re.findall(r"--max-model-len (\d+) or more", str(refusal.value))
        fake.max_model_len = int(advice)
        module, data = make_run(folders, (student_url, teacher_url))
        make_trainer(tmp_path, 1).fit(module, data)
        assert module.weight_version == 1


def test_a_generation_under_way_may_outlive_the_teacher(folders, tmp_path):
    class Late(CopyEngine):
        """In the background it generates when the run has failed, and tells the teacher of it."""

        has_failed = threading.Event()
        told = 0

        def interrupt(self):
            self.has_failed.set()

        def generate(self, prompts, sampling, on_rollout=None):
            is_ahead = threading.current_thread() is not threading.main_thread()
            assert not is_ahead or self.has_failed.wait(100)
            rollouts = super().generate(prompts, sampling, on_rollout)
            self.told += is_ahead and len(rollouts)
            return rollouts

    def fail():
        teacher.requests.clear()
        raise RuntimeError("the disk is full")

    teacher, engine = FakeVLLM(folders[1]), Late()
    with serve(FakeVLLM(folders[0])) as student_url, serve(teacher) as teacher_url:
        module, _ = make_run(folders, (student_url, teacher_url))
        data = make_data(engine=engine, source=OneStepAhead())
        with pytest.raises(RuntimeError, match="the disk is full"):
            make_trainer(tmp_path, 3, callbacks=[Watch(1, fail)]).fit(module, data)
    assert engine.told == 8 and teacher.requests == []
