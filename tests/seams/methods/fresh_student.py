"""A recurrent student of plain torch, with fresh weights and the sandbox's tokenizer."""

from functools import cached_property

import torch
from torch import nn

from opd_lightning.backends.hf import HFStudent
from opd_lightning.interfaces import LinearHead, Student


class FreshStudent(Student):
    context_length = 256

    def __init__(self, width: int = 32, seed: int = 0):
        self.width, self.seed = width, seed

    @cached_property
    def tokenizer(self):
        return HFStudent("sandbox:student").tokenizer

    def load(self):
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            embedding = nn.Embedding(self.tokenizer.vocab_size, self.width)
            return nn.ModuleDict({"embedding": embedding, "body": nn.GRU(self.width, self.width, batch_first=True)})

    def hidden_states(self, model, batch):
        states, _ = model["body"](model["embedding"](batch.input_ids))
        return states[batch.rows, batch.columns]

    def head(self, model):
        return LinearHead(model["embedding"].weight, None, num_rows=self.tokenizer.vocab_size)

    def save(self, model, folder, *, merge_adapter=True, dtype=None):
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), folder / "weights.pt")
