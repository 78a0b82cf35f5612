"""What is alive while chunks are compared: never more than one chunk's logits, and no teacher's slice."""

import weakref

import torch
from test_chunks import FACTS, Net, V, each_variant, material, run

from opd_lightning.objectives import DenseScores, compare_in_chunks


class Watched:
    """A head that remembers which of its logits are still alive, and how often it ran."""

    def __init__(self, net):
        self.net, self.references, self.most_alive = net, [], 0

    def __call__(self, hidden):
        logits = self.net.head(hidden)
        self.references.append(weakref.ref(logits))
        self.most_alive = max(self.most_alive, self.alive())
        return logits

    def alive(self):
        return sum(reference() is not None for reference in self.references)


@each_variant
def test_no_logits_outlive_their_chunk(variant):
    net = Net()
    ids, teacher, tokens = material()
    watched = Watched(net)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    objective = variant(chunk_tokens=4)
    hidden = net.hidden(ids)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compare_in_chunks(hidden, watched, objective, teacher, tokens, **FACTS)
    assert len(watched.references) == 6
    assert watched.alive() == 0
    assert watched.most_alive <= 2  # the last chunk's may die only when the next one's replace them
    per_token = [tensor for tensor in saved if tensor.dim() == 2 and tensor.shape[-1] == V]
    assert per_token == []
    result.losses.sum().backward()
    assert len(watched.references) == 12
    assert watched.most_alive <= 2


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
    assert len(Remembering.references) == 6
    assert not any(reference() for reference in Remembering.references)


def test_a_single_chunk_is_not_recomputed():
    watched = Watched(Net())
    run(watched.net, 512, head=watched).losses.sum().backward()
    assert len(watched.references) == 1
