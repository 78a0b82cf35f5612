"""Base models: without a stop token, without a chat template."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from conftest import make_model, make_tokenizer, save_folder
from toys import LetterTask, adamw, make_data, make_module, make_trainer

from opd_lightning.interfaces import Sampling
from opd_lightning.training.checkpoints import export


@pytest.fixture
def pair(tmp_path):
    def make(**options):
        eos = {"eos_token_id": None} if "eos_token" in options else {}
        return [
            save_folder(
                tmp_path / name,
                make_model(seed=seed, **eos),
                make_tokenizer(**options),
                eos_token_id=[] if eos else None,
            )
            for seed, name in enumerate(("student", "teacher"))
        ]

    return make


class Raw(LetterTask):
    def problems(self, split):
        return [
            replace(problem, messages=({"role": "raw", "content": problem.messages[0]["content"]},))
            for problem in super().problems(split)
        ]


def test_a_model_without_a_stop_token_trains_validates_and_is_exported(tmp_path, pair):
    folders = pair(eos_token=None, pad_token=None)
    module, data = make_module(*folders, optimizer=adamw), make_data(sampling=Sampling(max_new_tokens=8, stop_ids=[]))
    trainer = make_trainer(tmp_path, 2, limit_val_batches=1.0)
    trainer.fit(module, data)
    assert {len(rollout.response_ids) for rollout in module.last_rollouts} == {8}
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    export(str(tmp_path / "x.ckpt"), str(tmp_path / "out"))
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings.get("eos_token_id") is None


def test_a_model_without_a_stop_token_must_be_told_what_ends_a_response(tmp_path, pair):
    with pytest.raises(
        ValueError, match=r"sampling\.stop_ids: the student's tokenizer names no token .* or \[\] to let"
    ):
        make_trainer(tmp_path, 1).fit(make_module(*pair(eos_token=None)), make_data())


def test_a_model_without_a_template_trains_on_raw_prompts(tmp_path, pair):
    module = make_module(*pair(chat_template=None), optimizer=adamw)
    make_trainer(tmp_path, 2, limit_val_batches=1.0).fit(module, make_data(task=Raw()))
    rollout = module.last_rollouts[0]
    assert module.spec.tokenizer.decode(rollout.prompt_ids.tolist()) == rollout.problem.messages[0]["content"]


def test_chat_messages_without_a_template_are_refused_before_training(tmp_path, pair):
    with pytest.raises(ValueError, match=r"student\.chat_template: the tokenizer has no chat template.*role 'raw'"):
        make_trainer(tmp_path, 1).fit(make_module(*pair(chat_template=None)), make_data())
