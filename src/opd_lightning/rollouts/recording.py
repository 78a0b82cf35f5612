"""`Recording`: answers go to disk batch by batch, so that a process killed at any moment can go on where it was.

While it grows, `answers.jsonl.part` holds the rows and `answers.jsonl.progress` a header and one line per batch: how
many problems are done and how long the part is then. What is behind the last whole line of the progress never was.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from opd_lightning.rollouts.answer_files import FORMAT, Row, header_path, read_answers, read_header, write_parquet
from opd_lightning.whole_files import written_whole


class Recording:
    """One file of answers in the making, or complete already.

    Args:
        target: The file to be; ends in .jsonl or .parquet.
        settings: What the answers depend on, in plain values by name; a recording is continued with the same only.
        form: What the header calls the format of the rows.

    Attributes:
        is_complete: Whether the file is there already.
        num_done: Problems that are done, known after `open`.
        counts: What became of the answers so far, by name.
        repaired: What was found half-written, in words; empty when nothing was.

    Raises:
        ValueError: There is a file of other settings at this place, or one that no recording wrote.
    """

    def __init__(self, target: str | Path, settings: Mapping[str, Any], form: str = FORMAT) -> None:
        self.target = Path(target)
        self.form = form
        self.part = self.target.with_name(f"{self.target.name}.part")
        self.progress = self.target.with_name(f"{self.target.name}.progress")
        self.settings = json.loads(json.dumps(settings))  # as they will be read
        self.is_complete = False
        self.num_done = 0
        self.counts: Counter[str] = Counter()
        self.repaired = ""
        self._header: dict[str, Any] = {}
        self._log: BinaryIO | None = None
        self._look()

    def open(self, header: Mapping[str, Any]) -> None:
        """Begin, or go on after the last whole batch.

        Args:
            header: What the file will say about itself; that of the first run is kept. "weights" must be the same.

        Raises:
            ValueError: Other weights wrote what is there, another process is writing, or the part is too short.
        """
        self._log = self.progress.open("ab")
        self._lock(self._log)
        entries, length = self._entries()
        if not entries:  # also where the very first line is cut
            os.truncate(self.progress, 0)
            self.part.write_bytes(b"")
            self._header = {**header, "settings": self.settings}
            self._note(self._header)
            return
        self._header, last = entries[0], entries[-1]
        self._check_same(self._header["weights"], header["weights"], "the weights of who answers")
        self.num_done, self.counts = last.get("num_done", 0), Counter(last.get("counts", {}))
        num_lost = _cut(self.progress, length) + _cut(self.part, last.get("bytes", 0))
        if num_lost:
            self.repaired = (
                f"{self.target}: the last batch was half-written ({num_lost} bytes) and is made again, after the"
                f" {self.num_done} problems that are done."
            )

    def append(self, rows: Sequence[Row], *, num_done: int, counts: Mapping[str, int]) -> None:
        """Write a batch, whole or not at all.

        Args:
            rows: Its answers, in order.
            num_done: Problems that are done with it, from the first on.
            counts: What became of its answers.
        """
        lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        try:
            with self.part.open("ab") as file:
                # half a character of a surrogate pair cannot be UTF-8; backslashed it is what JSON writes for it
                file.write(lines.encode("utf-8", "backslashreplace"))
                file.flush()
                os.fsync(file.fileno())
                num_bytes = file.tell()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.part)) from error  # a full disk names no file
        self.num_done = num_done
        self.counts.update(counts)
        self._note({"num_done": num_done, "bytes": num_bytes, "counts": dict(self.counts)})

    def finish(self) -> None:
        """Make the file of the part: under its name there is the whole of it or nothing."""
        header = {**self._header, "counts": dict(sorted(self.counts.items()))}
        if self.target.suffix == ".parquet":
            with written_whole(self.target, ".unfinished") as file:
                write_parquet((row for _, row in read_answers(self.part)), header, file)
            self.part.unlink()
        else:
            with written_whole(header_path(self.target)) as file:
                file.write(json.dumps(header, indent=1).encode() + b"\n")
            self.part.replace(self.target)
        self.close()
        self.progress.unlink()
        self.is_complete = True

    def close(self) -> None:
        """Let go of the file, for another process to go on."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def _look(self) -> None:
        """Find out what is there; changes nothing but what a finished recording has left lying about."""
        entries, _ = self._entries()
        if self.target.exists() and not self.part.exists():
            header = read_header(self.target, self.form)
            if header is None:
                raise ValueError(
                    f"output: {str(self.target)!r} exists and has no header, so it is no recording. Name another file,"
                    " or remove it."
                )
            self._check_same(header["settings"], self.settings, "")
            self.is_complete, self.counts = True, Counter(header["counts"])
            self.progress.unlink(missing_ok=True)  # killed between the last two steps of `finish`
        elif entries:
            self._check_same(entries[0]["settings"], self.settings, "")
        elif self.part.exists() and self.part.stat().st_size:
            raise ValueError(
                f"output: {str(self.part)!r} exists, but nothing says how far it is. Remove it, or name another file."
            )

    def _lock(self, file: BinaryIO) -> None:
        if sys.platform == "win32":
            return
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"output: another process is writing {str(self.target)!r}. Wait for it, or name another file."
            ) from error

    def _note(self, entry: Mapping[str, Any]) -> None:
        assert self._log is not None, "call open first"
        self._log.write(json.dumps(entry).encode() + b"\n")
        self._log.flush()
        os.fsync(self._log.fileno())

    def _entries(self) -> tuple[list[dict[str, Any]], int]:
        """The whole lines of the progress, and their length in bytes."""
        entries: list[dict[str, Any]] = []
        length = 0
        for line in self.progress.read_bytes().splitlines(keepends=True) if self.progress.exists() else ():
            if not line.endswith(b"\n") or not line.strip(b"\0\n"):  # cut, or a block that never reached the disk
                break
            entries.append(json.loads(line))
            length += len(line)
        return entries, length

    def _check_same(self, saved: Any, current: Any, name: str) -> None:
        """Refuse to go on with other settings.

        Raises:
            ValueError: They differ; names the innermost that do.
        """
        if isinstance(saved, Mapping) and isinstance(current, Mapping) and saved.keys() == current.keys():
            for key in saved:
                self._check_same(saved[key], current[key], f"{name}.{key}".removeprefix("."))
        elif saved != current:
            raise ValueError(
                f"output: {str(self.target)!r} was begun with other settings: {name} was {saved}, now it is {current}."
                " Go on with the same, name another file, or remove it (and its .part and .progress)."
            )


def _cut(path: Path, length: int) -> int:
    """Shorten a file; returns how many bytes went."""
    size = path.stat().st_size if path.exists() else 0
    if size < length:
        raise ValueError(
            f"output: {str(path)!r} has {size} bytes, but {length} were written. It was changed or lost: remove it and"
            " its .progress file to begin anew."
        )
    if size > length:
        os.truncate(path, length)
    return size - length
