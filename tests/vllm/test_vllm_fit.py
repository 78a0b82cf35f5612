"""Whole training runs that generate with a real vLLM: on-policy after every step and EffOPD move, resumed exactly."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

pytest.importorskip("vllm")
from conftest import VOCAB_SIZE
from engine_pair import ENGINE_ARGS, GREEDY
from make_tiny_models import make_folder, make_prompts
from toys import make_data, make_module, make_trainer, weights_of

from opd_lightning import EffOPD
from opd_lightning.backends.hf import HFEngine, LoraSettings
from opd_lightning.backends.vllm.colocated import VLLMColocatedEngine
from opd_lightning.backends.vllm.placement import environment
from opd_lightning.interfaces import Sampling
from opd_lightning.rollouts.one_step_ahead import OneStepAhead
from opd_lightning.training.checkpoints import export

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    student = make_folder(tmp_path_factory.mktemp("student"), seed=1, tied=True)
    return student, make_folder(tmp_path_factory.mktemp("teacher"), seed=2, hidden_size=96)


class Notes(Callback):
    def __init__(self):
        self.mismatch, self.rollouts, self.versions = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.mismatch.append(float(trainer.callback_metrics["train/rollout_mismatch_max"]))
        self.rollouts.append([rollout.response_ids.tolist() for rollout in batch.rollouts])
        self.versions.append(batch.weight_version)


def fit(folders, folder, max_steps, *, ckpt_path=None, callbacks=(), lora=None, ahead=False):
    notes = Notes()
    module = make_module(
        *folders,
        student_options={"lora": lora},
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-3),
    )
    engine_args = {"enforce_eager": True, "kv_cache_memory_bytes": 2**28, "block_size": 32}
    engine = VLLMColocatedEngine(engine_args, own_process=ahead)
    sampling = Sampling(max_new_tokens=12, temperature=1.0)
    data = make_data(engine=engine, sampling=sampling, source=OneStepAhead() if ahead else None)
    checkpoints = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    options = {"enable_checkpointing": True, "callbacks": [notes, checkpoints, *callbacks]}
    trainer = make_trainer(folder, max_steps, **options)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, notes


def test_every_step_is_on_policy_and_a_resumed_run_equals_the_whole_one(folders, tmp_path):
    whole, notes = fit(folders, tmp_path / "whole", 4)
    assert len(notes.mismatch) == 4 and max(notes.mismatch) < 1e-4
    assert notes.versions == [0, 1, 2, 3]
    assert len({str(rollouts) for rollouts in notes.rollouts}) == 4
    resumed, later = fit(folders, tmp_path / "resumed", 4, ckpt_path=tmp_path / "whole" / "step=2.ckpt")
    assert later.rollouts == notes.rollouts[2:]
    for name, weight in weights_of(resumed).items():
        assert torch.equal(weight, weights_of(whole)[name]), name


def test_rollouts_after_an_effopd_move_come_from_the_moved_weights(folders, tmp_path):
    effopd = EffOPD(score=lambda module: float(module.weight_version), schedule=[2])
    _, notes = fit(folders, tmp_path, 4, callbacks=[effopd])
    assert effopd.last_search.accepted
    assert notes.versions[2] > notes.versions[1] + 1  # candidates were tried in between
    assert max(notes.mismatch) < 1e-4


def test_a_run_that_generates_one_step_ahead_is_resumed_exactly(folders, tmp_path):
    whole, notes = fit(folders, tmp_path / "whole", 4, ahead=True)
    assert notes.versions == [0, 0, 1, 2]
    assert notes.mismatch[0] < 1e-4 < min(notes.mismatch[1:])  # the difference of one step, and no more
    resumed, later = fit(folders, tmp_path / "resumed", 4, ckpt_path=tmp_path / "whole" / "step=2.ckpt", ahead=True)
    assert later.rollouts == notes.rollouts[2:]
    for name, weight in weights_of(resumed).items():
        assert torch.equal(weight, weights_of(whole)[name]), name


def test_an_exported_folder_loads_in_vllm_and_says_what_the_student_says(folders, tmp_path):
    from vllm import LLM, SamplingParams, TokensPrompt

    module, _ = fit(folders, tmp_path, 2, lora=LoraSettings(r=4, target_modules="all-linear"))
    export(tmp_path / "step=2.ckpt", tmp_path / "exported")
    prompts = make_prompts(module.spec)
    local = HFEngine()
    local.setup(module.spec, torch.device("cpu"))
    local.sync(module.student, 0)
    expected = [rollout.response_ids.tolist() for rollout in local.generate(prompts, GREEDY)]
    with environment({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}):
        llm = LLM(str(tmp_path / "exported"), dtype="float32", max_model_len=256, **ENGINE_ARGS)
    tokens = list(range(VOCAB_SIZE))  # an export keeps the head's padding rows, as its base has them
    params = SamplingParams(temperature=0.0, max_tokens=GREEDY.max_new_tokens, allowed_token_ids=tokens)
    questions = [TokensPrompt(prompt_token_ids=list(prompt.token_ids)) for prompt in prompts for _ in prompt.seeds]
    outputs = llm.generate(questions, params, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected
