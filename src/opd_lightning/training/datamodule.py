"""`OPDDataModule`: which prompts next, and what the student answers to them.

The loader yields prompts only. Generation happens in `on_after_batch_transfer`, which Lightning calls immediately
before `training_step` whatever its fetcher does: a step's rollouts come from its own weights, unless the source says
how stale they are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
from lightning import LightningDataModule

from opd_lightning.distributed import gather_objects
from opd_lightning.interfaces import (
    LiveStudent,
    Problem,
    Prompt,
    PromptBatch,
    PromptSelector,
    RolloutBatch,
    RolloutEngine,
    RolloutSource,
    Sampling,
    Split,
    StepFacts,
    StepPrompts,
    Task,
    Tokenizer,
)
from opd_lightning.interfaces.arguments import check_at_least
from opd_lightning.randomness import derive_seed
from opd_lightning.rollouts.answering import Answers, answer, check_rollouts, grade_step, render_prompts
from opd_lightning.rollouts.horizon import Horizon, StepSampling
from opd_lightning.rollouts.on_policy import OnPolicy
from opd_lightning.rollouts.problem_sets import describe_problems, draw_problems, read_problems, without_reserved
from opd_lightning.rollouts.prompt_limits import check_context
from opd_lightning.rollouts.prompt_stream import HeldOutBatches, PromptStream, held_out_batches, join_shares
from opd_lightning.tasks.overlap import report_overlap
from opd_lightning.training.defaults import default_engine, default_selector


class OPDDataModule(LightningDataModule):
    """Selects prompts, generates (on-policy, unless told otherwise), grades.

    Args:
        task: Problems, chat messages and marking.
        engine: Who generates; None is `HFEngine()` (the live student through transformers).
        source: Where a step's rollouts come from; None is `OnPolicy()`. `OneStepAhead()` generates while training,
            `Reuse()` trains on rollouts several times.
        selector: Which prompts next; None is `Shuffled()`.
        sampling: How training rollouts are sampled. Temperature and cuts must fit the objective.
        horizon: Generate and train on the first tokens only, and mark no training answers; None takes whole answers.
            Validation, scores and predict always do.
        prompts_per_step: Prompts of one optimiser step, over all processes.
        rollouts_per_prompt: Responses per prompt.
        validation_sampling: How validation, test and predict answers are sampled; None is `sampling`.
        validation_samples: Answers per problem there (the n of avg@n and pass@n).
        validation_batch_size: Problems answered at once per process.
        num_validation_problems: Only the first so many problems of the validation split; None is all of them.
        max_prompt_tokens: Longest prompt; None is what the student's context leaves beside `max_new_tokens`.
        drop_long_prompts: Leave longer prompts out with a warning instead of refusing to start.
        predict_split: Split that `predict` answers.
        num_reserved: Training problems kept out of training, for EffOPD's scores.
        seed: Decides prompt order and every sample, together with step and position.

    Raises:
        ValueError: A number is out of range, or a split has no problems.
    """

    def __init__(
        self,
        task: Task,
        engine: RolloutEngine | None = None,
        source: RolloutSource | None = None,
        selector: PromptSelector | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        horizon: Horizon | None = None,
        prompts_per_step: int = 64,
        rollouts_per_prompt: int = 1,
        validation_sampling: Sampling | None = None,
        validation_samples: int = 1,
        validation_batch_size: int = 256,
        num_validation_problems: int | None = None,
        max_prompt_tokens: int | None = None,
        drop_long_prompts: bool = False,
        predict_split: Split = "test",
        num_reserved: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_at_least(1, "data", prompts_per_step=prompts_per_step, rollouts_per_prompt=rollouts_per_prompt)
        check_at_least(1, "data", validation_samples=validation_samples, validation_batch_size=validation_batch_size)
        check_at_least(1, "data", num_validation_problems=num_validation_problems, max_prompt_tokens=max_prompt_tokens)
        check_at_least(0, "data", num_reserved=num_reserved)
        self.task = task
        self.engine = engine if engine is not None else default_engine()
        self.source = source if source is not None else OnPolicy()
        self.selector = selector if selector is not None else default_selector()
        self.sampling = sampling
        self.horizon = horizon
        self.step_sampling = StepSampling(sampling, horizon)
        self.prompts_per_step = prompts_per_step
        self.rollouts_per_prompt = rollouts_per_prompt
        self.validation_sampling = validation_sampling if validation_sampling is not None else sampling
        self.validation_samples = validation_samples
        self.validation_batch_size = validation_batch_size
        self.num_validation_problems = num_validation_problems
        self.max_prompt_tokens = max_prompt_tokens
        self.drop_long_prompts = drop_long_prompts
        self.predict_split: Split = predict_split
        self.num_reserved = num_reserved
        self.seed = seed
        self.stream: PromptStream | None = None
        self._training_problems: list[Problem] = []
        self.longest_prompt = 0  # tokens, among the training prompts
        self.held_out: dict[str, list[Problem]] = {}

    @property
    def tokenizer(self) -> Tokenizer:
        """The student's tokenizer."""
        return self._student.spec.tokenizer

    @property
    def resume_settings(self) -> dict[str, Any]:
        """What a run must share with the run whose checkpoint it resumes."""
        assert self.stream is not None
        return {
            "seed_everything (data.seed)": self.seed,
            "data.prompts_per_step": self.prompts_per_step,
            "data.source": type(self.source).__name__,
            "data.selector": type(self.selector).__name__,
            "data.task (training problems)": describe_problems(self.stream.problems),
        }

    @property
    def _student(self) -> LiveStudent:
        assert self.trainer is not None
        module = self.trainer.lightning_module
        if not hasattr(module, "spec"):
            raise ValueError(f"data: OPDDataModule serves an OPDModule, not {type(module).__name__}.")
        return cast("LiveStudent", module)

    def setup(self, stage: str) -> None:
        """Read the problems of this stage and check that every prompt fits the student's context."""
        assert self.trainer is not None
        self.source.setup(self.engine)  # first: what does not fit together need not be installed
        self.engine.preflight(self._student.spec)
        if stage == "fit" and (self.stream is None or self.trainer.global_step == 0):  # a new run starts from the start
            found, wanted = self._read_problems("train", self.sampling), self.rollouts_per_prompt
            self._training_problems = self.source.admit(found, self.tokenizer, self.sampling, wanted)
            problems = without_reserved(self._training_problems, self.problems_for_scores(self.num_reserved))
            self.selector.setup(problems, self.seed)
            self.stream = PromptStream(
                problems, self.selector, self.prompts_per_step, lambda: self.source.num_steps_wanted
            )
            self.load_state_dict({})
        splits: dict[str, Split] = {"fit": "validation", "validate": "validation", "test": "test"}
        split = splits.get(stage, self.predict_split)
        if split not in self.held_out and not (stage == "fit" and self.trainer.limit_val_batches == 0):
            problems = self._read_problems(split, self.validation_sampling)
            num_problems = self.num_validation_problems if split == "validation" else None
            self.held_out[split] = problems[:num_problems]
            if stage == "fit":
                report_overlap(self._training_problems, self.held_out[split], split)

    def problems_for_scores(self, num_problems: int) -> list[Problem]:
        """Training problems to score candidates on: a function of the seed, the reserved ones first.

        Raises:
            ValueError: There are not so many.
        """
        return draw_problems(self._training_problems, num_problems, derive_seed(self.seed, "problems for scores"))

    def train_dataloader(self) -> PromptStream:
        """The prompt stream of this rank."""
        assert self.stream is not None and self.trainer is not None
        self.stream.rank, self.stream.world_size = self.trainer.global_rank, self.trainer.world_size
        return self.stream

    def val_dataloader(self) -> HeldOutBatches | list[Any]:
        """Held-out problems, split over ranks."""
        return self._held_out_loader("validation") if "validation" in self.held_out else []

    def test_dataloader(self) -> HeldOutBatches:
        """Test problems, split over ranks."""
        return self._held_out_loader("test")

    def predict_dataloader(self) -> HeldOutBatches:
        """Problems of `predict_split`, split over ranks."""
        return self._held_out_loader(self.predict_split)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """In training, turn prompts into graded rollouts."""
        assert self.trainer is not None
        return self.roll_out(batch) if self.trainer.training else batch

    def roll_out(self, batch: PromptBatch) -> RolloutBatch:
        """Get the step's rollouts: where new ones are asked for, grade them and let the selector see all outcomes."""
        graded = self._answer(batch) if batch.is_new else None
        share = self.source.share(batch, graded, self.seed)
        following = self.step_sampling.of_step(batch.step + 1)
        for part, value in self.source.prepare(self._draw_next, following, self._student).items():
            share.seconds[part] = share.seconds.get(part, 0.0) + value
        return share

    def _answer(self, batch: PromptBatch) -> RolloutBatch:
        found = self.source.rollouts(self._render(batch), self.step_sampling.of_step(batch.step), self._student)
        check_rollouts(found, len(batch.problems) * self.rollouts_per_prompt, type(self.source).__name__)
        task = self.task if self.horizon is None else None
        graded, outcomes = grade_step(task, found, batch.indices, self.rollouts_per_prompt)
        self.selector.observe(join_shares(gather_objects(outcomes)))
        return graded

    def observe(self, facts: StepFacts) -> None:
        """The last batch has been trained: from now on checkpoints continue after it."""
        assert self.stream is not None
        self.stream.commit()
        self.source.observe(facts)
        self.step_sampling.observe(facts)

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling, *, num_samples: int) -> Answers:
        """Answer prompts with the student's current weights and grade the answers, outside the training rollouts."""
        student = self._student
        self.source.wait()
        self.engine.sync(student.model, student.weight_version)
        with torch.no_grad():
            return answer(self.engine, self.task, prompts, sampling, num_samples=num_samples)

    def connect(self, student: LiveStudent, device: torch.device) -> None:
        """The student is loaded: get the engine ready for it.

        Raises:
            ValueError: The engine does not fit the student, or takes fewer tokens than rollouts may have.
        """
        self.engine.setup(student.spec, device)
        if self.longest_prompt:  # of training; held-out prompts are cut to what the engine takes
            check_context("data.engine: it takes", self.engine.context_length, self.longest_prompt, self.sampling)

    def invalidate(self) -> None:
        """The student's weights may have changed behind its version (averaged ones are swapped in, say)."""
        self.source.wait()
        self.engine.invalidate()

    def state_dict(self) -> dict[str, Any]:
        """The state of rollout source and horizon after the last trained step."""
        return {"source": self.source.state_dict(), "step_sampling": self.step_sampling.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`, or start over from an empty one."""
        self.source.load_state_dict(state_dict.get("source", {}))
        self.step_sampling.load_state_dict(state_dict.get("step_sampling", {}))

    def on_exception(self, exception: BaseException) -> None:
        """Call off and close what would keep the process alive; Lightning tears nothing down after an error."""
        self.engine.interrupt()
        self.teardown("fit")

    def teardown(self, stage: str) -> None:
        """Close source and engine."""
        self.source.close()
        self.engine.close()

    def _draw_next(self) -> StepPrompts:
        assert self.stream is not None
        return self._render(self.stream.draw_ahead())

    def _render(self, batch: PromptBatch) -> StepPrompts:
        prompts = render_prompts(
            self._student.spec.tokenizer,
            batch.problems,
            batch.positions,
            num_samples=self.rollouts_per_prompt,
            seed_parts=(self.seed, "train", batch.step),
        )
        return StepPrompts(batch.step, tuple(batch.positions), tuple(prompts))

    def _held_out_loader(self, split: Split) -> HeldOutBatches:
        ranks = self.trainer.global_rank, self.trainer.world_size  # type: ignore[union-attr]
        return held_out_batches(self.held_out[split], self.validation_batch_size, *ranks)

    def _read_problems(self, split: Split, sampling: Sampling) -> list[Problem]:
        problems, longest = read_problems(
            self.task,
            split,
            self.tokenizer,
            sampling,
            setting="data.sampling" if sampling is self.sampling else "data.validation_sampling",
            context=min(self._student.spec.context_length, self.engine.context_length or sys.maxsize),
            max_prompt_tokens=self.max_prompt_tokens,
            drop=self.drop_long_prompts,
        )
        if split == "train":
            self.longest_prompt = longest
        return problems
