import errno
import io
import os
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalTokenNotFoundError
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from toys import adamw, make_data, make_module, make_trainer, weights_of

from opd_lightning.backends.hf import LoraSettings
from opd_lightning.training.checkpoints import (
    WholeCheckpoints,
    build_student,
    check_checkpoint_file,
    export,
    read_checkpoint,
)


@pytest.fixture
def trained(tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    def train(lora=False):
        options = {"lora": LoraSettings(r=4)} if lora else {}
        module = make_module(tiny_qwen3_folder, tiny_teacher_folder, optimizer=adamw, student_options=options)
        trainer = make_trainer(tmp_path, 2)
        trainer.fit(module, make_data())
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        return module, tmp_path / "x.ckpt"

    return train


def logits_of(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_export_writes_what_was_trained(tmp_path, trained, lora):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module, path = trained(lora)
    export(str(path), str(tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[9, 12, 30, 11]])
    torch.testing.assert_close(logits_of(model, ids), logits_of(module.student, ids), rtol=1e-4, atol=1e-4)
    AutoTokenizer.from_pretrained(tmp_path / "model")
    assert load_file(tmp_path / "model" / "model.safetensors")


def test_an_adapter_can_be_exported_alone(tmp_path, trained, tiny_qwen3_folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    module, path = trained(lora=True)
    export(str(path), str(tmp_path / "adapter"), merge_adapter=False)
    base = AutoModelForCausalLM.from_pretrained(tiny_qwen3_folder)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    ids = torch.tensor([[9, 12, 30, 11]])
    torch.testing.assert_close(logits_of(model, ids), logits_of(module.student, ids), rtol=1e-4, atol=1e-4)


def test_validate_reads_a_checkpoint_or_takes_the_plain_student(
    tmp_path, trained, tiny_qwen3_folder, tiny_teacher_folder
):
    module, path = trained()
    fresh = make_module(tiny_qwen3_folder, tiny_teacher_folder)
    trainer = make_trainer(tmp_path, 1, limit_val_batches=1.0)
    trainer.validate(fresh, make_data(), ckpt_path=path, verbose=False)
    assert all(torch.equal(weight, weights_of(module)[name]) for name, weight in weights_of(fresh).items())
    plain = make_module(tiny_qwen3_folder, tiny_teacher_folder)
    trainer.validate(plain, make_data(), verbose=False)
    assert any(not torch.equal(weight, weights_of(module)[name]) for name, weight in weights_of(plain).items())


def test_export_does_not_overwrite(tmp_path, trained):
    _, path = trained()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        export(str(path), str(tmp_path / "full"))


def test_a_checkpoint_cut_short_is_named(tmp_path, trained):
    _, path = trained()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"x.ckpt' \(\d+ bytes\) is cut short or not a checkpoint"):
        check_checkpoint_file(path)


def test_a_missing_checkpoint_lists_the_ones_beside_it(tmp_path, trained):
    trained()
    with pytest.raises(ValueError, match=r"no file .*y.ckpt'. Checkpoints there: x.ckpt"):
        check_checkpoint_file(tmp_path / "y.ckpt")


def test_a_foreign_checkpoint_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="was not written by OPDModule"):
        read_checkpoint(tmp_path / "foreign.ckpt")


def test_a_checkpoint_cannot_name_a_class_of_its_own_or_switch_remote_code_on(tiny_qwen3_folder):
    with pytest.raises(ValueError, match=r"class 'os.system' is not ours"):
        build_student({"class_path": "os.system", "init_args": {}})
    arguments = {"path": str(tiny_qwen3_folder), "trust_remote_code": True}
    student = build_student({"class_path": "opd_lightning.backends.hf.HFStudent", "init_args": arguments})
    assert student.trust_remote_code is False


def test_what_a_killed_run_left_is_removed_and_what_is_being_written_is_not(tmp_path):
    abandoned, growing = tmp_path / "a.ckpt.part", tmp_path / "b.ckpt.part"
    for path in (abandoned, growing):
        path.write_text("half")
    os.utime(abandoned, (time.time() - 3600,) * 2)
    WholeCheckpoints().save_checkpoint({"x": 1}, tmp_path / "c.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.ckpt.part", "c.ckpt"]


def test_the_folder_is_flushed_after_the_new_name_is_in_it(tmp_path, monkeypatch):
    flushed = []
    fsync = os.fsync

    def note(handle):
        flushed.append((os.readlink(f"/proc/self/fd/{handle}"), (tmp_path / "c.ckpt").exists()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    WholeCheckpoints().save_checkpoint({"x": 1}, tmp_path / "c.ckpt")
    assert flushed == [(str(tmp_path / "c.ckpt.part"), False), (str(tmp_path), True)]


def test_the_last_checkpoint_may_be_a_link_that_resumes(tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    def run(folder, steps, ckpt_path=None):
        saver = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=1, save_last="link", filename="{step}")
        module = make_module(tiny_qwen3_folder, tiny_teacher_folder, optimizer=adamw)
        options = {"callbacks": [saver], "enable_checkpointing": True, "plugins": [WholeCheckpoints()]}
        make_trainer(tmp_path, steps, **options).fit(module, make_data(), ckpt_path=ckpt_path)
        return module

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "saved", 2)
    last = tmp_path / "saved" / "last.ckpt"
    assert os.readlink(last) == "step=2.ckpt"
    resumed = run(tmp_path / "saved", 4, ckpt_path=last)
    assert os.readlink(last) == "step=4.ckpt"
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["last.ckpt", "step=4.ckpt"]
    assert read_checkpoint(last)["global_step"] == 4
    assert all(torch.equal(weight, weights_of(whole)[name]) for name, weight in weights_of(resumed).items())


def test_export_in_another_dtype(tmp_path, trained):
    _, path = trained()
    export(str(path), str(tmp_path / "half"), dtype="bfloat16")
    weights = load_file(tmp_path / "half" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


class Hub:
    """Stands in for `HfApi`: what would be sent."""

    sent: dict = {}

    def whoami(self):
        return {"name": "me"}

    def create_repo(self, name, **options):
        self.sent["created"] = {"name": name, **options}
        return f"https://hub/{name}"

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.sent["uploaded"] = repo_id, sorted(path.name for path in folder_path.iterdir())


def test_export_can_push_to_the_hub(tmp_path, trained, monkeypatch, capsys):
    _, path = trained()
    monkeypatch.setattr("opd_lightning.backends.hf.hub.HfApi", Hub)
    export(str(path), str(tmp_path / "model"), push_to_hub="me/student", private=True)
    assert Hub.sent["created"] == {"name": "me/student", "private": True, "exist_ok": True}
    assert Hub.sent["uploaded"] == ("me/student", sorted(each.name for each in (tmp_path / "model").iterdir()))
    assert "Pushed to https://hub/me/student" in capsys.readouterr().out


def test_without_a_login_nothing_is_written(tmp_path, trained, monkeypatch):
    _, path = trained()

    def nobody(self):
        raise LocalTokenNotFoundError("Token is required")

    monkeypatch.setattr(Hub, "whoami", nobody)
    monkeypatch.setattr("opd_lightning.backends.hf.hub.HfApi", Hub)
    with pytest.raises(ValueError, match=r"push_to_hub: nobody is logged in here. Run `hf auth login`"):
        export(str(path), str(tmp_path / "model"), push_to_hub="me/student")
    assert not (tmp_path / "model").exists()


def test_a_checkpoint_does_not_say_which_files_are_read(tmp_path, trained):
    _, path = trained()
    content = torch.load(path, weights_only=True)
    arguments = content["opd_lightning"]["student"]["init_args"]
    (tmp_path / "secret").write_text("the secret")
    (tmp_path / "settings.yaml").write_text("r: 3")
    for name, file in (("chat_template", "secret"), ("chat_template", "/etc/hostname"), ("lora", "settings.yaml")):
        description = {"class_path": "opd_lightning.backends.hf.HFStudent"}
        description["init_args"] = arguments | {name: str(tmp_path / file)}
        content["opd_lightning"]["student"] = description
        torch.save(content, tmp_path / "edited.ckpt")
        with pytest.raises(ValueError, match=r"names the file '.*' as chat template|lora") as refused:
            export(str(tmp_path / "edited.ckpt"), str(tmp_path / "model"))
        assert "the secret" not in str(refused.value)
        assert not (tmp_path / "model").exists()


def test_the_template_in_a_checkpoint_is_its_text_and_the_user_may_name_another(
    tmp_path, tiny_qwen3_folder, tiny_teacher_folder
):
    text = "{% for message in messages %}{{ '<|im_start|>' + message['content'] }}{% endfor %}"
    (tmp_path / "own.jinja").write_text(text)
    (tmp_path / "another.jinja").write_text(f"{text}!")
    options = {"chat_template": str(tmp_path / "own.jinja")}
    trainer = make_trainer(tmp_path, 1)
    trainer.fit(make_module(tiny_qwen3_folder, tiny_teacher_folder, student_options=options), make_data())
    (tmp_path / "own.jinja").unlink()  # no matter: it was read once
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    for name, expected in ((None, text), (str(tmp_path / "another.jinja"), f"{text}!")):
        folder = tmp_path / f"model {name is None}"
        export(str(tmp_path / "x.ckpt"), str(folder), chat_template=name)
        assert (folder / "chat_template.jinja").read_text() == expected


def refuse_to_write(monkeypatch, folder):
    """The folder's disk can only be read from now on."""
    for name in ("open", "unlink", "mkdir"):
        call = getattr(Path, name)

        def refuse(self, *arguments, call=call, name=name, **options):
            is_write = name != "open" or "w" in (*arguments, options.get("mode"))
            if is_write and self.is_relative_to(folder):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
            return call(self, *arguments, **options)

        monkeypatch.setattr(Path, name, refuse)


@pytest.mark.parametrize("place", ["x.ckpt", "new folder/x.ckpt"])
def test_a_read_only_disk_does_not_lose_the_message(place, tmp_path, monkeypatch):
    (tmp_path / "a.ckpt.part").write_text("half")
    os.utime(tmp_path / "a.ckpt.part", (0, 0))
    refuse_to_write(monkeypatch, tmp_path)
    with pytest.raises(OSError, match=r"x.ckpt' cannot be saved: Read-only file system \(.* GiB free\). Earlier check"):
        WholeCheckpoints().save_checkpoint({"x": 1}, tmp_path / place)


def test_ctrl_c_inside_a_save_is_ctrl_c_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    """torch answers with an error of its own, which would be the program's fault."""
    opened = Path.open

    class Interrupted(io.BytesIO):
        def write(self, content):
            raise KeyboardInterrupt

    def open_for(path, mode="r", **named):
        opened(path, mode, **named).close()
        return Interrupted()

    monkeypatch.setattr(Path, "open", open_for)
    with pytest.raises(KeyboardInterrupt):
        WholeCheckpoints().save_checkpoint({"weight": torch.zeros(1000)}, tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []
