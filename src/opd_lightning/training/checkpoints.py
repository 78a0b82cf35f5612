"""Lightning checkpoints on disk: written whole or not at all, checked, and turned into a Hugging Face folder.

Loading never unpickles foreign objects (`weights_only=True`) and imports no class that a checkpoint names unless it is
one of ours, or the user names it too.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.fabric.plugins import TorchCheckpointIO
from torch import nn
from typing_extensions import override

from opd_lightning.interfaces import Student
from opd_lightning.training.checkpoint_files import check_checkpoint_file, fetched, is_remote, load_plain
from opd_lightning.training.output_paths import check_folder, free_space
from opd_lightning.training.sharded_checkpoints import is_sharded_checkpoint, read_whole
from opd_lightning.whole_files import written_whole

_PART = ".part"
_ABANDONED_AFTER = 600.0  # seconds without a write; a checkpoint that is being written grows all the time


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and then renames it, so that it is there whole or not at all.

    Lightning's own way builds the file in memory, twice, and moves it through the system's temporary folder. That one
    may be small, or on another disk, where moving is copying and can stop half-way. What a killed run left half-written
    is removed by the next save into the folder. Files elsewhere (``s3://...``) are left to Lightning. Loading runs
    nothing that a checkpoint brings, and believes no damaged one, wherever it lies.
    """

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint from a file or an address; tensors and plain values only, whatever `weights_only` says.

        Raises:
            ValueError: It is absent, damaged, or holds other objects too.
        """
        if not is_remote(path) and is_sharded_checkpoint(Path(path)):
            return read_whole(Path(path))
        with fetched(path) as file:
            check_checkpoint_file(file, path)
            return load_plain(file, path, map_location=map_location)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the checkpoint; when that fails, what was at its place before is still there.

        Raises:
            OSError: The disk is full, or the folder cannot be written to.
        """
        if is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _sweep(target.parent)
            with written_whole(target, _PART) as file:
                torch.save(checkpoint, file)
                if is_sharded_checkpoint(target):  # no file can take a folder's place
                    file.flush()
                    os.fsync(file.fileno())
                    shutil.rmtree(target)
            _flush_folder(target.parent)
        except (OSError, RuntimeError) as error:
            reason = error.__context__ if isinstance(error, RuntimeError) else error  # torch puts its own in front
            if isinstance(reason, KeyboardInterrupt):
                raise reason from None
            if not isinstance(reason, OSError):
                raise
            raise OSError(
                f"the checkpoint {str(target)!r} cannot be saved: {reason.strerror} ({free_space(target.parent)})."
                " Earlier checkpoints are as they were: make room or mend the disk, and resume with --ckpt_path and the"
                " last of them."
            ) from error


def _sweep(folder: Path) -> None:
    """Remove what earlier runs began to write and did not finish."""
    for part in folder.glob(f"*.ckpt{_PART}"):
        with suppress(OSError):  # somebody else's, or just swept by another process
            if time.time() - part.stat().st_mtime > _ABANDONED_AFTER:
                part.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Have a new name survive a power failure too; systems that cannot open folders do without."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_checkpoint(path: str | Path, *, needs_weights: bool = True) -> dict[str, Any]:
    """Read a checkpoint of `OPDModule` onto the CPU; tensors come from the disk only when they are used.

    Args:
        path: A file, or a folder of shards: of that the weights only are put together, and only if they are needed.
        needs_weights: Whether weights will be looked at.

    Raises:
        ValueError: It is absent, damaged, or was written by something else.
    """
    checkpoint = open_checkpoint(path, needs_weights=needs_weights)
    if "opd_lightning" not in checkpoint:
        raise ValueError(f"ckpt_path: {str(path)!r} was not written by OPDModule (no 'opd_lightning' entry).")
    return checkpoint


def open_checkpoint(path: str | Path, *, needs_weights: bool = True) -> dict[str, Any]:
    """`read_checkpoint` for checkpoints of any module."""
    if not is_remote(path) and is_sharded_checkpoint(Path(path)):
        return read_whole(Path(path), only=["state_dict"] if needs_weights else [])
    with fetched(path) as file:
        check_checkpoint_file(file, path)
        return load_plain(file, path, mmap=not is_remote(path))


