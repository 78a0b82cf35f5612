"""Draw one token per row from logits: inverse-CDF sampling with one uniform number each."""

from __future__ import annotations

import torch
from torch import Tensor

from opd_lightning.interfaces import Sampling


def draw_tokens(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw a token per row and give its log-probability.

    A token is the first whose cumulative probability exceeds the row's uniform number, so it depends on nothing but its
    own row. top-k is applied before top-p, as usual; tokens tied with the last one kept are kept too.

    Args:
        logits: float32 [B, V], untempered; float64 ones are drawn from as they are.
        uniforms: float64 [B] in (0, 1).
        sampling: Temperature and cuts; temperature 0 takes the likeliest token and needs no uniform number.

    Returns:
        int64 [B] tokens and float32 [B] log-probabilities in nats under the whole tempered distribution (before any
        cut; at temperature 1 for greedy decoding). Not finite where the row's logits are not finite.
    """
    if sampling.temperature not in (0, 1):
        logits = logits / sampling.temperature
    log_total = logits.logsumexp(dim=-1, keepdim=True)
    if sampling.temperature == 0:
        token_ids = logits.argmax(dim=-1, keepdim=True)
    else:
        probabilities = (logits - log_total).exp_()
        if not sampling.is_whole_distribution:
            probabilities = _cut(probabilities, sampling)
        cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
        target = uniforms[:, None] * cumulative[:, -1:]
        # NaN rows search past the end; they are reported through their log-probability
        token_ids = torch.searchsorted(cumulative, target, right=True).clamp_(max=logits.shape[-1] - 1)
    log_probs = logits.gather(-1, token_ids) - log_total
    return token_ids.squeeze(-1), log_probs.squeeze(-1).float()


def not_finite(position: int, uid: str) -> FloatingPointError:
    """What to raise when the logits of a response are not finite."""
    return FloatingPointError(
        f"The student's logits are not finite at response token {position} of problem {uid!r}."
        " Check that its weights are finite (did the last steps diverge?), the learning rate, and the precision"
        " (float16 overflows where bfloat16 does not)."
    )


def _cut(probabilities: Tensor, sampling: Sampling) -> Tensor:
    """Set the probabilities to 0 that top-k and top-p leave out."""
    num_kept = min(sampling.top_k or probabilities.shape[-1], probabilities.shape[-1])
    likeliest = probabilities.topk(num_kept, dim=-1).values
    before = likeliest.cumsum(dim=-1, dtype=torch.float64) - likeliest
    # a token is in the nucleus when the likelier ones do not fill it; the first always is
    inside = before < sampling.top_p * likeliest.sum(dim=-1, keepdim=True, dtype=torch.float64)
    threshold = likeliest.masked_fill(~inside, torch.inf).amin(dim=-1, keepdim=True)
    return probabilities.masked_fill(probabilities < threshold, 0.0)
