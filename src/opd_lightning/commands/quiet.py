"""What other packages print that no user of ours can act on: advertisements, and warnings that mislead here."""

from __future__ import annotations

import logging
import warnings

from opd_lightning.interfaces.addresses import without_secrets

MISLEADING_WARNINGS = (
    ".*but no pre-optimization state was saved.*",  # the weights after the step are the ones wanted
    ".*Experiment logs directory .* exists and is not empty.*",  # the other logger has just made it
    ".*treespec, LeafSpec.*",
    ".*LightningCLI's args parameter is intended to run.*",
    ".*The dirpath has changed from.*",  # of the checkpoint callback, which evaluation does not use
)
TALKATIVE = r"(lightning|pytorch_lightning|torch|torchmetrics|transformers|peft|jsonargparse)(\.|$)"


def be_quiet() -> None:
    """Silence them for this process."""
    for message in MISLEADING_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for category in (FutureWarning, DeprecationWarning):  # what these packages must change in themselves
        warnings.filterwarnings("ignore", category=category, module=TALKATIVE)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_says_something)


def _says_something(record: logging.LogRecord) -> bool:
    message = without_secrets(record.getMessage())  # Lightning says where it reads checkpoints
    record.msg, record.args = message, ()
    return "💡 Tip" not in message and not message.startswith("TPU available: False")
