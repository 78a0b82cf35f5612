"""TrOPD (arXiv 2606.01249): sampled tokens weigh min(q / p, 1)."""

import torch
from objective_cases import make_case

from opd_lightning.methods import AgreementWeight


def weights(case):
    ratios = (case.p / case.q).log().gather(-1, case.response_ids[:, None]).squeeze(-1)
    return AgreementWeight()({"sampled_log_ratio": ratios}, None)


def test_a_token_weighs_as_much_as_the_teacher_agrees_and_never_more_than_1():
    case = make_case(n=40)
    ratio = (case.q / case.p).gather(-1, case.response_ids[:, None]).squeeze(-1)
    torch.testing.assert_close(weights(case), ratio.clamp(max=1))
    assert 0 < (ratio < 1).sum() < 40


def test_equal_models_and_no_tokens():
    assert (weights(make_case().agreeing()) == 1).all()
    assert AgreementWeight()({"sampled_log_ratio": torch.zeros(0)}, None).numel() == 0


def test_the_normaliser_is_a_setting():
    assert AgreementWeight().normalizer == "all_tokens"
    assert AgreementWeight("kept_tokens").normalizer == "kept_tokens"
