"""Settings of the trainer that Lightning would answer with a traceback, or by doing something else than was meant."""

from __future__ import annotations

import re
from typing import Any

from opd_lightning.training.output_paths import check_folder

_DEVICES = re.compile(r"auto|-1|\d+|\d+(,\d+)*,?")


def check_trainer(settings: Any) -> None:
    """Refuse them.

    Args:
        settings: The settings of the trainer, as parsed.

    Raises:
        ValueError: One of them; the message names it and says what to use instead.
    """
    if settings.gradient_clip_val:
        raise ValueError("trainer.gradient_clip_val: OPDModule clips by itself. Set model.gradient_clip_norm instead.")
    if settings.accumulate_grad_batches != 1:
        raise ValueError(
            "trainer.accumulate_grad_batches: OPDModule cuts a step into micro-batches of"
            " model.max_tokens_per_micro_batch tokens by itself. For more prompts per step raise data.prompts_per_step."
        )
    interval = settings.val_check_interval
    if isinstance(interval, int | float) and interval <= 0:
        raise ValueError(
            f"trainer.val_check_interval: expected a number of steps of at least 1, or a share of a pass in (0, 1], got"
            f" {interval}. To leave validation out set trainer.limit_val_batches: 0."
        )
    if settings.check_val_every_n_epoch is not None and settings.check_val_every_n_epoch < 1:
        raise ValueError(
            "trainer.check_val_every_n_epoch: expected a number of passes of at least 1, or null to count steps with"
            f" val_check_interval; got {settings.check_val_every_n_epoch}."
        )
    devices = settings.devices
    if isinstance(devices, str) and not _DEVICES.fullmatch(devices.replace(" ", "")):
        raise ValueError(
            f"trainer.devices: expected a number, a list such as 0,1, -1 for all, or auto; got {devices!r}."
        )
    if settings.default_root_dir is not None:
        check_folder("trainer.default_root_dir", settings.default_root_dir)
    for part, argument in (("callbacks", "dirpath"), ("logger", "save_dir")):
        for arguments in arguments_of(settings.get(part)):
            if arguments.get(argument):
                check_folder(f"trainer.{part}.{argument}", arguments.get(argument))


def arguments_of(classes: Any) -> list[Any]:
    """The arguments of the classes under one setting, which may hold one class, a list, or none (true, false, null)."""
    parts = classes if isinstance(classes, list) else [classes]
    return [part.init_args for part in parts if hasattr(part, "init_args")]
