"""`PrintSamples`: a few rollouts on the console, each token coloured by its divergence from the teacher."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.text import Text
from torch import Tensor
from typing_extensions import override

from opd_lightning.interfaces import Rollout, Tokenizer


def divergence_colour(divergence: float, full_scale: float = 1.0) -> str:
    """Background colour from black (0 nats) to red (`full_scale` nats and more)."""
    share = min(1.0, max(0.0, divergence / full_scale))
    return f"on rgb({int(200 * share)},0,0)"


def coloured_response(tokenizer: Tokenizer, rollout: Rollout, divergences: Tensor) -> Text:
    """The response, token by token, on the colour of its divergence.

    Args:
        tokenizer: Decodes single tokens, special ones included.
        rollout: A rollout of T tokens.
        divergences: [T] nats.
    """
    text = Text()
    for token_id, divergence in zip(rollout.response_ids.tolist(), divergences.tolist(), strict=True):
        text.append(tokenizer.decode([token_id], skip_special_tokens=False), style=divergence_colour(divergence))
    return text


class PrintSamples(Callback):
    """Prints some rollouts of a step: prompt, response coloured by the divergence of each token, reward, mean loss.

    Works with `OPDModule`, whose `training_step` returns the loss of every token. The loss of a direct objective is a
    divergence; that of a score function is a surrogate, so those responses are printed without colours.

    Args:
        every_n_steps: Print at every so many training batches, the first included.
        num_samples: Rollouts printed.
        console: Where to print; None is standard output.

    Raises:
        ValueError: A number is below 1.
    """

    def __init__(self, every_n_steps: int = 20, num_samples: int = 2, console: Console | None = None) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("num_samples", num_samples)):
            if value < 1:
                raise ValueError(f"PrintSamples.{name}: expected an integer of at least 1, got {value}.")
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples
        self.console = console if console is not None else Console()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch.step % self.every_n_steps or not trainer.is_global_zero:
            return
        tokenizer: Tokenizer = pl_module.spec.tokenizer  # type: ignore[union-attr, assignment]
        by_seed = {rollout.seed: losses for rollout, losses in outputs["token_losses"]}
        for rollout in batch.rollouts[: self.num_samples]:
            losses = by_seed[rollout.seed]
            header = Text(f"step {batch.step + 1}  {rollout.problem.uid}  reward {rollout.reward:.2f}", style="bold")
            header.append(f"  loss/token {losses.mean():.4f}  tokens {len(losses)}", style="not bold")
            self.console.print(header)
            self.console.print(Text(str(rollout.problem.messages[-1]["content"]).strip(), style="dim"))
            if pl_module.objective.estimator == "direct":  # type: ignore[union-attr]
                self.console.print(coloured_response(tokenizer, rollout, losses))
            else:
                self.console.print(Text(rollout.text))
