"""Updates read from checkpoints, exported folders and records are those of the weights themselves."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from toys import adamw, make_data, make_module, make_trainer, weights_of

from opd_lightning.backends.hf import LoraSettings
from opd_lightning.callbacks.update_recorder import UpdateRecorder
from opd_lightning.training.checkpoints import export
from opd_lightning.training.run_points import find_updates
from opd_lightning.training.stored_tensors import StoredTensors
from opd_lightning.training.weight_updates import WeightPoint, kind_of, layer_of, plain_name

QUERY = "model.layers.1.self_attn.q_proj.weight"


def train(folder, student, teacher, lora):
    """A run of four steps: its weights before and after, checkpoints and records of every step."""
    options = {"lora": LoraSettings(r=4)} if lora else {}
    module = make_module(student, teacher, optimizer=adamw, student_options=options)
    saver = ModelCheckpoint(folder / "saved", every_n_train_steps=1, save_top_k=-1, save_last="link")
    recorder = UpdateRecorder(every_n_steps=1, dirpath=str(folder / "updates"), dtype="float32")
    trainer = make_trainer(folder, 4, enable_checkpointing=True, callbacks=[recorder, saver])
    module.configure_model()
    before = weights_of(module)
    trainer.fit(module, make_data())
    return folder, before, weights_of(module)


@pytest.fixture(scope="module")
def full(tmp_path_factory, tiny_qwen3_folder, tiny_teacher_folder):
    return train(tmp_path_factory.mktemp("full"), tiny_qwen3_folder, tiny_teacher_folder, lora=False)


@pytest.fixture(scope="module")
def low_rank(tmp_path_factory, tiny_qwen3_folder, tiny_teacher_folder):
    return train(tmp_path_factory.mktemp("lora"), tiny_qwen3_folder, tiny_teacher_folder, lora=True)


def test_checkpoints_give_the_difference_of_the_weights(full):
    folder, before, after = full
    updates = find_updates(str(folder), points_from="checkpoints")
    assert updates.steps == [1, 2, 3, 4]  # last.ckpt is one of them
    assert len(updates.matrices) == 2 * 7 + 2 and updates.matrices[0].startswith("model.layers.0.")
    for name in updates.matrices:
        expected = after[name].double() - before[name].double()
        assert torch.equal(updates.update(3, name), expected)
        assert torch.equal(updates.update(3, name, slice(1, 3)), expected[1:3])


def test_records_say_what_checkpoints_say(full, low_rank):
    for folder, _, _ in (full, low_rank):
        records, checkpoints = (
            find_updates(str(folder), pattern=r"layers.1|embed", points_from=kind)
            for kind in ("records", "checkpoints")
        )
        assert records.steps == checkpoints.steps
        assert {kind_of(name) for name in records.matrices} == {"attention", "mlp"}  # the default choice
        for name in records.matrices:
            expected = checkpoints.update(2, name)
            torch.testing.assert_close(records.update(2, name), expected, rtol=1e-6, atol=1e-9)


def test_under_lora_the_update_is_that_of_the_merged_matrix(low_rank, tmp_path, tiny_qwen3_folder):
    folder, _, _ = low_rank
    updates = find_updates(str(folder), points_from="checkpoints")
    assert updates.start is None and len(updates.matrices) == 2 * 7
    export(str(folder / "saved" / "last.ckpt"), str(tmp_path / "runs" / "step=4"))
    export(str(folder / "saved" / "last.ckpt"), str(tmp_path / "adapters" / "step=4"), merge_adapter=False)
    for kind in ("runs", "adapters"):
        shutil.copytree(tmp_path / kind / "step=4", tmp_path / kind / "step=5")
    merged = find_updates(str(tmp_path / "runs"), start=str(tiny_qwen3_folder))
    adapters = find_updates(str(tmp_path / "adapters"))
    assert merged.steps == adapters.steps == [4, 5]
    for name in updates.matrices:
        change = updates.update(3, name)
        assert torch.linalg.matrix_rank(change) <= 4 and change.norm() > 0
        torch.testing.assert_close(merged.update(1, name), change, rtol=1e-3, atol=1e-6)  # float32 merged
        torch.testing.assert_close(adapters.update(1, name), change)
        with pytest.raises(ValueError, match=r"does not say which weights the run began with\. Set --start"):
            find_updates(str(tmp_path / "runs"))
    settings = tmp_path / "adapters" / "step=4" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"use_rslora": True}))
    with pytest.raises(ValueError, match="has use_rslora, and only plain LoRA"):
        find_updates(str(tmp_path / "adapters"))


def test_weights_in_bfloat16_are_compared_with_a_start_in_bfloat16(full, tmp_path, tiny_qwen3_folder):
    folder, before, after = full
    saved = sorted((folder / "saved").glob("*step=*.ckpt"))
    for step, path in ((1, saved[0]), (4, saved[-1])):
        export(str(path), str(tmp_path / f"step={step}"), dtype="bfloat16")
    updates = find_updates(str(tmp_path), start=str(tiny_qwen3_folder), pattern="layers.1.self_attn.q_proj")
    assert updates.matrices == [QUERY]
    expected = after[QUERY].bfloat16().double() - before[QUERY].bfloat16().double()
    assert torch.equal(updates.update(1, QUERY), expected)


@pytest.fixture
def copied(full, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(full[0] / "saved", folder, symlinks=True)
    return folder


def checkpoint(folder, step):
    (path,) = folder.glob(f"*step={step}.ckpt")
    return path


def test_a_checkpoint_at_step_0_is_the_start(copied):
    content = torch.load(checkpoint(copied, 2), weights_only=True)
    torch.save(content | {"global_step": 0}, copied / "zero.ckpt")
    updates = find_updates(str(copied))
    assert updates.steps == [1, 2, 3, 4] and float(updates.update(1, QUERY).norm()) == 0


def test_what_cannot_be_compared_is_refused(copied, tmp_path):
    def refused(match, **options):
        with pytest.raises(ValueError, match=match) as error:
            find_updates(str(copied), **options)
        assert "\n" not in str(error.value)

    with pytest.raises(ValueError, match="there is no folder"):
        find_updates(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no checkpoints \(\*.ckpt\), exported folders .* or records in .*save_top_k"):
        find_updates(str(tmp_path / "empty"))
    refused("no records in", points_from="records")
    refused(r"matrices: 'nothing' is found in none of the names of this run, such as ", pattern="nothing")
    refused(r"matrices: expected a regular expression, got '\('", pattern="(")
    refused("start: the weights are not at '/nowhere/model', neither as a folder nor", start="/nowhere/model")
    (tmp_path / "model").mkdir()
    refused("start: the weights cannot be read: expected .*safetensors in", start=str(tmp_path / "model"))
    other = {"model.layers.0.mlp.up_proj.weight": torch.zeros(3, 3)}
    save_file(other, tmp_path / "model" / "model.safetensors")
    refused(
        r"run: .*down_proj.weight is absent in .*model' and \[32, 48\] in .*Set --start|take one",
        start=str(tmp_path / "model"),
    )
    whole = (tmp_path / "model" / "model.safetensors").read_bytes()
    (tmp_path / "model" / "model.safetensors").write_bytes(whole[:-8])
    refused("start: the weights cannot be read.*damaged or cut short", start=str(tmp_path / "model"))
    shutil.copy(checkpoint(copied, 3), copied / "other.ckpt")
    refused("holds more than one run: .* and .* do not belong together")
    (copied / "other.ckpt").unlink()
    data = checkpoint(copied, 2).read_bytes()
    checkpoint(copied, 2).write_bytes(data[:-100])
    refused("cut short or not a checkpoint")
    for step in (1, 2, 3):
        checkpoint(copied, step).unlink()
    refused("has 1 of checkpoints after step 0; expected at least 2")


def test_a_start_that_has_gone_is_asked_for(copied, tmp_path):
    for step in (1, 2, 3, 4):
        content = torch.load(checkpoint(copied, step), weights_only=True)
        content["opd_lightning"]["student"]["init_args"]["path"] = str(tmp_path / "gone")
        torch.save(content, checkpoint(copied, step))
    with pytest.raises(ValueError, match=r"began with are not at '.*gone', neither .* Set --start to where they are"):
        find_updates(str(copied))


def test_checkpoints_of_any_module_need_only_the_start(tmp_path):
    weights = {step: {"layers.0.mlp.weight": torch.full((3, 2), float(step))} for step in (0, 1, 3)}
    for step, state in weights.items():
        torch.save({"state_dict": state, "global_step": step}, tmp_path / f"{step}.ckpt")
    updates = find_updates(str(tmp_path))
    assert updates.steps == [1, 3] and updates.update(1, "layers.0.mlp.weight").tolist() == [[3.0, 3.0]] * 3
    os.remove(tmp_path / "0.ckpt")
    with pytest.raises(ValueError, match=r"1.ckpt' does not say which weights the run began with"):
        find_updates(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "plain", "kind", "layer"),
    [
        ("student.model.layers.3.self_attn.q_proj.weight", "model.layers.3.self_attn.q_proj.weight", "attention", 3),
        (
            "base_model.model.model.layers.3.mlp.up_proj.base_layer.weight",
            "model.layers.3.mlp.up_proj.weight",
            "mlp",
            3,
        ),
        ("student.lm_head.weight", "lm_head.weight", "embedding", None),
        ("transformer.h.11.attn.c_attn.weight", "transformer.h.11.attn.c_attn.weight", "attention", 11),
        ("transformer.wte.weight", "transformer.wte.weight", "embedding", None),
        ("layers.0.block_sparse_moe.gate.weight", "layers.0.block_sparse_moe.gate.weight", "other", 0),
    ],
)
def test_names(name, plain, kind, layer):
    assert (plain_name(name), kind_of(plain), layer_of(plain)) == (plain, kind, layer)


def test_an_adapter_on_an_embedding_is_refused():
    shapes = {"base_model.model.model.embed_tokens.lora_embedding_A": (2, 8)}
    stored = StoredTensors(Path("x"), shapes, dict.fromkeys(shapes, torch.float32))
    with pytest.raises(ValueError, match=r"lora_embedding_A is a part of an adapter .* Export the checkpoints"):
        WeightPoint(1, stored, lora_scale=1.0).shapes  # noqa: B018
