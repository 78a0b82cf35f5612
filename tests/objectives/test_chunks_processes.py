"""The chunked loss inside DistributedDataParallel on two processes."""

import pytest
import torch
import torch.multiprocessing
from test_chunks import FACTS, Net, material
from torch import nn

from opd_lightning.objectives import DivergenceObjective, compare_in_chunks

NUM_TOKENS = {"even": (12, 11), "idle": (23, 0)}


class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, rows):
        ids, teacher, tokens = material()
        return compare_in_chunks(
            self.net.hidden(ids[rows]),
            self.net.head,
            DivergenceObjective(chunk_tokens=4),
            teacher.slice(rows.start, rows.stop),
            tokens[rows],
            **FACTS,
        ).losses.sum()


def work(rank, store, out, split):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    first, second = NUM_TOKENS[split]
    rows = slice(0, first) if rank == 0 else slice(first, first + second)
    wrapped = nn.parallel.DistributedDataParallel(Loss())
    for _ in range(2):
        wrapped.zero_grad()
        (2 * wrapped(rows)).backward()  # DDP averages over the two processes
    if rank == 0:
        torch.save([parameter.grad for parameter in wrapped.parameters()], out)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("split", NUM_TOKENS)
def test_two_processes_have_the_gradient_of_one_even_when_one_has_no_tokens(split, tmp_path):
    out = tmp_path / "gradients.pt"
    torch.multiprocessing.spawn(work, (str(tmp_path / "store"), str(out), split), nprocs=2)
    alone = Loss()
    alone(slice(0, 23)).backward()
    torch.testing.assert_close(torch.load(out), [parameter.grad for parameter in alone.parameters()])
