"""What models and objectives see of rollouts: padded micro-batches, response tokens, heads, and requests for scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from opd_lightning.interfaces.words import Rollout


@dataclass(frozen=True)
class ResponseTokens:
    """What is known of N response tokens before any model has scored them.

    Attributes:
        ids: int64 [N], the tokens.
        rollout_log_probs: float32 [N], nats: the engine's log-probabilities of them; NaN where it does not know.
        positions: int64 [N], 0-based position inside the response.
        extras: float32 [N] each: what an objective's `shape` has attached, by name, and the `step` of a training run.
    """

    ids: Tensor
    rollout_log_probs: Tensor
    positions: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """N."""
        return self.ids.numel()

    def __getitem__(self, rows: slice) -> ResponseTokens:
        """Some of them."""
        extras = {name: values[rows] for name, values in self.extras.items()}
        return ResponseTokens(self.ids[rows], self.rollout_log_probs[rows], self.positions[rows], extras)

    def to(self, device: torch.device | str) -> ResponseTokens:
        """Return a copy on the device."""
        return ResponseTokens(
            ids=self.ids.to(device, non_blocking=True),
            rollout_log_probs=self.rollout_log_probs.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            extras={name: values.to(device, non_blocking=True) for name, values in self.extras.items()},
        )


@dataclass(frozen=True)
class MicroBatch:
    """Padded sequences, and the response tokens that the student wrote laid end to end.

    Attributes:
        input_ids: int64 [B, L].
        attention_mask: int64 [B, L], 1 for real tokens.
        position_ids: int64 [B, L], 0 for the first real token of a row.
        rows: int64 [N], row of each response token.
        columns: int64 [N], column whose hidden state *predicts* the response token (one before the token itself).
        tokens: The N response tokens.
        rollouts: The B rollouts behind the rows, on the CPU whatever device the tensors are on.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    rows: Tensor
    columns: Tensor
    tokens: ResponseTokens
    rollouts: tuple[Rollout, ...]

    @property
    def num_tokens(self) -> int:
        """N, the number of response tokens."""
        return len(self.tokens)

    def by_rollout(self, values: Tensor, dim: int = 0) -> list[Tensor]:
        """Cut values of response tokens, [N, ...] or with N at another dimension, into those of each rollout."""
        return list(torch.split(values, [rollout.num_trained for rollout in self.rollouts], dim))

    def to(self, device: torch.device | str) -> MicroBatch:
        """Return a copy with its tensors on the device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            attention_mask=self.attention_mask.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            rows=self.rows.to(device, non_blocking=True),
            columns=self.columns.to(device, non_blocking=True),
            tokens=self.tokens.to(device),
        )


@dataclass(frozen=True)
class LinearHead:
    """What turns final hidden states into logits, as data: ``softcap(scale * (hidden @ weight.T + bias))``.

    Data and not a function, so that a loss may read the weight itself. Rows of the weight beyond the vocabulary are
    padding.

    Attributes:
        weight: [R, H], with gradient where the head is trained.
        bias: [R] or None.
        num_rows: V, rows that are real tokens.
        scale: Factor on the logits.
        softcap: Logits become ``softcap * tanh(logits / softcap)``; None leaves them.
    """

    weight: Tensor
    bias: Tensor | None
    num_rows: int
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Untempered float32 logits [N, V] of hidden states [N, H].

        The matrix product runs in the precision of its surroundings (bfloat16 under autocast: eight significant bits);
        everything after it is float32.
        """
        logits = nn.functional.linear(hidden, self.weight, self.bias)[..., : self.num_rows]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


@dataclass(frozen=True)
class ScoreRequest:
    """What an objective (and the metrics) will ask of `TeacherScores`.

    Attributes:
        top_k: Size of the teacher's own top-k list; 0 when it is not asked for.
        arbitrary_ids: Log-probabilities at ids that the student chooses.
        full_vocabulary: Log-probabilities of the whole vocabulary.
        joint_units: Scores of the pieces of text that two tokenizers share (`objectives.JointScores`).
        temperature: Teacher temperature: divides the teacher's logits.
    """

    top_k: int = 0
    arbitrary_ids: bool = False
    full_vocabulary: bool = False
    temperature: float = 1.0
    joint_units: bool = False

    def __str__(self) -> str:
        """The request in words."""
        parts = ["log-probabilities of the sampled tokens"]
        if self.top_k:
            parts.append(f"its own top {self.top_k}")
        if self.arbitrary_ids:
            parts.append("log-probabilities at ids the student chooses")
        if self.full_vocabulary:
            parts.append("the full vocabulary")
        if self.joint_units:
            parts.append("units of text that two tokenizers share")
        return ", ".join(parts)
