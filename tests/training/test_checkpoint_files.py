"""A damaged checkpoint is refused or its damage is none; a foreign object is never made; what is whole is named."""

import os
import random
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from toys import adamw, make_data, make_module, make_trainer

from opd_lightning.training.checkpoint_files import check_checkpoint_file, find_damage, without_scheme
from opd_lightning.training.checkpoints import WholeCheckpoints, open_checkpoint
from opd_lightning.training.usable_weights import last_usable_checkpoint

PAGE = 4096


class Foreign:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def flip(content, rng):
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def flip_near_the_end(content, rng):
    """Where the table of contents lies."""
    content[-rng.randrange(1, 4000)] ^= 1 << rng.randrange(8)


def zero_a_page(content, rng):
    page = rng.randrange(len(content) // PAGE) * PAGE
    content[page : page + PAGE] = bytes(PAGE)


def is_equal(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_equal, one, other))
    return one == other


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_qwen3_folder, tiny_teacher_folder):
    """A real one: weights, optimiser, loops."""
    folder = tmp_path_factory.mktemp("whole")
    module = make_module(tiny_qwen3_folder, tiny_teacher_folder, optimizer=adamw)
    trainer = make_trainer(folder, 1, plugins=[WholeCheckpoints()])
    trainer.fit(module, make_data())
    trainer.save_checkpoint(folder / "whole.ckpt")
    return folder / "whole.ckpt"


@pytest.mark.parametrize(("damage", "num_refused"), [(flip, 80), (flip_near_the_end, 40), (zero_a_page, 80)])
def test_a_damaged_checkpoint_is_refused_or_its_damage_is_none(damage, num_refused, checkpoint, tmp_path):
    whole, content, rng = open_checkpoint(checkpoint), checkpoint.read_bytes(), random.Random(0)
    path, refused = tmp_path / "damaged.ckpt", []
    for _ in range(100):
        damaged = bytearray(content)
        damage(damaged, rng)
        path.write_bytes(damaged)
        try:
            read = [WholeCheckpoints().load_checkpoint(path), open_checkpoint(path)]
        except ValueError as error:
            refused.append(str(error))
        else:
            assert all(is_equal(each, whole) for each in read)
    assert len(refused) >= num_refused
    assert all("damaged.ckpt'" in message and "\n" not in message for message in refused)


def test_the_newest_whole_one_beside_a_damaged_one_is_named(checkpoint, tmp_path):
    content = checkpoint.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for age, (name, inside) in enumerate(
        [("step=4.ckpt", flipped), ("step=3.ckpt", content[:-9]), ("step=2.ckpt", content), ("step=1.ckpt", content)]
    ):
        (tmp_path / name).write_bytes(inside)
        os.utime(tmp_path / name, (1e9, 1e9 - age))
    (tmp_path / "last.ckpt").symlink_to("step=4.ckpt")
    with pytest.raises(ValueError, match=r"last.ckpt' .* is damaged: .*Use '.*step=2.ckpt', the newest beside it"):
        check_checkpoint_file(tmp_path / "last.ckpt")
    for name in ("step=1.ckpt", "step=2.ckpt"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"step=3.ckpt' .* is cut short .* No other checkpoint beside it is whole"):
        check_checkpoint_file(tmp_path / "step=3.ckpt")


def test_the_way_back_passes_a_damaged_checkpoint_over(checkpoint, tmp_path):
    content = bytearray(checkpoint.read_bytes())
    (tmp_path / "a.ckpt").write_bytes(content)
    content[len(content) // 2] ^= 1
    (tmp_path / "b.ckpt").write_bytes(content)
    os.utime(tmp_path / "a.ckpt", (1, 1))
    trainer = make_trainer(tmp_path, 1, callbacks=[ModelCheckpoint(tmp_path)], enable_checkpointing=True)
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = 5
    assert trainer.global_step == 5
    assert last_usable_checkpoint(trainer) == tmp_path / "a.ckpt"


@pytest.mark.parametrize("weights_only", [None, False, True])
def test_no_foreign_object_is_made_whatever_is_asked_for(weights_only, tmp_path):
    torch.save({"state_dict": {}, "callbacks": Foreign(tmp_path / "made")}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match=r"foreign.ckpt' holds more than tensors and plain values"):
        WholeCheckpoints().load_checkpoint(tmp_path / "foreign.ckpt", weights_only=weights_only)
    assert not (tmp_path / "made").exists()


def test_other_archives_are_no_checkpoints(tmp_path):
    for method, message in ((ZIP_STORED, "is cut short or not a checkpoint"), (ZIP_DEFLATED, "damaged or not a chec")):
        with ZipFile(tmp_path / "some.ckpt", "w", method) as archive:
            archive.writestr("text", "some text")
        with pytest.raises(ValueError, match=rf"some.ckpt' .* {message}"):
            open_checkpoint(tmp_path / "some.ckpt")


def test_addresses_on_this_machine_are_paths(checkpoint):
    assert without_scheme(f"file://{checkpoint}") == str(checkpoint)
    assert without_scheme("runs/last.ckpt") == "runs/last.ckpt"
    assert without_scheme("http://127.0.0.1:1/last.ckpt") == "http://127.0.0.1:1/last.ckpt"
    assert is_equal(WholeCheckpoints().load_checkpoint(f"file://{checkpoint}"), open_checkpoint(checkpoint))
    with pytest.raises(ValueError, match=r"ckpt_path: 'nowhere://x.ckpt' cannot be read: Protocol not known"):
        without_scheme("nowhere://x.ckpt")


def test_what_was_just_written_is_whole(checkpoint):
    assert find_damage(checkpoint) is None
