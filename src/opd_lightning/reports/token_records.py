"""Records of tokens on the disk, as `TokenRecorder` writes them and everybody may read them."""

from __future__ import annotations

from pathlib import Path

FOLDER = "tokens"


def find_records(folder: Path) -> Path:
    """The folder of the records of a run.

    Args:
        folder: That folder itself, or the run's.

    Raises:
        ValueError: There are none.
    """
    for place in (folder, folder / FOLDER):
        if any(place.glob("step=*.parquet")):
            return place
    raise ValueError(
        f"records: {str(folder)!r} holds no records of tokens (expected step=*.parquet, there or in {FOLDER!r})."
        " Add the callback TokenRecorder to the run, or name another folder."
    )
