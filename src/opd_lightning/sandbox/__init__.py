"""Students and teachers small enough to ship, in Hugging Face format: a short pair and a long one.

Wherever a model is named, ``sandbox:student`` and ``sandbox:teacher`` stand for the folders in this package that belong
to `opd_lightning.tasks.arithmetic` (`python -m opd_lightning.sandbox.make` made them), ``sandbox:long-student`` and
``sandbox:long-teacher`` for those that belong to `opd_lightning.tasks.ledger` (`... .sandbox.make_long`).
"""

from pathlib import Path

_PREFIX = "sandbox:"
_NAMES = ("student", "teacher", "long-student", "long-teacher")


def student_path() -> Path:
    """Return the folder of the student of the short sandbox, which often forgets to carry."""
    return _folder("student")


def teacher_path() -> Path:
    """Return the folder of the teacher of the short sandbox, the same model tuned further on right sums."""
    return _folder("teacher")


def long_student_path() -> Path:
    """Return the folder of the student of the long sandbox, which has habits in every section of a ledger."""
    return _folder("long-student")


def long_teacher_path() -> Path:
    """Return the folder of the teacher of the long sandbox, which books rightly from any state."""
    return _folder("long-teacher")


def resolve(path: str, setting: str = "model path") -> str:
    """Turn the name of a sandbox model into its folder and return any other path or hub id unchanged.

    Args:
        path: Of a model, as it was given.
        setting: Who gave it, for the message.

    Raises:
        ValueError: There is no such sandbox model.
    """
    if not path.startswith(_PREFIX):
        return path
    name = path.removeprefix(_PREFIX)
    if name not in _NAMES:
        known = ", ".join(_PREFIX + known for known in _NAMES[:-1])
        raise ValueError(f"{setting}: expected {known} or {_PREFIX}{_NAMES[-1]}, got {path!r}.")
    return str(_folder(name))


def _folder(name: str) -> Path:
    return Path(__file__).parent / name.replace("-", "_")
