"""`StudentModule`: a LightningModule that holds a student: loads it, saves it, lets it answer held-out problems.

`OPDModule` adds the training. Problems, engine and task come from the `OPDDataModule` of the same trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from lightning import LightningModule
from torch import Tensor, nn

from opd_lightning.interfaces import PromptBatch, Rollout, Student, Teacher
from opd_lightning.rollouts.answering import Answers, render_prompts
from opd_lightning.training.datamodule import OPDDataModule
from opd_lightning.training.fsdp2 import FSDP2Strategy
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

    teacher: Teacher | None = None

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.spec = student
        self.student: nn.Module | None = None
        self.weight_version = 0
        self.answer_metrics: dict[str, AnswerMetrics] = {}

    @property
    def model(self) -> nn.Module:
        """The loaded student."""
        assert self.student is not None, "the student is loaded by configure_model"
        return self.student

    @property
    def data(self) -> OPDDataModule:
        """The data module of the same trainer.

        Raises:
            ValueError: There is none, or another one.
        """
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(datamodule, OPDDataModule):
            raise ValueError(
                f"datamodule: {type(self).__name__} gets its rollouts from an OPDDataModule; got"
                f" {type(datamodule).__name__}. Pass one to the trainer: trainer.fit(module, datamodule=data)."
            )
        return datamodule

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that training runs in."""
        return self.trainer.precision_plugin.forward_context()

    def announce(self, rollout: Rollout, step: int) -> None:
        """Hear of a rollout as soon as it exists."""

    def setup(self, stage: str) -> None:
        """Refuse precisions that change weights or loss behind the student's back, and students that cannot be cut up.

        Raises:
            ValueError: It is one of them.
        """
        if self.trainer.precision not in PRECISIONS:
            raise ValueError(
                f"trainer.precision={self.trainer.precision!r}: expected {' or '.join(PRECISIONS)}. fp16 would need"
                " loss scaling, which hides skipped steps; the dtype of the weights themselves is student.dtype."
            )
        if isinstance(self.trainer.strategy, FSDP2Strategy) and type(self.spec).shard is Student.shard:
            raise ValueError(
                f"trainer.strategy: fsdp2 cuts the student up, and {type(self.spec).__name__} does not say how. Define"
                " its method shard (Student.shard), or use ddp."
            )

    def configure_model(self) -> None:
        """Load the student (once), and cut it up where the strategy says so."""
        if self.student is None:
            self.student = self.spec.load()
            if self._trainer is not None and isinstance(self.trainer.strategy, FSDP2Strategy):
                self.spec.shard(self.student, self.trainer.strategy.device_mesh["data_parallel"])

    def on_validation_start(self) -> None:
        """Make the engine ready, and have it look at the weights again: averaged ones may be swapped in unannounced."""
        if self.trainer.state.fn != "fit":
            self.data.connect(self, self.device)
        self.answer_metrics.clear()  # another data module may ask for another number of answers
        self.data.invalidate()

    on_test_start = on_predict_start = on_validation_start

    def on_validation_end(self) -> None:
        """Have the engine look again: averaged weights may have been swapped out."""
        self.data.invalidate()

    def on_weights_moved(self) -> None:
        """Called by whoever changes the student's weights outside the optimiser (EffOPD)."""
        self.weight_version += 1

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Answer held-out problems and mark them; return the answers, for callbacks."""
        return {"rollouts": self._answer_and_mark(batch, "validation")}

    def test_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Answer test problems and mark them; return the answers, for callbacks."""
        return {"rollouts": self._answer_and_mark(batch, "test")}

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[Rollout]:
        """Return graded answers."""
        return self.answer_problems(batch, "predict").rollouts

    def on_validation_epoch_end(self) -> None:
        """Log avg@n and pass@n."""
        self.log_answers("val")

    def on_test_epoch_end(self) -> None:
        """Log avg@n and pass@n."""
        self.log_answers("test")

    def answer_problems(self, batch: PromptBatch, purpose: str) -> Answers:
        """Answer problems with the current weights; each sample's seed depends on the problem only, not on the step."""
        data = self.data
        prompts = render_prompts(
            self.spec.tokenizer,
            batch.problems,
            batch.positions,
            num_samples=data.validation_samples,
            seed_parts=(data.seed, purpose),
        )
        return data.answer(prompts, data.validation_sampling, num_samples=data.validation_samples)

    def _answer_and_mark(self, batch: PromptBatch, purpose: str) -> Sequence[Rollout]:
        answers = self.answer_problems(batch, purpose)
        self.study_answers(answers.rollouts)
        groups = answers.by_problem()
        self._answer_metrics("").update(groups)
        sources = {problem.source for problem in self.data.held_out[purpose]}
        for source in sorted(sources) if len(sources) > 1 else ():
            self._answer_metrics(f"{source}/").update([g for g in groups if g[0].problem.source == source])
        return answers.rollouts

    def study_answers(self, rollouts: Sequence[Rollout]) -> None:
        """Look at held-out answers, if there is more to know than their marks."""

    def _answer_metrics(self, prefix: str) -> AnswerMetrics:
        if prefix not in self.answer_metrics:
            self.answer_metrics[prefix] = AnswerMetrics(self.data.validation_samples).to(self.device)
        return self.answer_metrics[prefix]

    def log_answers(self, stage: str) -> None:
        """Log what is known of the held-out answers, and start over."""
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
        self.spec.check_same(checkpoint["opd_lightning"]["student"])
        self.weight_version = checkpoint["opd_lightning"]["weight_version"]
        checkpoint["state_dict"].update(self._frozen_weights())
        saved, own = checkpoint["state_dict"], self.state_dict()
        for name in sorted(saved.keys() | own.keys()):
            shapes = [tuple(weights[name].shape) if name in weights else "absent" for weights in (saved, own)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"ckpt_path: the checkpoint does not fit the student: {name} is"
                    f" {shapes[0]} in the checkpoint and {shapes[1]} in the model. Use the student it was written with."
                )

    def _frozen_weights(self) -> dict[str, Tensor]:
        """Weights that are not trained, by their name in checkpoints; tied ones under all their names."""
        named = self.model.named_parameters(remove_duplicate=False)
        return {f"student.{name}": weight.detach() for name, weight in named if not weight.requires_grad}
