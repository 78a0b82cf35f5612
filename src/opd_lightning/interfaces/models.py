"""The seams of models: tokenizer, student and teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from opd_lightning.interfaces.arguments import constructor_arguments
from opd_lightning.interfaces.scores import TeacherScores
from opd_lightning.interfaces.tokens import LinearHead, MicroBatch, ScoreRequest
from opd_lightning.interfaces.words import Message, Problem, Rollout


class Tokenizer(ABC):
    """Text to token ids and back, for one model family."""

    vocabulary: Mapping[str, int]  # every token as it is written there, and its id
    vocab_size: int  # number of real token ids; head rows beyond it are padding
    pad_id: int
    stop_ids: tuple[int, ...]  # close a response; may be empty

    @abstractmethod
    def render(self, messages: Sequence[Message]) -> list[int]:
        """Apply the chat template with the generation header and return token ids."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the token ids of plain text, without template and special tokens."""

    @abstractmethod
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of the ids."""

    def token_bytes(self) -> dict[int, bytes]:
        """The bytes of text that each token stands for; tokens that are no text (special ones) are left out.

        Raises:
            ValueError: That is not known, so teachers with another tokenizer cannot read this student's answers.
        """
        raise ValueError(f"student: {type(self).__name__} does not define token_bytes. Take a teacher of its family.")


class Student(ABC):
    """The model to train: how to load it, run it and save it. A plain object: Lightning sees only the loaded module."""

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The student's tokenizer (loaded on first use)."""

    @property
    @abstractmethod
    def context_length(self) -> int:
        """Most tokens (prompt + response) that the model accepts."""

    @abstractmethod
    def load(self) -> nn.Module:
        """Load the weights in the training dtype, with gradients on for what is to be trained."""

    def shard(self, model: nn.Module, mesh: DeviceMesh) -> None:
        """Cut a loaded model up over processes in place (`torch.distributed.fsdp.fully_shard`), for `FSDP2Strategy`.

        Afterwards `hidden_states` and `head` gather what they need. All processes run them equally often.

        Args:
            model: What `load` returned, the same on every process.
            mesh: The processes, in one dimension.
        """
        raise AssertionError("checked before any weight is loaded")

    @abstractmethod
    def hidden_states(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Final hidden states [N, H] at `batch.rows, batch.columns`: what the head turns into next-token logits."""

    def packs(self, model: nn.Module) -> bool:
        """Whether `hidden_states` leaves padding out instead of computing it."""
        return False

    @abstractmethod
    def head(self, model: nn.Module) -> LinearHead:
        """The head as it is now; V = `tokenizer.vocab_size`, padding rows are cut off."""

    @abstractmethod
    def save(self, model: nn.Module, folder: Path, *, merge_adapter: bool = True, dtype: str | None = None) -> None:
        """Write the trained model as a folder that others load (for Hugging Face models: `from_pretrained`).

        Args:
            model: What `load` returned, trained.
            folder: Where to; made if it does not exist.
            merge_adapter: Fold adapters into the model's own weights, where there are any.
            dtype: Dtype of the written weights; None keeps theirs.
        """

    def describe(self) -> dict[str, Any]:
        """Class path and constructor arguments as plain values: enough to build the same student again.

        Each argument is looked up as an attribute of the same name.

        Raises:
            ValueError: One was not kept.
        """
        cls = type(self)
        return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": constructor_arguments(self)}

    def check_same(self, description: Mapping[str, Any]) -> None:
        """Refuse the weights of another student, and say what has changed.

        Args:
            description: What `describe` returned when a checkpoint was written.

        Raises:
            ValueError: They do not belong to this student.
        """
        own = self.describe()["class_path"]
        if description["class_path"] != own:
            raise ValueError(
                f"student: the checkpoint was written with {description['class_path']}, this run has {own}. Use the"
                " same student."
            )

    def named_weights(self, model: nn.Module, num_rows: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors as a plain model folder has them, adapters merged out of place, tied tensors once.

        For engines with their own copy of the weights.

        Args:
            model: What `load` returned; nothing in it changes.
            num_rows: Cut embedding and head to so many rows; None leaves them as they are.
        """
        raise ValueError(
            f"student: {type(self).__name__} does not define named_weights, so no engine with its own copy of the"
            " weights can generate for it. Use an engine that runs the live student, such as PlainEngine."
        )

    def write_blank(self, model: nn.Module, folder: Path, num_rows: int) -> None:
        """Write a model folder without weights, for engines that build the model and are then given `named_weights`.

        Args:
            model: What `load` returned.
            folder: Where to; must exist.
            num_rows: Rows of embedding and head to declare.
        """
        raise ValueError(
            f"student: {type(self).__name__} does not define write_blank, so no engine can build its model. Use an"
            " engine that runs the live student, such as PlainEngine."
        )

    @property
    def has_adapter(self) -> bool:
        """Whether only an adapter is trained, so that `as_base` gives the model without it."""
        return False

    def as_base(self, model: nn.Module) -> AbstractContextManager[None] | None:
        """Where only an adapter is trained: a context in which `model` is the model without it. None otherwise."""
        return None


class Teacher(ABC):
    """A model that scores the student's tokens. Never an `nn.Module` attribute of anything Lightning sees.

    Attributes:
        changes: Whether it changes while the student trains; then its scores are not kept from step to step.
        sharded: Whether its weights are to be cut up over processes as the student's are (`FSDP2Strategy`): None where
            that is possible, and True refuses to train otherwise.
    """

    changes: bool = False
    sharded: bool | None = None

    @property
    @abstractmethod
    def offer(self) -> ScoreRequest:
        """The most this teacher can be asked for (its temperature says nothing)."""

    @property
    def context_length(self) -> int | None:
        """Most tokens (prompt + response) it can score; None when it does not say. Known after `preflight`."""
        return None

    def check(self, request: ScoreRequest) -> None:
        """Refuse a request that goes beyond the offer.

        Raises:
            ValueError: It does; the message says what this teacher can give.
        """
        offer = self.offer
        if (
            request.top_k > offer.top_k
            or request.arbitrary_ids > offer.arbitrary_ids
            or request.full_vocabulary > offer.full_vocabulary
            or request.joint_units > offer.joint_units
        ):
            raise ValueError(
                f"objective: {type(self).__name__} cannot give {request}; it gives"
                f" {offer}. Choose an objective.support that needs no more."
            )

    def preflight(self, student: Student) -> None:  # noqa: B027 - not every teacher has something to check
        """Check tokenizer and vocabulary against the student's before any weights are loaded.

        Raises:
            ValueError: Teacher and student do not speak the same token ids.
        """

    def check_problems(self, problems: Sequence[Problem]) -> None:  # noqa: B027 - most read nothing of them
        """Check that the problems of the run have what this teacher reads of them.

        Raises:
            ValueError: One lacks it.
        """

    def page(self) -> None:
        """Have the weights off the device whenever nothing is scored; called before `setup`.

        Raises:
            ValueError: It cannot.
        """
        raise ValueError(
            f"model.teacher.paged: {type(self).__name__} cannot leave the device between two steps. Set paged: false."
        )

    @abstractmethod
    def setup(self, student: Student, model: nn.Module, device: torch.device) -> None:
        """Load the teacher once and check that it speaks the student's token ids.

        Args:
            student: The student's description (tokenizer, vocabulary).
            model: The loaded student (a LoRA student's base model may serve as the teacher).
            device: Where scoring happens.
        """

    def as_answerer(self, student: Student) -> Student:
        """This teacher's model in a student's place, so that any engine can answer with it; it is not to be trained.

        Args:
            student: Whose tokenizer renders the prompts, as in the training that the answers are for.

        Raises:
            ValueError: It only scores.
        """
        raise ValueError(
            f"model.teacher: {type(self).__name__} only scores, so no engine can answer with it. Name the model itself:"
            " {class_path: HFTeacher, init_args: {path: ...}}."
        )

    def shape(self, groups: Sequence[Sequence[Rollout]]) -> Sequence[Sequence[Rollout]]:
        """As `Objective.shape`, and before it: texts go into `Rollout.context`."""
        return groups

    @abstractmethod
    def score(self, batch: MicroBatch, request: ScoreRequest) -> TeacherScores:
        """Score the response tokens of one micro-batch."""

    def score_all(self, batches: Sequence[MicroBatch], request: ScoreRequest) -> Iterator[TeacherScores]:
        """Score the micro-batches of one step in order; override it to load, pipeline or pre-compute.

        All processes call it equally often, with any number of micro-batches, also none. A teacher that they run
        together (`sharded`) does so in the call; so teachers made of others call theirs at once, and not when the first
        scores are taken.
        """
        for batch in batches:
            yield self.score(batch, request)

    def as_student(self) -> tuple[Student, nn.Module] | None:
        """The loaded teacher as a model that answers, and how to run it; None where this process cannot run it so."""
        return None

    def is_here(self, is_cut_up: bool) -> bool:
        """Whether `as_student` will give a model that can answer, as far as settings say; `is_cut_up`: under FSDP2."""
        return type(self).as_student is not Teacher.as_student

    def prefetch(self, rollout: Rollout, request: ScoreRequest, step: int) -> None:  # noqa: B027 - most cannot
        """Begin to score a rollout whose step is not complete yet; `score_all` will ask for it soon.

        Comes from any thread, after a failure even after `close`: then it must do nothing.
        """

    def follow(self) -> None:  # noqa: B027 - most are frozen
        """The student, as `setup` was given it, has just taken an optimiser step."""

    def state_dict(self) -> dict[str, Any]:
        """Every value that training has changed in it: plain values and tensors. Nothing, where it is frozen."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most have no state
        """Restore `state_dict`; called before `setup`.

        Raises:
            ValueError: It is the state of another teacher.
        """

    def close(self) -> None:  # noqa: B027 - most have nothing to release
        """Release what `setup` took."""
