"""What a loaded teacher holds when it is not whole: while it rests, and when it is quantised."""

from __future__ import annotations

from torch import nn

from opd_lightning.backends.hf.loading import load_model
from opd_lightning.backends.hf.teacher import HFTeacher
from opd_lightning.backends.hf.weightless import without_data

_BITS = {"load_in_4bit": 4.5, "load_in_8bit": 8.0}  # bitsandbytes; 4 bits and a float32 scale for 64 of them


def whole_bytes(teacher: HFTeacher) -> int:
    """Bytes of the weights where they are not quantised; none is read."""
    with without_data():
        model = load_model(teacher.source, teacher.dtype)
        return sum(each.numel() * each.element_size() for each in (*model.parameters(), *model.buffers()))


def head_bytes(teacher: HFTeacher) -> int:
    """Bytes of the head of a loaded one: what a device holds while the body rests, and beside its share of a body."""
    head = teacher._head
    assert head is not None, "call setup first"
    return sum(each.numel() * each.element_size() for each in (head.weight, head.bias) if each is not None)


def body_of(teacher: HFTeacher) -> nn.Module:
    """All of a loaded one but the head."""
    body: nn.Module = teacher._model.get_decoder()
    return body


def saved_bytes(teacher: HFTeacher) -> int:
    """Bytes by which a quantised teacher is smaller than it was built without data."""
    settings = teacher.quantization_config or {}
    bits = next((bits for name, bits in _BITS.items() if settings.get(name)), None)
    if bits is None or teacher._model is None:
        return 0
    head = teacher._model.get_output_embeddings()
    layers = [part for part in teacher._model.modules() if isinstance(part, nn.Linear) and part is not head]
    return int(sum(part.weight.numel() * (part.weight.element_size() - bits / 8) for part in layers))
