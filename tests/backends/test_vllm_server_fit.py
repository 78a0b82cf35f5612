"""A whole training run on fake servers: rollouts, scores, and what is left when a server dies."""

import pytest
import torch
from conftest import make_model, make_tokenizer, save_folder
from fake_vllm_server import FakeVLLM, serve
from lightning.pytorch.callbacks import Callback
from toys import make_data, make_module, make_trainer, weights_of

from opd_lightning.backends.vllm.server import Connection, ServerUnreachable, VLLMServerEngine, VLLMServerTeacher
from opd_lightning.callbacks.rescue import RescueCheckpoint
from opd_lightning.interfaces import Sampling
from opd_lightning.objectives import Objective


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [
        save_folder(tmp_path_factory.mktemp(name), make_model(seed=seed), make_tokenizer())
        for name, seed in (("student", 1), ("teacher", 2))
    ]


def make_run(folders, urls, generate_ahead=False, **connection):
    engine = VLLMServerEngine(Connection([urls[0]], **connection))
    teacher = VLLMServerTeacher(Connection([urls[1]], **connection), max_top_k=0)
    module = make_module(
        *folders,
        teacher_object=teacher,
        objective=Objective(support="sampled_token", estimator="score_function"),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )
    return module, make_data(engine=engine, sampling=Sampling(max_new_tokens=6), generate_ahead=generate_ahead)


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


@pytest.mark.parametrize("generate_ahead", [False, True])
def test_the_teacher_is_asked_as_rollouts_come_and_nothing_twice(folders, tmp_path, generate_ahead):
    student, teacher = map(FakeVLLM, folders)

    class Count(Callback):
        asked = ()

        def on_train_start(self, trainer, pl_module):
            teacher.requests.clear()

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.asked += (len(teacher.requests),)

    with serve(student) as student_url, serve(teacher) as teacher_url:
        module, data = make_run(folders, (student_url, teacher_url), generate_ahead, patience=5.0)
        count, watch = Count(), Watch()
        make_trainer(tmp_path, 3, callbacks=[count, watch]).fit(module, data)
        asked = [tuple(body["prompt"]) for _, body in teacher.requests if body]  # a request called off may have none
    assert count.asked[0] > 0  # before the first step began to train
    assert len(set(asked)) == len(asked)
    most = 8 * (4 if generate_ahead else 3)  # of the step after the last some may be called off at the end
    assert 8 * 3 <= len(asked) <= most
    if not generate_ahead:
        assert max(watch.mismatch) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("role", "generate_ahead"), [("engine", False), ("teacher", False), ("teacher", True)])
def test_a_dead_server_leaves_a_checkpoint_and_one_error_that_names_it(folders, tmp_path, role, generate_ahead):
    fakes = dict(zip(("engine", "teacher"), map(FakeVLLM, folders), strict=True))
    dying = fakes[role]
    with serve(fakes["engine"]) as student_url, serve(fakes["teacher"]) as teacher_url:
        urls = (student_url, teacher_url)
        module, data = make_run(folders, urls, generate_ahead, patience=0.5)
        watch = Watch(2, lambda: dying.failures.extend([0] * 1000))
        trainer = make_trainer(tmp_path, 4, callbacks=[watch, RescueCheckpoint()])
        url = urls[role == "teacher"]
        with pytest.raises(ServerUnreachable, match=rf"{role}: no answer for 0\.5 s from {url}"):
            trainer.fit(module, data)
        dying.failures.clear()
        resumed, data = make_run(folders, urls, generate_ahead, patience=5.0)
        checkpoint = next(tmp_path.rglob("rescue.ckpt"))
        watch = Watch()
        make_trainer(tmp_path, 4, callbacks=[watch]).fit(resumed, data, ckpt_path=checkpoint)
        assert resumed.weight_version == 4 and (generate_ahead or max(watch.mismatch) < 1e-4)
        whole, data = make_run(folders, urls, generate_ahead, patience=5.0)
        make_trainer(tmp_path, 4).fit(whole, data)
    for name, weight in weights_of(whole).items():
        torch.testing.assert_close(weights_of(resumed)[name], weight, rtol=0, atol=1e-5, msg=name)
