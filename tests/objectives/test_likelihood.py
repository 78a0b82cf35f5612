import torch
from objective_cases import gradient, make_case
from torch.nn.functional import one_hot

from opd_lightning.objectives import NLL


def test_losses_and_gradients_are_those_of_cross_entropy():
    case = make_case()
    expected = -case.p[range(4), case.response_ids].log()
    torch.testing.assert_close(case.losses(NLL()), expected)
    torch.testing.assert_close(
        case.losses(NLL()), torch.nn.functional.cross_entropy(case.logits, case.response_ids, reduction="none")
    )
    torch.testing.assert_close(case.gradient(NLL()), case.p - one_hot(case.response_ids, 9))


def test_gradients_pass_finite_differences():
    case = make_case(n=2, vocabulary=5)
    assert torch.autograd.gradcheck(lambda logits: case.losses(NLL(), logits), case.logits.requires_grad_())


def test_on_the_students_own_samples_the_expected_gradient_is_0():
    case = make_case()
    total = torch.zeros_like(case.logits)
    for token in range(9):
        case.response_ids = torch.full((4,), token)
        total += case.p[:, token, None] * case.gradient(NLL())
    torch.testing.assert_close(total, torch.zeros_like(total))


def test_half_precision_logits_are_upcast():
    case = make_case(vocabulary=500)
    rounded = case.logits.bfloat16()
    losses = NLL().token_losses(rounded, None, case.tokens)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), case.losses(NLL(), rounded.double()), atol=1e-5, rtol=1e-5)
    assert gradient(lambda logits: NLL().token_losses(logits, None, case.tokens), rounded).dtype == torch.bfloat16
