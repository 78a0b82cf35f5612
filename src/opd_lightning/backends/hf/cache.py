"""The key-value caches of the generation loop: with room for several tokens at a time, so that a token costs no copy.

Or with room for all of them, in tensors that stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer
from typing_extensions import override

_GROWTH = (
    4  # room grows by this part of what is used: at most this many times each column is copied, whatever the length
)
_LEAST_GROWTH = 16  # columns


class RoomyCache(DynamicCache):  # type: ignore[misc]
    """Keys and values in the dtype that attention takes them in, with room to write the next ones.

    Under autocast a float32 model makes float32 keys (the rotation promotes them), and growing the cache promotes the
    values too: twice the memory, cast again for every token. Attention is in the dtype of autocast either way.

    Args:
        config: The decoder's.
        device_type: Where the model is.
        most: Columns that will be needed at most.
    """

    def __init__(self, config: Any, device_type: str, most: int) -> None:
        super().__init__(config=config)
        # windows keep a fixed number of columns, and states of linear attention do not grow
        layers: list[Any] = self.layers  # type: ignore[has-type]
        self.layers = [_RoomyLayer(most) if type(layer) is DynamicLayer else layer for layer in layers]
        self._dtype = _dtype_instead_of_float32(device_type)

    @override
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = (
            states.to(self._dtype) if states.dtype == torch.float32 else states for states in (key_states, value_states)
        )
        grown: tuple[Tensor, Tensor] = super().update(keys, values, *args, **kwargs)
        return grown


class FixedCache(StaticCache):  # type: ignore[misc]
    """Keys and values of a fixed number of rows and columns, at addresses that stay, in the dtype of `RoomyCache`.

    Args:
        config: The decoder's.
        device_type: Where the model is.
        num_columns: Of each row.
    """

    def __init__(self, config: Any, device_type: str, num_columns: int) -> None:
        super().__init__(config=config, max_cache_len=num_columns)
        self._dtype = _dtype_instead_of_float32(device_type)

    @override
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = (
            states.to(self._dtype) if states.dtype == torch.float32 else states for states in (key_states, value_states)
        )
        filled: tuple[Tensor, Tensor] = super().update(keys, values, *args, **kwargs)
        return filled

    def begin(self, prompts: RoomyCache, rows: Tensor) -> None:
        """Hold those rows of what the prompts have left, and nothing else.

        Args:
            prompts: What the prompts have left.
            rows: int64 [R], may repeat them.
        """
        for layer, prompt in zip(self.layers, prompts.layers, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(prompt.keys[rows], prompt.values[rows])
            width = prompt.keys.shape[-2]
            for table, states in ((layer.keys, prompt.keys), (layer.values, prompt.values)):
                table[..., :width, :] = states[rows]
                table[..., width:, :] = 0  # not finite ones of earlier weights would reach through the mask
            layer.cumulative_length.fill_(width)


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """`keys` and `values` are the filled part of larger tensors.

    Args:
        most: Columns that will be needed at most.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most
        self._rooms: tuple[Tensor, Tensor] | None = None

    @override
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        used = self.get_seq_length()
        needed = used + key_states.shape[-2]
        if self._rooms is None or self._rooms[0].shape[-2] < needed:
            width = max(needed, min(self._most, needed + max(_LEAST_GROWTH, needed // _GROWTH)))
            self._rooms = _enlarged(self.keys, key_states, width), _enlarged(self.values, value_states, width)
        rooms = self._rooms
        rooms[0][..., used:needed, :], rooms[1][..., used:needed, :] = key_states, value_states
        self.keys, self.values = rooms[0][..., :needed, :], rooms[1][..., :needed, :]
        return self.keys, self.values

    @override
    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rooms = None  # what follows copies the filled part of the rows that are kept
        super().reorder_cache(beam_idx)


def _enlarged(filled: Tensor, new: Tensor, width: int) -> Tensor:
    """A tensor like the new states, `width` columns wide, that begins with the filled ones."""
    room = new.new_empty(*new.shape[:-2], width, new.shape[-1])
    if filled.numel():
        room[..., : filled.shape[-2], :] = filled
    return room


def _dtype_instead_of_float32(device_type: str) -> torch.dtype:
    """What float32 states are kept in: the dtype of autocast where it is on."""
    is_cast = torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if is_cast else torch.float32
