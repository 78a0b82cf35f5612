"""Bytes and operations counted on tensors without data, against tensors that are there."""

import torch
from torch import nn

from opd_lightning.backends.hf.weightless import is_weightless, without_data
from opd_lightning.planning.counting import OperationCounter
from opd_lightning.planning.hardware import Operation


def counted():
    return OperationCounter(lambda operation: 0.0)


def test_weights_hold_what_real_ones_hold():
    real = nn.Linear(37, 11).to(torch.bfloat16)
    with without_data(), counted() as counter, counter.part("weights"):
        layer = nn.Linear(37, 11, dtype=torch.bfloat16)
        assert is_weightless()
    assert not is_weightless()
    assert counter.live["weights"] == sum(each.nbytes for each in real.parameters())
    del layer
    assert counter.live["weights"] == 0


def test_the_peak_is_that_of_the_worst_moment_by_part():
    with without_data(), counted() as counter:
        with counter.part("first"):
            first = torch.empty(10)
        with counter.part("second"):
            second = torch.empty(100) + 1  # the sum beside what is added to
            del first
            third = second.view(10, 10)  # no memory of its own
    assert counter.peak == {"first": 40, "second": 800}
    assert dict(counter.live) == {"first": 0, "second": 400}
    counter.restart()
    assert counter.peak == {"first": 0, "second": 400}
    del second
    assert counter.live["second"] == 400
    del third
    assert counter.live["second"] == 0


def test_products_and_bytes_are_those_of_the_shapes():
    seen = []
    with without_data(), OperationCounter(lambda operation: seen.append(operation) or 2.0) as counter:
        left, right = torch.empty(4, 8), torch.empty(8, 6)
        counter.restart()
        seen.clear()
        left @ right
        torch.exp(torch.empty(1).expand(50))
    product, _, _, function = seen
    assert product == Operation(flops=2 * 4 * 8 * 6, bytes=4 * (4 * 8 + 8 * 6 + 4 * 6), rows=4)
    assert function.bytes == 4 * (1 + 50) and function.entries > 0  # one place is read fifty times
    assert counter.flops == product.flops and counter.num_calls == 4 and counter.seconds == 8


def test_a_weight_that_many_are_multiplied_with_is_one_product_of_many_rows():
    seen = []
    with without_data(), OperationCounter(lambda operation: seen.append(operation) or 0.0):
        torch.bmm(torch.empty(5, 1, 8), torch.empty(8, 6).expand(5, 8, 6))
        torch.bmm(torch.empty(5, 2, 8), torch.empty(5, 8, 6))
    shared, single = (operation for operation in seen if operation.flops)
    assert shared.rows == 5 and shared.bytes == 4 * (5 * 8 + 8 * 6 + 5 * 6)
    assert single.rows == 2


def test_a_tensor_can_be_given_to_another_part():
    with without_data(), counted() as counter:
        weight = torch.empty(25)
        counter.assign(weight, "gradients")
        counter.assign(None, "gradients")
    assert dict(counter.live) == {"other": 0, "gradients": 100}
