import torch
from objective_cases import make_case

from opd_lightning.objectives import DenseScores


def test_dense_scores_answer_from_one_matrix():
    case = make_case(vocabulary=6)
    log_q = case.q.log()
    scores = case.scores()
    assert scores.num_tokens == 4
    torch.testing.assert_close(scores.full(), log_q)
    torch.testing.assert_close(scores.sampled(), log_q[range(4), case.response_ids])
    ids = torch.tensor([[5, 0], [1, 1], [2, 3], [4, 5]])
    torch.testing.assert_close(scores.at(ids), log_q.gather(-1, ids))
    top_ids, top = scores.topk(3)
    torch.testing.assert_close(top, log_q.sort(-1, descending=True).values[:, :3])
    torch.testing.assert_close(scores.at(top_ids), top)
    assert scores.topk(16)[0].shape == (4, 6)


def test_slices_answer_for_their_rows():
    case = make_case()
    whole, part = case.scores(), case.scores().slice(1, 3)
    assert part.num_tokens == 2
    assert torch.equal(part.sampled(), whole.sampled()[1:3])
    assert torch.equal(part.topk(4)[0], whole.topk(4)[0][1:3])
    assert torch.equal(part.full(), whole.full()[1:3])


def test_teacher_scores_never_carry_gradient():
    scores = DenseScores(torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 1]))
    assert not scores.full().requires_grad
