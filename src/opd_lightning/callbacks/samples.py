"""`PrintSamples`: a few rollouts for people to read, each token coloured by its divergence from the teacher."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.text import Text
from torch import Tensor
from typing_extensions import override

from opd_lightning.callbacks.console import say
from opd_lightning.interfaces import Rollout, Tokenizer
from opd_lightning.reports.printable import printable

COLUMNS = ["step", "problem", "prompt", "response", "reward", "loss_per_token", "num_tokens"]
_NOTICEABLE = 0.05  # share of the full scale from which a token is coloured


def divergence_colours(divergence: float, full_scale: float = 1.0) -> str:
    """Background from grey (little) to red (`full_scale` nats and more) and black or white on it, whichever is clearer.

    Both are set, and the grey is half-way, so that it reads alike on dark and on light screens. Tokens with next to no
    divergence keep the screen's own colours.
    """
    share = min(1.0, max(0.0, divergence / full_scale))
    if not share >= _NOTICEABLE:
        return ""
    red, other = round(128 + 72 * share), round(128 * (1 - share))
    foreground = 0 if _luminance(red, other, other) > _EQUAL_CONTRAST else 255
    return f"rgb({foreground},{foreground},{foreground}) on rgb({red},{other},{other})"


_EQUAL_CONTRAST = 0.179  # luminance on which black and white have the same contrast (WCAG 2.2)


def _luminance(*channels: int) -> float:
    """Relative luminance of an sRGB colour, 0 to 1."""
    shares = [channel / 255 for channel in channels]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def coloured_response(tokenizer: Tokenizer, rollout: Rollout, divergences: Tensor) -> Text:
    """The response, token by token, on the colour of its divergence.

    Args:
        tokenizer: Decodes single tokens, special ones included.
        rollout: A rollout of T tokens.
        divergences: [N] nats of the tokens that the student wrote; the others keep the screen's colours.
    """
    text = Text()
    of_all = torch.zeros(len(rollout.response_ids))
    of_all[rollout.trained_positions] = divergences
    for token_id, divergence in zip(rollout.response_ids.tolist(), of_all.tolist(), strict=True):
        token = printable(tokenizer.decode([token_id], skip_special_tokens=False))
        text.append(token, style=divergence_colours(divergence))
    return text


class PrintSamples(Callback):
    """Shows some rollouts of a step: prompt, response coloured by the divergence of each token, reward, mean loss.

    Works with `OPDModule`, whose `training_step` returns the loss of every token. The loss of a direct objective is a
    divergence; that of a score function is a surrogate, so those responses are printed without colours. Loggers that
    hold text get the samples too: TensorBoard, W&B (a table) and MLflow (a text file).

    Args:
        every_n_steps: Print at every so many training batches, the first included.
        num_samples: Rollouts printed.

    Raises:
        ValueError: A number is below 1.
    """

    def __init__(self, every_n_steps: int = 20, num_samples: int = 2) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("num_samples", num_samples)):
            if value < 1:
                raise ValueError(f"PrintSamples.{name}: expected an integer of at least 1, got {value}.")
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch.step % self.every_n_steps or not trainer.is_global_zero:
            return
        tokenizer: Tokenizer = pl_module.spec.tokenizer  # type: ignore[union-attr, assignment]
        is_divergence = pl_module.objective.value_is_divergence  # type: ignore[union-attr]
        found = {_key(trained.rollout): trained.losses for trained in outputs["facts"].rollouts}
        rows = []
        for rollout in batch.rollouts[: self.num_samples]:
            losses, step = found[_key(rollout)], batch.step + 1
            prompt = printable(str(rollout.problem.messages[-1]["content"]).strip())
            uid, loss = printable(rollout.problem.uid), float(losses.mean()) if len(losses) else None
            reward = None if math.isnan(rollout.reward) else rollout.reward  # a task without answers gives none
            marked = "" if reward is None else f"  reward {reward:.2f}"
            header = Text(f"step {step}  {uid}{marked}", style="bold")
            trained = "left out" if loss is None else f"loss/token {loss:.4f}  tokens {len(losses)}"
            header.append(f"  {trained}", style="not bold")
            response = coloured_response(tokenizer, rollout, losses) if is_divergence else Text(printable(rollout.text))
            say(trainer, header, Text(prompt, style="dim"), response)
            rows.append([step, uid, prompt, response.plain, reward, loss, len(losses)])
        for logger in trainer.loggers:
            log_samples(logger, rows, step=trainer.global_step)


def _key(rollout: Rollout) -> tuple[str, int, tuple[int, ...]]:
    """What tells a rollout of a step apart: in files that others wrote all may have the same seed."""
    return rollout.problem.uid, rollout.seed, tuple(rollout.response_ids.tolist())


def log_samples(logger: Any, rows: list[list[Any]], step: int) -> None:
    """Give rows of `COLUMNS` to a logger, if it can hold text; known by its methods, as the packages may be absent."""
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(logger, "log_table"):  # W&B
        logger.log_table(key="samples", columns=COLUMNS, data=rows, step=step)
    elif hasattr(experiment, "add_text"):  # TensorBoard, which shows Markdown: indented text is left as it is
        text = _as_text(rows).replace("\n", "\n    ")
        experiment.add_text("samples", f"    {text}", step)
    elif hasattr(experiment, "log_text") and hasattr(logger, "run_id"):  # MLflow
        experiment.log_text(logger.run_id, _as_text(rows), f"samples/step_{step:06d}.txt")


def _as_text(rows: list[list[Any]]) -> str:
    known = [
        [f"{name}: {value}" for name, value in zip(COLUMNS, row, strict=True) if value is not None] for row in rows
    ]
    return "\n\n".join("\n".join(lines) for lines in known)
