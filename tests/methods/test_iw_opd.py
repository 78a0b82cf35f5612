"""IW-OPD (arXiv 2606.22600): w_t = 1 + g (1 - sum_{u<t} |A_u| / sum_u |A_u|)."""

import pytest
import torch
from weighed import trained, weigh

from opd_lightning.methods import RemainingSignal


def reference(sizes, gain):
    total = sum(sizes)
    return [1 + gain * (1 - sum(sizes[:t]) / total) for t in range(len(sizes))]


def test_the_weights_are_those_of_the_equation_response_by_response():
    generator = torch.Generator().manual_seed(0)
    ratios = [torch.randn(n, generator=generator) for n in (7, 1, 4)]
    found = weigh(RemainingSignal(0.5), *(trained({"sampled_log_ratio": each}) for each in ratios))
    for weights, each in zip(found, ratios, strict=True):
        assert weights == pytest.approx(reference(each.abs().tolist(), 0.5), rel=1e-6)
        assert weights[0] == 1.5
        assert weights == sorted(weights, reverse=True)


def test_without_gain_or_without_signal_all_tokens_count_alike():
    response = trained({"sampled_log_ratio": [1.0, -2.0, 0.5]})
    assert weigh(RemainingSignal(0.0), response) == [[1, 1, 1]]
    assert weigh(RemainingSignal(0.5), trained({"sampled_log_ratio": [0.0, 0.0]})) == [[1.5, 1.5]]


def test_a_gain_is_no_loss():
    with pytest.raises(ValueError, match=r"token_weighting\.gain: expected a number of at least 0, got -1"):
        RemainingSignal(-1)
