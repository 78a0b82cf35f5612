"""A student and a teacher small enough to ship, in Hugging Face format, for `opd_lightning.tasks.arithmetic`.

Wherever a model is named, ``sandbox:student`` and ``sandbox:teacher`` stand for the folders in this package.
`python -m opd_lightning.sandbox.make` made them.
"""

from pathlib import Path

_PREFIX = "sandbox:"
_NAMES = ("student", "teacher")


def student_path() -> Path:
    """Return the folder of the student, which often forgets to carry."""
    return Path(__file__).parent / "student"


def teacher_path() -> Path:
    """Return the folder of the teacher, the same model tuned further on right sums."""
    return Path(__file__).parent / "teacher"


def resolve(path: str) -> str:
    """Turn ``sandbox:student`` or ``sandbox:teacher`` into its folder and return any other path or hub id unchanged.

    Raises:
        ValueError: There is no such sandbox model.
    """
    if not path.startswith(_PREFIX):
        return path
    name = path.removeprefix(_PREFIX)
    if name not in _NAMES:
        raise ValueError(f"model path: expected {' or '.join(_PREFIX + known for known in _NAMES)}, got {path!r}.")
    return str(student_path() if name == "student" else teacher_path())
