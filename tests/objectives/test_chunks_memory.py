"""What is alive while chunks are compared: never more than one chunk's logits; and how often a head runs: once."""

import gc
import weakref

import pytest
import torch
from test_chunks import FACTS, H, N, Net, V, each_variant, material
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from opd_lightning.interfaces import LinearHead
from opd_lightning.objectives import DenseScores, DivergenceObjective, HiddenScores, compare_in_chunks

TEACHER_WIDTH = 5


class Watching(TorchDispatchMode):
    """Remembers every tensor of one number per token and vocabulary entry."""

    def __init__(self):
        super().__init__()
        self.most_rows, self.references = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dim() == 2 and result.shape[-1] == V and len(result) != H:
            self.most_rows = max(self.most_rows, result.shape[0])
            self.references.append(weakref.ref(result))
        return result

    def alive(self):
        gc.collect()
        return sum(reference() is not None for reference in self.references)


@each_variant
@pytest.mark.parametrize("counts_alike", [True, False])
def test_no_logits_outlive_their_chunk(variant, counts_alike):
    net = Net()
    ids, teacher, tokens = material()
    hidden, head, objective = net.hidden(ids), net.head, variant(chunk_tokens=4)
    saved = []
    watching = Watching()
    keep = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    )
    with keep, watching:
        result = compare_in_chunks(hidden, head, objective, teacher, tokens, counts_alike=counts_alike, **FACTS)
    assert watching.references and watching.most_rows <= 4
    assert watching.alive() == 0
    assert not any(tensor.dim() == 2 and tensor.shape[-1] == V for tensor in saved)
    with watching:
        result.losses.sum().backward()
    assert watching.most_rows <= 4


class Remembering(DenseScores):
    """A teacher whose slices keep what they computed."""

    references = []

    def slice(self, start, stop):
        part = Remembering(self._log_probs[start:stop], self.response_ids[start:stop])
        Remembering.references.append(weakref.ref(part))
        return part


@each_variant
def test_no_slice_of_the_teachers_scores_outlives_its_chunk(variant):
    net = Net()
    ids, teacher, tokens = material()
    Remembering.references = []
    remembering = Remembering(teacher.full(), tokens.ids)
    compare_in_chunks(net.hidden(ids), net.head, variant(chunk_tokens=4), remembering, tokens, **FACTS)
    assert len(Remembering.references) >= 6
    assert not any(reference() for reference in Remembering.references)


def counting():
    def of_addmm_(total, first, second, *args, out_shape=None, **kwargs):
        return 2 * first[0] * first[1] * second[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: of_addmm_})


@pytest.mark.parametrize("chunk_tokens", [4, N])
@pytest.mark.parametrize(("trains_head", "counts_alike"), [(True, True), (True, False), (False, False)])
def test_each_head_runs_once_unless_weights_wait_for_the_facts(chunk_tokens, trains_head, counts_alike):
    net = Net()
    net.embedding.requires_grad_(trains_head)
    ids, _, tokens = material()
    generator = torch.Generator().manual_seed(5)
    hidden_of_teacher, weight = (torch.randn(n, TEACHER_WIDTH, generator=generator).double() for n in (N, V))
    teacher = HiddenScores(hidden_of_teacher, tokens.ids, LinearHead(weight, None, V))
    hidden = net.hidden(ids).detach().requires_grad_()
    objective = DivergenceObjective(chunk_tokens=chunk_tokens)
    with counting() as forward:
        result = compare_in_chunks(hidden, net.head, objective, teacher, tokens, counts_alike=counts_alike, **FACTS)
    with counting() as backward:
        result.losses.sum().backward()
    student, teachers = 2 * N * V * H, 2 * N * V * TEACHER_WIDTH
    if trains_head and not counts_alike:
        assert forward.get_total_flops() == student + teachers
        assert backward.get_total_flops() == 3 * student + teachers
    else:
        assert forward.get_total_flops() == (3 if trains_head else 2) * student + teachers
        assert backward.get_total_flops() == 0
