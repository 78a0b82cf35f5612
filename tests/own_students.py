"""Students as users write them in files of their own: a subclass of `HFStudent`, and one that is plain torch."""

from __future__ import annotations

import torch
from conftest import CHARACTERS
from torch import nn

from opd_lightning.backends.hf import HFStudent
from opd_lightning.interfaces import LinearHead, Student, Tokenizer


class ShortStudent(HFStudent):
    """Trains the model's first layers only."""

    def __init__(self, path: str, num_layers: int = 1, **kwargs):
        super().__init__(path, **kwargs)
        self.num_layers = num_layers

    def load(self):
        model = super().load()
        model.model.layers = model.model.layers[: self.num_layers]
        model.config.num_hidden_layers = self.num_layers
        model.config.layer_types = model.config.layer_types[: self.num_layers]
        return model


class CharacterTokenizer(Tokenizer):
    """One id per character; nothing closes a response."""

    vocabulary = {character: i for i, character in enumerate(CHARACTERS)}
    vocab_size, pad_id, stop_ids = len(CHARACTERS), 0, ()

    def render(self, messages):
        return self.encode(messages[-1]["content"])

    def encode(self, text):
        return [self.vocabulary[character] for character in text]

    def decode(self, token_ids, *, skip_special_tokens=True):
        return "".join(CHARACTERS[i] for i in token_ids)


class BigramStudent(Student):
    """Fresh weights; the last token decides about the next."""

    tokenizer, context_length = CharacterTokenizer(), 64

    def __init__(self, width: int = 8):
        self.width = width

    def load(self):
        torch.manual_seed(0)
        sizes = self.tokenizer.vocab_size, self.width
        return nn.ModuleDict({"body": nn.Embedding(*sizes), "head": nn.Linear(*sizes[::-1])})

    def hidden_states(self, model, batch):
        return model["body"](batch.input_ids[batch.rows, batch.columns])

    def head(self, model):
        return LinearHead(model["head"].weight, model["head"].bias, self.tokenizer.vocab_size)

    def describe(self):
        return {"class_path": f"{__name__}.BigramStudent", "init_args": {"width": self.width}}

    def save(self, model, folder, *, merge_adapter=True, dtype=None):
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), folder / "weights.pt")
