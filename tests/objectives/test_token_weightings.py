import pytest
import torch
from test_token_weights import make_batch

from opd_lightning.objectives import EntropyWeights, PositionWeights
from opd_lightning.objectives.token_weights import weigh_tokens


def test_weights_halve_with_the_position_down_to_the_floor():
    batch = make_batch(5, 2)
    assert weigh_tokens(PositionWeights(2.0), {}, batch).tolist() == pytest.approx(
        [2 ** (-t / 2) for t in (0, 1, 2, 3, 4, 0, 1)]
    )
    floored = weigh_tokens(PositionWeights(1.0, floor=0.5), {}, batch)
    assert floored.tolist() == [1, 0.75, 0.625, 0.5625, 0.53125, 1, 0.75]
    assert weigh_tokens(PositionWeights(-1.0), {}, batch).tolist() == [1, 2, 4, 8, 16, 1, 2]


def test_weights_follow_the_entropy():
    facts = {"student_entropy": torch.tensor([0.0, 0.5, 2.0])}
    assert weigh_tokens(EntropyWeights(), facts, make_batch(3)).tolist() == pytest.approx([1e-3, 0.5, 2.0])
    assert weigh_tokens(EntropyWeights(2.0, least=0.1), facts, make_batch(3)).tolist() == pytest.approx([0.01, 0.25, 4])
    assert weigh_tokens(EntropyWeights(0.0), facts, make_batch(3)).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PositionWeights(0), r"token_weighting\.half_life: expected a number of tokens other than 0, got 0"),
        (lambda: PositionWeights(floor=1.5), r"token_weighting\.floor: expected a number from 0 to 1, got 1.5"),
        (lambda: EntropyWeights(9.0), r"token_weighting\.power: expected a number from -8 to 8, got 9"),
        (lambda: EntropyWeights(least=0), r"token_weighting\.least: expected a positive number of nats, got 0"),
    ],
)
def test_settings_are_checked(build, message):
    with pytest.raises(ValueError, match=message):
        build()
