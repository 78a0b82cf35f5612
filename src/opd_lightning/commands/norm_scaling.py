"""The two questions to a run's weights that need answers: does the early direction do, and do the embeddings matter?

Both are asked on the run's own held-out problems, with its engine, sampling and teacher (arXiv 2605.11739, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from typing_extensions import override

from opd_lightning.callbacks.effopd_scores import divergence_from_teacher, divergence_to_measure
from opd_lightning.commands.update_geometry import AVERAGED
from opd_lightning.training.module import OPDModule
from opd_lightning.training.weight_updates import WeightUpdates, kind_of, plain_name


@dataclass(frozen=True)
class Variant:
    """Weights to try.

    Attributes:
        label: What they are.
        point: Which point of the run their update is taken from.
        scale: Its size in that of the last point, matrix by matrix; None leaves it as it is.
        scales_all: Scale embeddings and norms too, and not the attention and MLP matrices only.
        keeps_embeddings: Embedding and head stay at the start.
        accuracy: Mean mark of the answers; None for a task without marks.
        reverse_kl: To the teacher, per response token in nats; None without a teacher.
        num_answers: Answers behind both.
    """

    label: str
    point: int
    scale: float | None = None
    scales_all: bool = False
    keeps_embeddings: bool = False
    accuracy: float | None = None
    reverse_kl: float | None = None
    num_answers: int = 0


def variants(updates: WeightUpdates, early: int, scales: Sequence[float]) -> list[Variant]:
    """Start and end, the early update at every scale, and the end with the embeddings of the start."""
    step, last = updates.steps[early], len(updates.points) - 1
    listed = [
        Variant("start", last, 0.0, scales_all=True),
        Variant("end", last),
        Variant(f"step {step} as it was", early),
    ]
    listed += [Variant(f"step {step}, scale {scale:g}", early, scale) for scale in scales]
    kinds = {kind_of(name) for name in updates.shapes}
    if kinds - set(AVERAGED):
        listed.append(Variant(f"step {step}, scale 1, embeddings and norms too", early, 1.0, scales_all=True))
    if "embedding" in kinds:
        listed.append(Variant("end, embeddings of the start", last, keeps_embeddings=True))
    return listed


class WeightsOfVariant:
    """Writes the weights of a variant into a model, one after the other.

    Args:
        updates: Of all trained weights, matrices or not.

    Raises:
        ValueError: The points do not hold what is needed for it.
    """

    def __init__(self, updates: WeightUpdates) -> None:
        last = updates.points[-1]
        if last.holds_updates:
            raise ValueError(
                "config: records of UpdateRecorder hold some weights only, and these cannot be scaled alone. Set"
                " --points_from checkpoints, or leave --config out."
            )
        if last.factors and updates.start is not None:
            raise ValueError(
                "config: the run went on with a saved adapter, and a sum of two adapters cannot be scaled as one. Leave"
                " --config out."
            )
        self._updates = updates
        self._sizes: dict[tuple[int, str], float] = {}

    @torch.no_grad()
    def write(self, variant: Variant, model: nn.Module) -> None:
        """Write them.

        Raises:
            ValueError: The model has a trained weight that the run does not know.
        """
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(self._weight(variant, name, parameter))

    def _weight(self, variant: Variant, name: str, parameter: Tensor) -> Tensor:
        updates, point = self._updates, self._updates.points[variant.point]
        for matrix, factors in point.factors.items():
            for letter, stored in factors.items():
                if plain_name(stored) == plain_name(name):
                    factor = point.stored.read(stored).double()
                    return factor * self._factor(variant, matrix) if letter == "B" else factor
        known = plain_name(name)
        if known not in updates.shapes or updates.shapes[known] != tuple(parameter.shape) or updates.start is None:
            raise ValueError(
                f"config: its student trains {known} {list(parameter.shape)}, which this run has not. Set --config to"
                " the config.yaml of the run."
            )
        start = updates.start.stored.read(updates.start.plain[known]).double()
        if variant.keeps_embeddings and kind_of(known) == "embedding":
            return start
        return start + self._factor(variant, known) * updates.update(variant.point, known)

    def _factor(self, variant: Variant, name: str) -> float:
        is_averaged = kind_of(name) in AVERAGED and len(self._updates.shapes[name]) > 1  # q_norm is no matrix
        if variant.scale is None or not (variant.scales_all or is_averaged):
            return 1.0
        own = self._size(variant.point, name)
        return variant.scale * self._size(len(self._updates.points) - 1, name) / own if own > 0 else 0.0

    def _size(self, point: int, name: str) -> float:
        if (point, name) not in self._sizes:
            self._sizes[point, name] = float(torch.linalg.vector_norm(self._updates.update(point, name)))
        return self._sizes[point, name]


class _Trials(Callback):
    """Answers every batch of held-out problems with every variant."""

    def __init__(self, listed: Sequence[Variant], weights: WeightsOfVariant, say: Callable[[str], None]) -> None:
        self.sums = [{"reward": 0.0, "answers": 0, "divergence": 0.0, "tokens": 0} for _ in listed]
        self._listed, self._weights, self._say = listed, weights, say

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, OPDModule)
        if pl_module.teacher is not None:
            if (request := divergence_to_measure(pl_module).request()) is not None:
                pl_module.teacher.check(request)
            pl_module.load_teacher()

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(pl_module, OPDModule)
        for variant, sums in zip(self._listed, self.sums, strict=True):
            self._say(f"batch {batch_idx + 1}: {variant.label}")
            self._weights.write(variant, pl_module.model)
            pl_module.on_weights_moved()
            pl_module.data.invalidate()
            with trainer.precision_plugin.forward_context():
                rollouts = pl_module.answer_problems(batch, "validation").rollouts
                sums["reward"] += sum(rollout.reward for rollout in rollouts)  # NaN without marks
                sums["answers"] += len(rollouts)
                if pl_module.teacher is not None:
                    told = pl_module.give_context(rollouts, pl_module.data.validation_samples)
                    divergence, num_tokens = divergence_from_teacher(pl_module, told)
                    sums["divergence"] += divergence
                    sums["tokens"] += num_tokens


def try_variants(
    config: str,
    updates: WeightUpdates,
    listed: Sequence[Variant],
    num_problems: int | None = None,
    say: Callable[[str], None] = lambda words: None,
) -> list[Variant]:
    """Answer the run's held-out problems with every variant of its weights.

    Args:
        config: The run's settings.
        updates: Of all its weights.
        listed: What to try.
        num_problems: How many problems; None takes as many as the settings say.
        say: Told what is being done.

    Returns:
        The variants, with what came of them.

    Raises:
        ValueError: The settings do not fit the run.
    """
    from opd_lightning.commands.cli import OPDCLI  # it imports every command, this one too

    class OnlySettings(OPDCLI):
        """Builds everything and runs nothing; writes nothing either."""

        @override
        def _run_subcommand(self, subcommand: str) -> None:
            pass

        @override
        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            self.save_config_callback = None
            self.trainer_defaults = {**self.trainer_defaults, "callbacks": []}
            return super().instantiate_trainer(**kwargs)

    words = ["validate", "--config", config, "--ckpt_path", "null", "--trainer.callbacks", "null"]
    words += ["--trainer.logger", "false", "--trainer.devices", "1", "--trainer.strategy", "auto"]
    words += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    words += ["--trainer.limit_val_batches", "1.0"]
    words += [] if num_problems is None else ["--data.num_validation_problems", str(num_problems)]
    weights = WeightsOfVariant(updates)
    built = OnlySettings(words)
    trials = _Trials(listed, weights, say)
    built.trainer.callbacks.append(trials)  # type: ignore[attr-defined]
    built.trainer.validate(built.model, datamodule=built.datamodule, verbose=False)
    return [_result(variant, sums) for variant, sums in zip(listed, trials.sums, strict=True)]


def _result(variant: Variant, sums: dict[str, float]) -> Variant:
    accuracy = sums["reward"] / sums["answers"] if sums["answers"] else math.nan
    return replace(
        variant,
        accuracy=None if math.isnan(accuracy) else accuracy,
        reverse_kl=sums["divergence"] / sums["tokens"] if sums["tokens"] else None,
        num_answers=int(sums["answers"]),
    )


def recovered(here: float | None, start: float | None, end: float | None) -> float | None:
    """Share of the way from start to end; None where it is not known, or there was no way."""
    if here is None or start is None or end is None or start == end:
        return None
    return (here - start) / (end - start)
