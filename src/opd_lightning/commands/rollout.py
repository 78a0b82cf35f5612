"""`opd-lightning rollout`: the teacher or the student answers the prompts of a split, into a file to learn from."""

from __future__ import annotations

from pathlib import Path

from lightning import Trainer
from lightning.pytorch.callbacks import ProgressBar

from opd_lightning.callbacks.rescue import RescueCheckpoint, trainer_callbacks
from opd_lightning.commands.recorder import Recorder, Role
from opd_lightning.commands.scorer import Scorer
from opd_lightning.interfaces import Sampling, ScoreRequest, Split, Student
from opd_lightning.interfaces.arguments import check_at_least
from opd_lightning.rollouts.answer_files import check_ending
from opd_lightning.rollouts.rejection import Rejection
from opd_lightning.training.datamodule import OPDDataModule
from opd_lightning.training.output_paths import check_file
from opd_lightning.training.pair_module import PairModule

_NEEDED_CALLBACKS = (ProgressBar, RescueCheckpoint)  # the others are about training


class RolloutTrainer(Trainer):
    """Lightning's trainer with one verb more."""

    def rollout(
        self,
        model: PairModule,
        datamodule: OPDDataModule,
        output: str,
        role: Role = "teacher",
        split: Split = "train",
        num_problems: int | None = None,
        num_samples: int = 1,
        num_attempts: int = 3,
        sampling: Sampling | None = None,
        reject: Rejection = Rejection(),  # noqa: B008 - frozen
        score: bool = False,
        score_top_k: int = 0,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Have the teacher or the student answer the prompts of a split, into a file to learn from.

        A run that was stopped goes on where it was when the same command is given again.

        Args:
            model: Holds student and teacher.
            datamodule: Holds task and engine; `validation_batch_size` problems are answered and written at once.
            output: File to write, ending in .jsonl or .parquet (docs/cold_start.md).
            role: Who answers: "teacher" or "student".
            split: Whose prompts.
            num_problems: Only the first so many of them; null is all.
            num_samples: Answers wanted of each problem.
            num_attempts: Most answers asked for each one that is kept.
            sampling: How answers are sampled; null is data.sampling.
            reject: Rules for answers that are not kept.
            score: Also write what the teacher says of each token, for a StoredTeacher.
            score_top_k: Its likeliest tokens to write at each place, beside the token itself.
            ckpt_path: Checkpoint with the student's weights; not for the teacher.
            weights_only: Always true: what a checkpoint says is not run.
        """
        check_at_least(1, "rollout", num_problems=num_problems, num_samples=num_samples, num_attempts=num_attempts)
        if str(self.limit_predict_batches) not in ("None", "1.0"):  # 1 is a single batch, and equal to 1.0
            raise ValueError(
                f"trainer.limit_predict_batches={self.limit_predict_batches} (fast_dev_run sets it): the file would"
                " count as complete without the problems that were never asked. Leave it out and set --num_problems."
            )
        output = str(Path(output).expanduser())
        check_ending("output", output)
        check_file("output", output)
        sampling = sampling if sampling is not None else datamodule.sampling
        if sampling.temperature == 0 and num_samples > 1:
            raise ValueError(
                f"rollout.num_samples={num_samples}: at temperature 0 all answers to a problem are the same. Set"
                " sampling.temperature, or num_samples: 1."
            )
        if role == "teacher" and ckpt_path is not None:
            raise ValueError("ckpt_path: a checkpoint holds the student's weights. Set role: student, or leave it out.")
        recorder = Recorder(
            answerer(model, role),
            role,
            output,
            reject,
            num_problems=num_problems,
            num_samples=num_samples,
            num_attempts=num_attempts if sampling.temperature else 1,  # greedy answers stay what they are
            ckpt_path=ckpt_path,
            scorer=scorer(model, score, score_top_k),
        )
        # the data module answers a held-out split; this one is asked like one
        datamodule.predict_split, datamodule.validation_sampling = split, sampling
        self.callbacks = [each for each in trainer_callbacks(self) if isinstance(each, _NEEDED_CALLBACKS)]
        self.loggers = []  # the file says itself how it was made
        Path(output).absolute().parent.mkdir(parents=True, exist_ok=True)
        try:
            self.predict(
                recorder, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True, return_predictions=False
            )
        finally:
            recorder.close()  # Lightning tears nothing down after an error
        recorder.report()


def answerer(model: PairModule, role: Role) -> Student:
    """Who answers, as something that an engine can generate with.

    Raises:
        ValueError: There is no teacher, or it only scores.
    """
    if role == "student":
        return model.spec
    if model.teacher is None:
        raise ValueError("model.teacher: there is none to answer. Set one, or role: student.")
    return model.teacher.as_answerer(model.spec)


def scorer(model: PairModule, score: bool, top_k: int) -> Scorer | None:
    """Who scores the answers, at the objective's teacher temperature; None when nobody does.

    Raises:
        ValueError: There is no teacher, or nobody is asked for lists.
    """
    check_at_least(0, "rollout", score_top_k=top_k)
    if not score:
        if top_k:
            raise ValueError(f"rollout.score_top_k={top_k}: without scores there are no lists. Set score: true.")
        return None
    if model.teacher is None:
        raise ValueError("model.teacher: there is none to score the answers. Set one, or score: false.")
    asked = model.objective.request()
    temperature = 1.0 if asked is None else asked.temperature
    return Scorer(model.teacher, ScoreRequest(top_k=top_k, temperature=temperature), model.max_tokens_per_micro_batch)
