"""`OPDDataModule`: which prompts next, and what the student answers to them.

The loader yields prompts only. Generation happens in `on_after_batch_transfer`, which Lightning calls immediately
before `training_step` whatever its fetcher does: the rollouts of a step always come from the weights of that step.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from lightning import LightningDataModule

from opd_lightning.evaluation import answer, render_prompts
from opd_lightning.interfaces import (
    Outcome,
    Problem,
    PromptBatch,
    PromptSelector,
    RolloutBatch,
    RolloutEngine,
    Sampling,
    Split,
    Task,
    Tokenizer,
)
from opd_lightning.randomness import derive_seed
from opd_lightning.streams import HeldOutBatches, PromptStream, held_out_batches


class OPDDataModule(LightningDataModule):
    """Selects prompts, generates on-policy, grades.

    Args:
        task: Problems, chat messages and marking.
        engine: Who generates; None is `HFEngine()` (the live student through transformers).
        selector: Which prompts next; None is `Shuffled()`.
        sampling: How training rollouts are sampled. Temperature and cuts must fit the objective.
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
        selector: PromptSelector | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
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
        for name, value in (
            ("prompts_per_step", prompts_per_step),
            ("rollouts_per_prompt", rollouts_per_prompt),
            ("validation_samples", validation_samples),
            ("validation_batch_size", validation_batch_size),
            ("num_validation_problems", num_validation_problems),
            ("max_prompt_tokens", max_prompt_tokens),
        ):
            if value is not None and value < 1:
                raise ValueError(f"data.{name}: expected an integer of at least 1, got {value}.")
        if num_reserved < 0:
            raise ValueError(f"data.num_reserved: expected an integer of at least 0, got {num_reserved}.")
        self.task = task
        self.engine = engine if engine is not None else _default_engine()
        self.selector = selector if selector is not None else _default_selector()
        self.sampling = sampling
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
        return self._module.spec.tokenizer  # type: ignore[no-any-return]

    @property
    def resume_settings(self) -> dict[str, Any]:
        """What a run must share with the run whose checkpoint it resumes."""
        assert self.stream is not None
        return {
            "seed_everything (data.seed)": self.seed,
            "data.prompts_per_step": self.prompts_per_step,
            "data.selector": type(self.selector).__name__,
            "data.task (number of training problems)": len(self.stream.problems),
        }

    @property
    def _module(self) -> Any:
        assert self.trainer is not None
        return self.trainer.lightning_module

    def setup(self, stage: str) -> None:
        """Read the problems of this stage and check that every prompt fits the student's context."""
        assert self.trainer is not None
        if stage == "fit" and (self.stream is None or self.trainer.global_step == 0):  # a new run starts from the start
            self._training_problems = self._fitting_problems("train", self.sampling)
            reserved = {problem.uid for problem in self.problems_for_scores(self.num_reserved)}
            problems = [problem for problem in self._training_problems if problem.uid not in reserved]
            if not problems:
                raise ValueError(
                    f"data.num_reserved={self.num_reserved} leaves none of the {len(self._training_problems)} training"
                    " problems. Lower it."
                )
            self.selector.setup(problems, self.seed)
            self.stream = PromptStream(problems, self.selector, self.prompts_per_step)
        wanted: dict[str, list[Split]] = {
            "fit": ["validation"],
            "validate": ["validation"],
            "test": ["test"],
            "predict": [self.predict_split],
        }
        for split in wanted[stage]:
            if split not in self.held_out and not (stage == "fit" and self.trainer.limit_val_batches == 0):
                problems = self._fitting_problems(split, self.validation_sampling)
                num_problems = self.num_validation_problems if split == "validation" else None
                self.held_out[split] = problems[:num_problems]

    def problems_for_scores(self, num_problems: int) -> list[Problem]:
        """Training problems to score candidates on: a function of the seed, the reserved ones first.

        Raises:
            ValueError: There are not so many.
        """
        if num_problems > len(self._training_problems):
            raise ValueError(
                f"EffOPD score: {num_problems} prompts were asked for, but there are {len(self._training_problems)}"
                " training problems. Lower num_prompts (or data.num_reserved)."
            )
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "problems for scores"))
        order = torch.randperm(len(self._training_problems), generator=generator)
        return [self._training_problems[i] for i in order[:num_problems].tolist()]

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
        """In training, turn prompts into graded rollouts of the current weights."""
        assert self.trainer is not None
        return self.generate(batch) if self.trainer.training else batch

    def generate(self, batch: PromptBatch) -> RolloutBatch:
        """Sync the engine, generate, grade, and let the selector see the outcomes of all ranks."""
        assert self.trainer is not None
        module = self._module
        started = time.perf_counter()
        self.engine.sync(module.student, module.weight_version)
        synced = time.perf_counter() - started
        prompts = render_prompts(
            self.tokenizer,
            batch.problems,
            batch.positions,
            num_samples=self.rollouts_per_prompt,
            seed_parts=(self.seed, "train", batch.step),
        )
        # this hook runs outside autocast and with gradients on
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            answers = answer(self.engine, self.task, prompts, self.sampling, num_samples=self.rollouts_per_prompt)
        outcomes = [
            Outcome(index, tuple(rollout.reward for rollout in group))
            for index, group in zip(batch.indices, answers.by_problem(), strict=True)
        ]
        self.selector.observe(self._gather(outcomes))
        return RolloutBatch(
            rollouts=answers.rollouts,
            weight_version=self.engine.weight_version,
            step=batch.step,
            sampling=self.sampling,
            seconds={"sync": synced, **answers.seconds},
        )

    def teardown(self, stage: str) -> None:
        """Close the engine."""
        self.engine.close()

    def _gather(self, outcomes: list[Outcome]) -> list[Outcome]:
        """Outcomes of all ranks in the step's global order, the same on each of them."""
        assert self.trainer is not None
        world_size = self.trainer.world_size
        if world_size == 1:
            return outcomes
        gathered: list[list[Outcome]] = [[] for _ in range(world_size)]
        torch.distributed.all_gather_object(gathered, outcomes)
        return [gathered[i % world_size][i // world_size] for i in range(self.prompts_per_step)]

    def _held_out_loader(self, split: Split) -> HeldOutBatches:
        assert self.trainer is not None
        return held_out_batches(
            self.held_out[split], self.validation_batch_size, self.trainer.global_rank, self.trainer.world_size
        )

    def _fitting_problems(self, split: Split, sampling: Sampling) -> list[Problem]:
        """Problems of the split whose prompts leave room for a whole response."""
        problems = self.task.problems(split)
        if not problems:
            skip = " or set trainer.limit_val_batches: 0" if split == "validation" else ""
            raise ValueError(
                f"data.task: {type(self.task).__name__} has no problems in its {split!r} split. Give it some{skip}."
            )
        if any(not 0 <= stop_id < self.tokenizer.vocab_size for stop_id in sampling.stop_ids or ()):
            raise ValueError(
                f"sampling.stop_ids: expected token ids from 0 to {self.tokenizer.vocab_size - 1}, got"
                f" {sampling.stop_ids}."
            )
        setting = "data.sampling" if sampling is self.sampling else "data.validation_sampling"
        context = self._module.spec.context_length
        limit = min(self.max_prompt_tokens or context, context - sampling.max_new_tokens)
        if limit < 1:
            raise ValueError(
                f"{setting}.max_new_tokens={sampling.max_new_tokens} leaves no room for a prompt in the student's"
                f" context of {context} tokens. Lower it."
            )
        lengths = [len(self.tokenizer.render(problem.messages)) for problem in problems]
        too_long = [(length, problem.uid) for length, problem in zip(lengths, problems, strict=True) if length > limit]
        if split == "train":
            self.longest_prompt = max((length for length in lengths if length <= limit), default=0)
        if not too_long:
            return problems
        longest, uid = max(too_long)
        own_limit = "" if limit != self.max_prompt_tokens else f", data.max_prompt_tokens is {limit}"
        finding = (
            f"{len(too_long)} of {len(problems)} {split} prompts are longer than {limit} tokens (longest: {longest}"
            f" tokens, problem {uid!r}; the student's context is {context} tokens, {setting}.max_new_tokens is"
            f" {sampling.max_new_tokens}{own_limit})."
        )
        if len(too_long) == len(problems):
            raise ValueError(
                f"{finding} None is left: {'raise max_prompt_tokens' if own_limit else 'lower max_new_tokens'}."
            )
        if not self.drop_long_prompts:
            raise ValueError(f"{finding} Set data.drop_long_prompts: true, or change these numbers.")
        warnings.warn(f"{finding} They are left out.", stacklevel=2)
        return [problem for length, problem in zip(lengths, problems, strict=True) if length <= limit]


def _default_engine() -> RolloutEngine:
    from opd_lightning.backends.hf import HFEngine  # transformers is slow to import and not always wanted

    return HFEngine()


def _default_selector() -> PromptSelector:
    from opd_lightning.selection import Shuffled

    return Shuffled()
