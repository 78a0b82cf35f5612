"""A recording that is killed at any moment and begun again gives the file of one that was not."""

import json

import pyarrow.parquet
import pytest

from opd_lightning.rollouts.answer_files import header_path, read_answers, read_header
from opd_lightning.rollouts.recording import Recording

SETTINGS = {"seed": 0, "sampling": {"temperature": 1.0}}
HEADER = {"format": "opd_lightning answers 1", "weights": "abc"}


def make_row(number):
    return {
        "uid": f"p/{number}",
        "messages": [{"role": "user", "content": "1+1="}],
        "reference": None,
        "response": "half of a pair: \ud83d" if number == 1 else "zwei €",
        "reward": None,
        "finished": True,
        "num_tokens": 2,
        "seed": 2**63 - 1,
        "sample": 0,
        "attempt": 0,
        "prompt_ids": [1],
        "response_ids": [2, 3],
        "log_probs": [-0.25, -1.5] if number else None,
        "student_wrote": None,
    }


BATCHES = [[make_row(0), make_row(1)], [], [make_row(2)]]


def record(target, *, num_batches=3, settings=SETTINGS):
    """Go on as far as told; the answers are a function of their place."""
    recording = Recording(target, settings)
    if not recording.is_complete:
        recording.open(HEADER)
        for number in range(recording.num_done, num_batches):
            rows = BATCHES[number]
            recording.append(rows, num_done=number + 1, counts={"kept": len(rows), "generated": 2})
        if num_batches == len(BATCHES):
            recording.finish()
        recording.close()
    return recording


def everything(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(params=["answers.jsonl", "answers.parquet"])
def target(request, tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / request.param


@pytest.fixture
def uninterrupted(target, tmp_path):
    (tmp_path / "whole").mkdir()
    record(tmp_path / "whole" / target.name)
    return everything(tmp_path / "whole")


def test_rows_and_header_come_back(target):
    record(target)
    rows = [row for _, row in read_answers(target)]
    assert [row["uid"] for row in rows] == ["p/0", "p/1", "p/2"]
    assert rows[1]["response"].encode("utf-8", "backslashreplace") == b"half of a pair: \\ud83d"
    assert rows[0]["log_probs"] is None and rows[2]["log_probs"] == [-0.25, -1.5]
    assert rows[2]["seed"] == 2**63 - 1
    header = read_header(target)
    assert header["settings"] == SETTINGS and header["counts"] == {"generated": 6, "kept": 3}
    assert {path.name for path in target.parent.iterdir()} <= {target.name, header_path(target).name}
    if target.suffix == ".parquet":
        assert pyarrow.parquet.read_table(target).column("uid").to_pylist() == ["p/0", "p/1", "p/2"]


def test_killed_at_any_byte_of_a_batch(target, uninterrupted):
    record(target, num_batches=1)
    part, progress = (target.with_name(f"{target.name}.{ending}") for ending in ("part", "progress"))
    before = part.read_bytes(), progress.read_bytes()
    record(target, num_batches=3 - 1)
    record_of_third = json.dumps(make_row(2)).encode()
    note = progress.read_bytes()[len(before[1]) :]
    tails = [(record_of_third[:cut], b"") for cut in range(0, len(record_of_third), 40)]
    tails += [(b"", note[:cut]) for cut in range(0, len(note), 5)]
    tails += [(b"", b"\0" * 64), (b"", b"\0\0\n")]  # a block that the disk never got
    for of_part, of_progress in tails:
        part.write_bytes(before[0] + of_part)
        progress.write_bytes(before[1] + of_progress)
        recording = record(target)
        assert bool(recording.repaired) == bool(of_part or of_progress)
        if recording.repaired:
            assert "half-written" in recording.repaired and "after the 1 problems" in recording.repaired
        assert everything(target.parent) == uninterrupted
        for path in target.parent.iterdir():
            path.unlink()


def test_killed_before_the_first_line_was_whole(target, uninterrupted):
    target.with_name(f"{target.name}.progress").write_bytes(b'{"format": "opd_li')
    record(target)
    assert everything(target.parent) == uninterrupted


def test_killed_while_the_file_got_its_name(target, uninterrupted):
    """Every state between two steps of `finish`."""
    record(target, num_batches=3 - 1)
    recording = Recording(target, SETTINGS)
    recording.open(HEADER)
    recording.append(BATCHES[2], num_done=3, counts={"kept": 1, "generated": 2})
    before = everything(target.parent)
    recording.finish()
    after = everything(target.parent)
    begun = f"{target.name}.unfinished" if target.suffix == ".parquet" else f"{header_path(target).name}.part"
    unfinished = {begun: b"ha"}
    states = [before | unfinished]
    if target.suffix == ".parquet":
        states += [before | after, {k: v for k, v in (before | after).items() if not k.endswith(".part")}]
    else:
        header = header_path(target).name
        states += [before | {header: after[header]}]
        states += [{k: v for k, v in (before | after).items() if not k.endswith(".part")}]
    for state in states:
        for path in target.parent.iterdir():
            path.unlink()
        for name, content in state.items():
            (target.parent / name).write_bytes(content)
        record(target)
        assert everything(target.parent) == uninterrupted


def test_a_complete_file_is_left_alone(target):
    record(target)
    written = target.stat().st_mtime_ns
    recording = record(target)
    assert recording.is_complete and recording.counts["kept"] == 3
    assert target.stat().st_mtime_ns == written


@pytest.mark.parametrize("num_batches", [1, 3])
def test_other_settings_are_named(target, num_batches):
    record(target, num_batches=num_batches)
    with pytest.raises(ValueError, match=r"sampling\.temperature was 1\.0, now it is 0\.7"):
        Recording(target, {"seed": 0, "sampling": {"temperature": 0.7}})


def test_other_weights_are_noticed(target):
    record(target, num_batches=1)
    with pytest.raises(ValueError, match="the weights of who answers was abc, now it is def"):
        Recording(target, SETTINGS).open({**HEADER, "weights": "def"})


def test_two_processes_do_not_write_one_file(target):
    recording = Recording(target, SETTINGS)
    recording.open(HEADER)
    with pytest.raises(ValueError, match="another process is writing"):
        Recording(target, SETTINGS).open(HEADER)
    recording.close()
    record(target)


def test_a_file_of_somebody_elses_is_not_overwritten(target):
    target.write_text("")
    if target.suffix == ".parquet":
        with pytest.raises(ValueError, match="expected a parquet file"):
            Recording(target, SETTINGS)
    else:
        with pytest.raises(ValueError, match="exists and has no header"):
            Recording(target, SETTINGS)


def test_rows_that_are_gone_are_noticed(target):
    record(target, num_batches=1)
    target.with_name(f"{target.name}.part").write_bytes(b"")
    with pytest.raises(ValueError, match="has 0 bytes, but"):
        Recording(target, SETTINGS).open(HEADER)
