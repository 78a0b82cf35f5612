"""`StudentModule`: a LightningModule that holds a student: loads it, saves it, lets it answer held-out problems.

`OPDModule` adds the training. Problems, engine and task come from the `OPDDataModule` of the same trainer.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from opd_lightning.interfaces import PromptBatch, Rollout, Student
from opd_lightning.rollouts.answering import Answers, answer, render_prompts
from opd_lightning.training.metrics import AnswerMetrics

PRECISIONS = ("32-true", "bf16-mixed")


class StudentModule(LightningModule):
    """Holds the student and answers problems with it.

    Checkpoints contain the trained weights only (frozen ones, as under LoRA, are read again from their source) and say
    which student they belong to.

    Args:
        student: What to load, and how to run it.

    Attributes:
        student: The loaded model; None before `configure_model`.
        weight_version: Counts the changes of the student's weights; rollouts carry the version that made them.
    """

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.spec = student
        self.student: nn.Module | None = None
        self.weight_version = 0
        self.answer_metrics: dict[str, AnswerMetrics] = {}

    def setup(self, stage: str) -> None:
        """Refuse precisions that would change the weights or the loss behind the student's back."""
        if self.trainer.precision not in PRECISIONS:
            raise ValueError(
                f"trainer.precision={self.trainer.precision!r}: expected {' or '.join(PRECISIONS)}. fp16 would need"
                " loss scaling, which hides skipped steps; the dtype of the weights themselves is student.dtype."
            )

    def configure_model(self) -> None:
        """Load the student (once)."""
        if self.student is None:
            self.student = self.spec.load()

    def on_validation_start(self) -> None:
        """Make the engine ready, and have it look at the weights again: averaged ones may be swapped in unannounced."""
        if self.trainer.state.fn != "fit":
            self._data.engine.setup(self.spec, self.device)
        self._data.engine.invalidate()

    on_test_start = on_predict_start = on_validation_start

    def on_validation_end(self) -> None:
        """Have the engine look again: averaged weights may have been swapped out."""
        self._data.engine.invalidate()

    def on_weights_moved(self) -> None:
        """Called by whoever changes the student's weights outside the optimiser (EffOPD)."""
        self.weight_version += 1

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Answer held-out problems and mark them."""
        self._answer_and_mark(batch, "validation")

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Answer test problems and mark them."""
        self._answer_and_mark(batch, "test")

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[Rollout]:
        """Return graded answers."""
        return self.answer_problems(batch, "predict").rollouts

    def on_validation_epoch_end(self) -> None:
        """Log avg@n and pass@n."""
        self._log_answers("val")

    def on_test_epoch_end(self) -> None:
        """Log avg@n and pass@n."""
        self._log_answers("test")

    def answer_problems(self, batch: PromptBatch, purpose: str) -> Answers:
        """Answer problems with the current weights; each sample's seed depends on the problem only, not on the step."""
        data = self._data
        data.engine.sync(self.student, self.weight_version)
        prompts = render_prompts(
            self.spec.tokenizer,
            batch.problems,
            batch.positions,
            num_samples=data.validation_samples,
            seed_parts=(data.seed, purpose),
        )
        with torch.no_grad():
            return answer(
                data.engine, data.task, prompts, data.validation_sampling, num_samples=data.validation_samples
            )

    def _answer_and_mark(self, batch: PromptBatch, purpose: str) -> None:
        groups = self.answer_problems(batch, purpose).by_problem()
        self._answer_metrics("").update(groups)
        sources = {problem.source for problem in self._data.held_out[purpose]}
        for source in sorted(sources) if len(sources) > 1 else ():
            self._answer_metrics(f"{source}/").update([g for g in groups if g[0].problem.source == source])

    def _answer_metrics(self, prefix: str) -> AnswerMetrics:
        if prefix not in self.answer_metrics:
            self.answer_metrics[prefix] = AnswerMetrics(self._data.validation_samples).to(self.device)
        return self.answer_metrics[prefix]

    def _log_answers(self, stage: str) -> None:
        for prefix, metric in self.answer_metrics.items():
            for name, value in metric.compute().items():
                shown = not prefix and (
                    name.startswith("avg_at") or (name.startswith("pass_at") and name != "pass_at_1")
                )
                self.log(f"{stage}/{prefix}{name}", value, prog_bar=shown, batch_size=1, sync_dist=True)
            metric.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say which student this is, at which version; leave weights out that are never trained."""
        assert self.student is not None
        checkpoint["opd_lightning"] = {
            "student": self.spec.describe(),
            "weight_version": self.weight_version,
        }
        for name in self._frozen_weights().keys() & checkpoint["state_dict"].keys():
            del checkpoint["state_dict"][name]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the version and put the frozen weights back in, so that loading stays strict.

        Raises:
            ValueError: The checkpoint belongs to another student, or to none.
        """
        if "opd_lightning" not in checkpoint:
            raise ValueError("ckpt_path: not a checkpoint of opd_lightning (it has no 'opd_lightning' entry).")
        self._check_student(checkpoint["opd_lightning"]["student"]["init_args"])
        self.weight_version = checkpoint["opd_lightning"]["weight_version"]
        checkpoint["state_dict"].update(self._frozen_weights())
        saved, own = checkpoint["state_dict"], self.state_dict()
        for name in sorted(saved.keys() | own.keys()):
            shapes = [tuple(weights[name].shape) if name in weights else "absent" for weights in (saved, own)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"ckpt_path: the checkpoint does not fit student.path={self._describe().get('path')!r}: {name} is"
                    f" {shapes[0]} in the checkpoint and {shapes[1]} in the model. Use the student it was written with."
                )

    def _check_student(self, saved: dict[str, Any]) -> None:
        own = self._describe()
        for name in ("lora", "adapter_path"):
            if saved.get(name) != own.get(name):
                raise ValueError(
                    f"student.{name}: the checkpoint was written with {saved.get(name)}, this run has {own.get(name)}."
                    " Use the same student."
                )
        if saved.get("path") != own.get("path"):
            warnings.warn(
                f"student.path: the checkpoint was written with {saved.get('path')!r}, this run has"
                f" {own.get('path')!r}. Fine if the folder has only moved: tokenizer, configuration and frozen weights"
                " come from there.",
                stacklevel=2,
            )

    def _describe(self) -> dict[str, Any]:
        arguments: dict[str, Any] = self.spec.describe()["init_args"]
        return arguments

    def _frozen_weights(self) -> dict[str, Tensor]:
        """Weights that are not trained, by their name in checkpoints; tied ones under all their names."""
        assert self.student is not None
        named = self.student.named_parameters(remove_duplicate=False)
        return {f"student.{name}": weight.detach() for name, weight in named if not weight.requires_grad}

    @property
    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]
