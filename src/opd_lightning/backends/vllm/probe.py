"""Does vLLM compute the same model as the student? Asked once, after the first weights have been handed over."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from opd_lightning.interfaces import MicroBatch, Problem, Prompt, ResponseTokens, Rollout, Sampling, Student
from opd_lightning.interfaces.modes import evaluation_mode

_NUM_SAMPLED = 16
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
    if len(token_ids) == 1:  # the first token of a text has no score
        token_ids *= 2
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


def check_tempered_log_probs(
    student: Student,
    model: nn.Module,
    generate: Callable[[Sequence[Prompt], Sampling], list[Rollout]],
    tolerance: float,
    max_model_len: int,
) -> None:
    """Check that a server tells the log-probabilities of the tempered distribution it samples from.

    Args:
        student: Runs the live model and renders the prompt.
        model: The live model.
        generate: The engine's.
        tolerance: Largest mean absolute difference in nats.
        max_model_len: Most tokens that vLLM takes.

    Raises:
        ValueError: They are those of another temperature.
    """
    sampling = Sampling(max_new_tokens=_NUM_SAMPLED, temperature=2.0)
    token_ids = tuple(student.tokenizer.render(_PROBE))[: max_model_len - _NUM_SAMPLED]
    rollout = generate([Prompt(Problem("probe", _PROBE, ""), token_ids, (0,))], sampling)[0]
    sequence = [*token_ids, *rollout.response_ids.tolist()]
    expected = _score_by_student(student, model, sequence, sampling.temperature)[len(token_ids) - 1 :]
    mean = float((rollout.log_probs - expected).abs().mean())
    if not mean <= tolerance:
        raise ValueError(
            f"engine: at temperature {sampling.temperature} the server's log-probabilities differ from the student's by"
            f" {mean:.3g} nats on average (tolerated: {tolerance}). Start it with --logprobs-mode processed_logprobs,"
            " which takes the temperature into account."
        )


def _score_by_student(student: Student, model: nn.Module, token_ids: Sequence[int], temperature: float = 1.0) -> Tensor:
    device = next(model.parameters()).device
    ids = torch.tensor([token_ids])
    length = ids.shape[1]
    batch = MicroBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.arange(length)[None],
        rows=torch.zeros(length - 1, dtype=torch.int64),
        columns=torch.arange(length - 1),
        tokens=ResponseTokens(ids[0, 1:], torch.zeros(length - 1), torch.arange(length - 1)),
        rollouts=(),
    ).to(device)
    with torch.no_grad(), evaluation_mode(model):
        logits = student.head(model)(student.hidden_states(model, batch))
        log_probs = (logits / temperature).log_softmax(-1)
    return log_probs.gather(-1, batch.tokens.ids[:, None]).squeeze(-1).cpu()