def check_resumable(checkpoint: dict[str, Any]) -> None:
    """Raise a ValueError when a checkpoint that is to be resumed holds weights only."""
    if "optimizer_states" not in checkpoint:
        raise ValueError(
            "ckpt_path: the checkpoint holds weights only (save_weights_only), and fit needs the optimiser's state too."
            " Start a new run from its weights (opd-lightning export, then student.path)."
        )


def build_student(
    description: dict[str, Any],
    *,
    student_class: str | None = None,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
) -> Student:
    """Build the student a checkpoint describes.

    Args:
        description: What `Student.describe` returned.
        student_class: Where a class that is not ours lies: a checkpoint alone does not say what to import.
        trust_remote_code: Whether code that comes with the model may run; what the checkpoint says does not count.
        chat_template: Text or file that takes the place of the template of training.

    Raises:
        ValueError: The class is not part of this package and was not named, or is another one; or the checkpoint names
            a file as chat template.
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
    if chat_template is not None:
        arguments["chat_template"] = chat_template
    elif "{" not in (named := arguments.get("chat_template") or "{"):
        raise ValueError(
            f"ckpt_path: the checkpoint names the file {named!r} as chat template, and a checkpoint is not trusted to"
            " say which files are read. If it is the right one, say so: --chat_template and the file."
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--student", type=Student)  # unlike add_subclass_arguments, takes no file names for settings
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
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    student_path: str | None = None,
    student_class: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
) -> None:
    """Write the student of a checkpoint as a Hugging Face folder that `from_pretrained` and vLLM load.

    Args:
        ckpt_path: A checkpoint that `fit` wrote.
        output: The folder to write; it must not exist or be empty.
        merge_adapter: Fold LoRA weights into the base model; otherwise only the adapter is written.
        dtype: Dtype of the written weights; null keeps that of training.
        student_path: Where the original student lies now, if it has moved since training.
        student_class: Class of the student (my_package.MyStudent), if it is not one of this package.
        chat_template: Template to write, as text or as a file; null writes that of training.
        trust_remote_code: Whether code that comes with the student's model may run.
        push_to_hub: Also upload the folder to this repository on the Hugging Face hub, such as me/my-student.
        private: Make that repository private if it is new.
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output: {output!r} exists and is not an empty folder. Choose another one.")
    check_folder("output", folder)
    if private and push_to_hub is None:
        raise ValueError("private: it is about the repository of push_to_hub, which is not set. Set both, or neither.")
    checkpoint = read_checkpoint(ckpt_path)
    if push_to_hub is not None:
        from opd_lightning.backends.hf.hub import check_hub, push_folder

        check_hub(push_to_hub)
    student, model = _load_student(
        checkpoint,
        ckpt_path,
        student_path,
        student_class=student_class,
        chat_template=chat_template,
        trust_remote_code=trust_remote_code,
    )
    student.save(model, folder, merge_adapter=merge_adapter, dtype=dtype)
    print(f"Wrote step {checkpoint['global_step']} of {ckpt_path} to {folder}")
    if push_to_hub is not None:
        print(f"Pushed to {push_folder(folder, push_to_hub, private=private)}")


def _load_student(
    checkpoint: dict[str, Any],
    ckpt_path: str,
    student_path: str | None,
    **options: Any,
) -> tuple[Student, nn.Module]:
    """The student that a checkpoint describes, and its model with the weights of the checkpoint."""
    description = checkpoint["opd_lightning"]["student"]
    if student_path is not None:
        description = {**description, "init_args": {**description["init_args"], "path": student_path}}
    path = description["init_args"].get("path")
    try:
        student = build_student(description, **options)
        model = student.load()
    except ValueError as error:
        if not str(error).startswith("student.path"):
            raise
        hint = "" if student_path else f" The run had its student at {path!r}: if that has moved, add --student_path."
        raise ValueError(f"{str(error).replace('student.path', 'student_path', 1)}{hint}") from error
    weights = {
        name.removeprefix("student."): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith("student.")
    }
    result = model.load_state_dict(weights, strict=False)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if result.unexpected_keys or trained & set(result.missing_keys):
        raise ValueError(
            f"ckpt_path: {ckpt_path!r} does not fit the student {path!r}:"
            f" missing {sorted(trained & set(result.missing_keys))[:3]}, unexpected {result.unexpected_keys[:3]}."
        )
    return student, model
