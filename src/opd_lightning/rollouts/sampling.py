"""Draw one token per row from logits: inverse-CDF sampling with one uniform number each."""

from __future__ import annotations

import torch
from torch import Tensor

from opd_lightning.interfaces import Sampling

_GROUP = 128  # tokens whose probabilities are summed before any is looked at alone


def draw_tokens(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw a token per row and give its log-probability.

    A token is the first whose cumulative probability exceeds the row's uniform number, so it depends on nothing but its
    own row. top-k is applied before top-p, as usual; tokens tied with the last one kept are kept too.

    Args:
        logits: float32 [B, V], untempered; float64 ones are drawn from as they are. They are used up: as large as this
            is, what is fetched from the system for every token costs more than the arithmetic.
        uniforms: float64 [B] in (0, 1).
        sampling: Temperature and cuts; temperature 0 takes the likeliest token and needs no uniform number.

    Returns:
        int64 [B] tokens and float32 [B] log-probabilities in nats under the whole tempered distribution (before any
        cut; at temperature 1 for greedy decoding). Not finite where the row's logits are not finite.
    """
    is_greedy = sampling.temperature == 0
    token_ids = logits.argmax(dim=-1, keepdim=True) if is_greedy else None
    if sampling.temperature not in (0, 1):
        logits.div_(sampling.temperature)
    weights = logits.sub_(logits.amax(dim=-1, keepdim=True)).exp_()  # probabilities, but for a factor
    sums = _group_sums(weights)
    total = sums.sum(dim=-1, keepdim=True)
    if token_ids is None:
        if not sampling.is_whole_distribution:
            weights = _cut(weights, sampling)
            sums = _group_sums(weights)
        token_ids = _search(weights, sums, uniforms[:, None])
    log_probs = weights.gather(-1, token_ids).double().log_() - total.log_()
    return token_ids.squeeze(-1), log_probs.squeeze(-1).float()


def not_finite(position: int, uid: str) -> FloatingPointError:
    """What to raise when the logits of a response are not finite."""
    return FloatingPointError(
        f"The student's logits are not finite at response token {position} of problem {uid!r}."
        " Check that its weights are finite (did the last steps diverge?), the learning rate, and the precision"
        " (float16 overflows where bfloat16 does not)."
    )


def _group_sums(weights: Tensor) -> Tensor:
    """float64 [B, G]: sums of neighbours; the last group may be a smaller one."""
    num_whole = weights.shape[-1] // _GROUP
    sums = weights[:, : num_whole * _GROUP].view(len(weights), num_whole, _GROUP).sum(dim=-1)
    if num_whole * _GROUP < weights.shape[-1]:
        sums = torch.cat([sums, weights[:, num_whole * _GROUP :].sum(dim=-1, keepdim=True)], dim=-1)
    return sums.double()


def _search(weights: Tensor, sums: Tensor, uniforms: Tensor) -> Tensor:
    """[B, 1]: the first token up to which there is more than that share of the weight.

    The group is found by the sums, the token by what is in the group: cumulative sums of a whole vocabulary would take
    longer than all the rest.
    """
    highest = weights.shape[-1] - 1
    before = torch.nn.functional.pad(sums.cumsum(dim=-1), (1, 0))
    target = uniforms * before[:, -1:]
    # NaN rows search past the end; they are reported through their log-probability
    group = (torch.searchsorted(before, target, right=True) - 1).clamp_(max=sums.shape[-1] - 1)
    places = group * _GROUP + torch.arange(_GROUP, device=weights.device)
    inside = weights.gather(-1, places.clamp(max=highest)).double().masked_fill_(places > highest, 0).cumsum_(dim=-1)
    # a group's sum is rounded: never past its last token that has any weight
    target = torch.minimum(target - before.gather(-1, group), inside[:, -1:] * (1 - 2**-52))
    return (group * _GROUP + torch.searchsorted(inside, target, right=True)).clamp_(max=highest)


def _cut(weights: Tensor, sampling: Sampling) -> Tensor:
    """Set the weights to 0 that top-k and top-p leave out."""
    num_kept = min(sampling.top_k or weights.shape[-1], weights.shape[-1])
    likeliest = weights.topk(num_kept, dim=-1).values
    before = likeliest.cumsum(dim=-1, dtype=torch.float64) - likeliest
    # a token is in the nucleus when the likelier ones do not fill it; the first always is
    inside = before < sampling.top_p * likeliest.sum(dim=-1, keepdim=True, dtype=torch.float64)
    threshold = likeliest.masked_fill(~inside, torch.inf).amin(dim=-1, keepdim=True)
    return weights.masked_fill_(weights < threshold, 0.0)
