"""Does vLLM compute the same model as the student? Asked once, after the first weights have been handed over."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from opd_lightning.interfaces import MicroBatch, Student

_PROBE = ({"role": "user", "content": "What is 17 + 25? Think step by step."},)


def check_same_model(
    student: Student,
    model: nn.Module,
    score_tokens: Callable[[list[int]], Sequence[float]],
    tolerance: float,
    max_model_len: int,
    subject: str,
) -> float:
    """Compare log-probabilities of one fixed prompt's tokens, computed by the student and by vLLM.

    A weight that went astray on the way (a name vLLM maps elsewhere, a tied head left stale, an architecture option it
    ignores) is off by nats; rounding is off by hundredths.

    Args:
        student: Runs the live model and renders the prompt.
        model: The live model; its mode does not change.
        score_tokens: vLLM's untempered log-probabilities of all tokens but the first.
        tolerance: Largest mean absolute difference in nats.
        max_model_len: Most tokens that vLLM takes.
        subject: Who is blamed.

    Returns:
        The mean absolute difference in nats.

    Raises:
        ValueError: They differ by more.
    """
    token_ids = list(student.tokenizer.render(_PROBE))[: max_model_len - 1]
    expected = _score_by_student(student, model, token_ids)
    difference = (torch.tensor(score_tokens(token_ids)) - expected).abs()
    mean = float(difference.mean())
    if not mean <= tolerance:
        raise ValueError(
            f"{subject}: vLLM and the student disagree about the same tokens by {mean:.3g} nats on average (at most"
            f" {float(difference.max()):.3g}; tolerated mean {tolerance}). vLLM does not compute this model with these"
            " weights: look at its warnings above, at dtype and quantization, and whether it supports the architecture;"
            " or use HFEngine. If the difference is accepted, raise engine.max_mean_mismatch."
        )
    return mean


def _score_by_student(student: Student, model: nn.Module, token_ids: Sequence[int]) -> Tensor:
    device = next(model.parameters()).device
    ids = torch.tensor([token_ids])
    length = ids.shape[1]
    batch = MicroBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.arange(length)[None],
        rows=torch.zeros(length - 1, dtype=torch.int64),
        columns=torch.arange(length - 1),
        response_ids=ids[0, 1:],
        rollout_log_probs=torch.zeros(length - 1),
        positions=torch.arange(length - 1),
    ).to(device)
    with torch.no_grad(), _evaluating(model):
        log_probs = student.logits(model, student.hidden_states(model, batch)).log_softmax(-1)
    return log_probs.gather(-1, batch.response_ids[:, None]).squeeze(-1).cpu()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradient checkpointing; every submodule gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
