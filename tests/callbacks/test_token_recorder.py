"""Records hold what float64 arithmetic gives, the same after a resume, and cost what they say."""

import math
from dataclasses import replace

import pyarrow.parquet
import pytest
import torch
from own_students import *  # noqa: F403
from toys import LetterTask, adamw, make_data, make_module, make_trainer, weights_of

from opd_lightning import SampledTokenObjective
from opd_lightning.callbacks.token_recorder import TokenRecorder
from opd_lightning.reports.token_records import VALUES, read_header, read_record, steps_of


def fit(folder, folders, steps=5, ckpt_path=None, recorder=None, data=None, save=None, **options):
    recorder = recorder or TokenRecorder(every_n_steps=2, num_rollouts=3, num_fixed=2, top_k=4)
    module = make_module(*folders, **({"optimizer": adamw} | options))
    trainer = make_trainer(folder, steps, callbacks=[recorder])
    trainer.fit(module, data or make_data(rollouts_per_prompt=2), ckpt_path=ckpt_path)
    if save:
        trainer.save_checkpoint(save)
    return module, recorder


@pytest.fixture(scope="module")
def folders(tiny_qwen3_folder, tiny_teacher_folder):
    return tiny_qwen3_folder, tiny_teacher_folder


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    module, recorder = fit(folder, folders)
    return folder / "tokens", module, recorder


def log_probs(path, row):
    """Float64, of the model as it is on the disk, at every token of the answer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    ids = torch.tensor([row["prompt_ids"] + row["token_ids"]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1]
    return logits


def test_steps_and_kinds(whole):
    folder, _, recorder = whole
    assert list(steps_of(folder)) == [0, 2, 4, 5] == recorder.recorded
    kinds = {step: [row["kind"] for row in read_record(path)] for step, path in steps_of(folder).items()}
    assert kinds == {0: ["own"] * 3 + ["fixed"] * 2} | dict.fromkeys((2, 4), ["own"] * 3 + ["fixed"] * 2) | {
        5: ["fixed"] * 2
    }


def test_values_are_those_of_float64(whole, folders):
    vocabulary = 0
    for row in read_record(whole[0] / "step=000000.parquet"):
        p, q = (log_probs(path, row) for path in folders)
        vocabulary = p.shape[-1]
        p, q = p.log_softmax(-1), q[:, :vocabulary].log_softmax(-1)  # the teacher's head is padded
        ids = torch.tensor(row["token_ids"])[:, None]
        student, teacher = p.gather(-1, ids)[:, 0], q.gather(-1, ids)[:, 0]
        both = [set(a.tolist()) & set(b.tolist()) for a, b in zip(p.topk(16).indices, q.topk(16).indices)]
        expected = {
            "student_log_prob": student,
            "teacher_log_prob": teacher,
            "sampled_log_ratio": student - teacher,
            "reverse_kl": (p.exp() * (p - q)).sum(-1),
            "forward_kl": (q.exp() * (q - p)).sum(-1),
            "student_entropy": -(p.exp() * p).sum(-1),
            "teacher_entropy": -(q.exp() * q).sum(-1),
            "overlap_ratio": torch.tensor([len(each) / 16 for each in both]),
            "overlap_mass_student": torch.stack([p[i, list(each)].exp().sum() for i, each in enumerate(both)]),
            "overlap_mass_teacher": torch.stack([q[i, list(each)].exp().sum() for i, each in enumerate(both)]),
        }
        for name, values in expected.items():
            assert row[name] == pytest.approx(values.tolist(), abs=2e-5), name
        assert row["advantage"] is None and row["token_weight"] is None
        for who, whole_list in (("student", p), ("teacher", q)):
            best = whole_list.topk(4)
            assert row[f"{who}_top_ids"] == best.indices.tolist()
            assert row[f"{who}_top_log_probs"][0] == pytest.approx(best.values[0].tolist(), abs=2e-5)
    assert vocabulary
