"""Lightning checkpoints on disk: written whole or not at all, checked, and turned into a Hugging Face folder.

Loading never unpickles foreign objects (`weights_only=True`) and imports no class that a checkpoint names unless it is
one of ours, or the user names it too.
"""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

from opd_lightning.interfaces import Student


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and then renames it, so that it is there whole or not at all.

    Lightning's own way builds the file in memory, twice, and moves it through the system's temporary folder. That one
    may be small, or on another disk, where moving is copying and can stop half-way. Local files only; others are left
    to Lightning.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the checkpoint; when that fails, what was at its place before is still there.

        Raises:
            OSError: The disk is full, or the folder cannot be written to.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        part = target.with_name(f"{target.name}.part")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
        except (OSError, RuntimeError) as error:
            reason = error if isinstance(error, OSError) else error.__context__  # torch puts its own error in front
            part.unlink(missing_ok=True)
            if not isinstance(reason, OSError):
                raise
            free = shutil.disk_usage(target.parent).free / 2**30
            raise OSError(
                f"the checkpoint {str(target)!r} cannot be saved: {reason.strerror} ({free:.1f} GiB free). Earlier"
                " checkpoints are as they were: make room, and resume with --ckpt_path and the last of them."
            ) from error


def check_checkpoint_file(path: str | Path) -> None:
    """Raise a ValueError when the file is absent, not a checkpoint or cut short; costs no more than reading its end."""
    path = Path(path)
    if not path.exists():
        siblings = sorted(p.name for p in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        hint = f" Checkpoints there: {', '.join(siblings)}." if siblings else ""
        raise ValueError(f"ckpt_path: no file {str(path)!r}.{hint}")
    if (path / "config.json").exists():
        raise ValueError(
            f"ckpt_path: {str(path)!r} is a model folder, not a checkpoint. Set student.path to it instead."
        )
    if path.is_file() and not zipfile.is_zipfile(path):
        raise ValueError(_damaged(path))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of `OPDModule` onto the CPU; tensors come from the disk only when they are used.

    Raises:
        ValueError: The file is absent, damaged, or was written by something else.
    """
    check_checkpoint_file(path)
    if Path(path).is_dir():
        raise ValueError(f"ckpt_path: {str(path)!r} is a folder; expected one file, such as last.ckpt.")
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:  # the second one: members of the archive are missing
        raise ValueError(_damaged(path)) from error
    if not isinstance(checkpoint, dict) or "opd_lightning" not in checkpoint:
        raise ValueError(f"ckpt_path: {str(path)!r} was not written by OPDModule (no 'opd_lightning' entry).")
    return checkpoint


def _damaged(path: str | Path) -> str:
    return (
        f"ckpt_path: {str(path)!r} ({Path(path).stat().st_size} bytes) is cut short or not a checkpoint."
        " Use an earlier one; the run that wrote it probably died while saving."
    )


def build_student(
    description: dict[str, Any], *, student_class: str | None = None, trust_remote_code: bool = False
) -> Student:
    """Build the student a checkpoint describes.

    Args:
        description: What `Student.describe` returned.
        student_class: Where a class that is not ours lies: a checkpoint alone does not say what to import.
        trust_remote_code: Whether code that comes with the model may run; what the checkpoint says does not count.

    Raises:
        ValueError: The class is not part of this package and was not named, or is another one.
    """
    class_path: str = description["class_path"]
    if student_class is not None:
        _check_student_class(student_class, class_path)
    elif not class_path.startswith("opd_lightning."):
        raise ValueError(
            f"ckpt_path: the student's class {class_path!r} is not ours, and a checkpoint is not trusted to say what to"
            f" import. If it is yours, say so: --student_class {class_path}."
        )
    arguments = dict(description["init_args"])
    if "trust_remote_code" in arguments:
        arguments["trust_remote_code"] = trust_remote_code
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Student, "student")
    try:
        config = parser.parse_object({"student": {"class_path": student_class or class_path, "init_args": arguments}})
    except ArgumentError as error:
        raise ValueError(
            f"ckpt_path: the student that the checkpoint describes cannot be built by this version: {error}"
        ) from error
    student: Student = parser.instantiate(config).student
    return student


def _check_student_class(student_class: str, class_path: str) -> None:
    """Refuse a class that cannot be imported, is no student, or is not the one that was trained."""
    module, _, name = student_class.rpartition(".")
    try:
        cls = getattr(import_module(module or "builtins"), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"student_class: cannot import {student_class!r} ({error}). Expected module.Class, in the current folder or"
            " installed."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Student)):
        raise ValueError(f"student_class: {student_class!r} is no subclass of opd_lightning.interfaces.Student.")
    # a script knows its own classes as those of __main__
    if class_path not in (student_class, f"{cls.__module__}.{cls.__qualname__}", f"__main__.{cls.__qualname__}"):
        raise ValueError(
            f"student_class: the checkpoint was written with {class_path!r}, got {student_class!r}. Name the class that"
            " was trained."
        )


def export(
    ckpt_path: str,
    output: str,
    merge_adapter: bool = True,
    student_path: str | None = None,
    student_class: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write the student of a checkpoint as a Hugging Face folder that `from_pretrained` and vLLM load.

    Args:
        ckpt_path: A checkpoint that `fit` wrote.
        output: The folder to write; it must not exist or be empty.
        merge_adapter: Fold LoRA weights into the base model; otherwise only the adapter is written.
        student_path: Where the original student lies now, if it has moved since training.
        student_class: Class of the student (my_package.MyStudent), if it is not one of this package.
        trust_remote_code: Whether code that comes with the student's model may run.
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output: {output!r} exists and is not an empty folder. Choose another one.")
    checkpoint = read_checkpoint(ckpt_path)
    description = checkpoint["opd_lightning"]["student"]
    if student_path is not None:
        description = {**description, "init_args": {**description["init_args"], "path": student_path}}
    student = build_student(description, student_class=student_class, trust_remote_code=trust_remote_code)
    model = student.load()
    weights = {
        name.removeprefix("student."): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith("student.")
    }
    result = model.load_state_dict(weights, strict=False)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if result.unexpected_keys or trained & set(result.missing_keys):
        raise ValueError(
            f"ckpt_path: {ckpt_path!r} does not fit the student {description['init_args'].get('path')!r}:"
            f" missing {sorted(trained & set(result.missing_keys))[:3]}, unexpected {result.unexpected_keys[:3]}."
        )
    student.save(model, folder, merge_adapter=merge_adapter)
    print(f"Wrote step {checkpoint['global_step']} of {ckpt_path} to {folder}")
