"""A file is there whole or not at all, whatever stops its writer."""

import errno
import os
import stat

import pytest

from opd_lightning.backends.vllm.server.kept_replies import _write as write_reply
from opd_lightning.reports.files import write_text
from opd_lightning.reports.token_records import write_record
from opd_lightning.whole_files import written_whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_old_file_is_there_until_the_new_one_is_on_the_disk(tmp_path, monkeypatch):
    path, flushed, fsync = tmp_path / "a", [], os.fsync

    def note(handle):
        flushed.append((os.fstat(handle).st_size, path.read_bytes()))
        fsync(handle)

    path.write_bytes(b"old")
    path.chmod(0o600)
    monkeypatch.setattr(os, "fsync", note)
    with written_whole(path, ".begun") as file:
        file.write(b"newer")
        assert names(tmp_path) == ["a", "a.begun"] and path.read_bytes() == b"old"
    assert flushed == [(5, b"old")] and path.read_bytes() == b"newer" and names(tmp_path) == ["a"]
    with (tmp_path / "plain").open("w"):  # as readable as any other new file
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), ValueError("no row")])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(type(error)) as raised, written_whole(tmp_path / "a") as file:
        file.write(b"ne")
        raise error
    assert raised.value is error and names(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"


def test_what_a_kill_left_is_written_over(tmp_path):
    (tmp_path / "a.part").write_bytes(b"a half that is longer")
    with written_whole(tmp_path / "a") as file:
        file.write(b"whole")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"whole"


WRITERS = {
    "a page": lambda folder: write_text(folder / "a.html", "text"),
    "a reply": lambda folder: write_reply(folder / "a.json", "text"),
    "a record": lambda folder: write_record(folder, 0, [], {}),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_writers_leave_nothing_half_written_on_a_full_disk(tmp_path, monkeypatch, write):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path)
    assert names(tmp_path) == []
    write(tmp_path)
    assert len(names(tmp_path)) == 1
