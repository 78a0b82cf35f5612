"""What runs inside vLLM's worker: takes over the live student's weights.

Imported by vLLM itself (``worker_extension_cls``), in the training process or on a server; registering a
weight-transfer backend is all that importing it does. Knows nothing of training.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from vllm.distributed.weight_transfer.base import (  # type: ignore[import-not-found]
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory  # type: ignore[import-not-found]
from vllm.model_executor.model_loader.reload import (  # type: ignore[import-not-found]
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from opd_lightning.backends.vllm.packed_layers import Observer, PackedLayers

BACKEND = "opd_lightning"


class WorkerExtension:
    """Adds nothing to the worker: naming it makes vLLM import this module, which registers the backend."""


@dataclass
class NoRendezvous(WeightTransferInitInfo):  # type: ignore[misc]
    """Files and references need no connection."""


@dataclass
class WeightUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Where the weights are: one of the two.

    Attributes:
        weights: Names and tensors, when trainer and worker are one process.
        path: A safetensors file that both can read, best in shared memory.
    """

    weights: Iterable[tuple[str, Tensor]] | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        if (self.weights is None) == (self.path is None):
            raise ValueError("weight update: expected either weights or path.")


class LiveWeights(WeightTransferEngine):  # type: ignore[misc]
    """Loads weights in checkpoint form, names and shapes as a model folder has them, into the running model.

    vLLM's layer-wise reload shards, fuses and quantises them like those of a file. On the CPU it leaves the packed copy
    of a head that shares its weight with the embedding as it was; that copy is made anew here. And it takes three times
    as long as needed there; so where the first update shows that it can be done without, the next ones are
    (`packed_layers`).
    """

    init_info_cls = NoRendezvous
    update_info_cls = WeightUpdate
    _layers: PackedLayers | None = None
    _observer: Observer | None = None
    _is_first = True

    def init_transfer_engine(self, init_info: NoRendezvous) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        """Let every layer wait for its weights."""
        if self._layers is not None:
            return
        if self._is_first and self.device.type == "cpu" and self.model_config.quantization is None:
            self._observer = Observer(self.model)
        self._is_first = False
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load the weights and wait for the device, if there is one."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":  # the base class synchronises an accelerator, which a CPU build has not
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: WeightUpdate) -> None:
        """Load the weights.

        Raises:
            ValueError: The file cannot be read from here.
        """
        weights = update_info.weights
        if weights is None:
            path = Path(str(update_info.path))
            if not path.is_file():
                raise ValueError(
                    f"weight update: {path} is not readable here; trainer and server must share the folder."
                )
            weights = load_file(path).items()
        if self._layers is not None:
            self._layers.load(weights)
            return
        self.model.load_weights(iter(weights) if self._observer is None else self._observer.passing(weights))

    def finish_weight_update(self) -> None:
        """Put the loaded weights into use."""
        if self._layers is None:
            finalize_layerwise_reload(self.model, self.model_config)
        if self._observer is not None:
            self._observer.close()
            self._layers, self._observer = self._observer.conclude(), None
        head: Any = getattr(self.model, "lm_head", None)
        if self.device.type == "cpu" and hasattr(head, "cpu_linear"):
            head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        """Nothing to release."""


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a warning of the reload says more than that layers without weights of their own got none."""
    layer = str(record.args[0]) if isinstance(record.args, tuple) and record.args else ""
    expected = layer.endswith(("RotaryEmbedding", "ParallelLMHead"))  # a head tied to the embedding
    return not (expected and "Failed to load weights" in record.msg)


# it would be said again with every step; a head that really got none is found by the check after the first sync
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").addFilter(_is_news)
WeightTransferEngineFactory.register_engine(BACKEND, LiveWeights)
