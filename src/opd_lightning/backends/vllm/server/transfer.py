"""How the live student's weights reach the servers: through a file that both can read, or over NCCL."""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_lightning.backends.vllm.answers import field
from opd_lightning.backends.vllm.server.client import ServerPool
from opd_lightning.backends.vllm.server.exchange import Server
from opd_lightning.backends.vllm.weights import shared_memory_folder, write_weights

Weights = Iterator[tuple[str, Tensor]]


class WeightTransfer(ABC):
    """Puts weights into running servers through vLLM's weight-transfer endpoints.

    The servers need ``VLLM_SERVER_DEV_MODE=1``, whose endpoints ask nobody for a password: keep them on a private
    network.
    """

    @abstractmethod
    def push(self, pool: ServerPool, read_weights: Callable[[], Weights], weight_version: str) -> None:
        """Replace the weights of every server.

        Args:
            pool: The servers; none of them is working for us.
            read_weights: Yields names and tensors as a model folder has them; may be called more than once.
            weight_version: What the servers answer from now on when asked for their version.
        """

    def close(self) -> None:  # noqa: B027 - most have nothing to release
        """Release what `push` took."""


class FileTransfer(WeightTransfer):
    """A safetensors file that is written for every push and removed after it.

    On one machine the file lies in shared memory: one copy, no disk. The servers load it with the backend in
    `worker`, so this package must be installed where they run; start them with
    ``--worker-extension-cls opd_lightning.backends.vllm.worker.WorkerExtension``
    ``--weight-transfer-config '{"backend": "opd_lightning"}'``.

    Args:
        folder: Where to write; a folder that all machines share under this path when the servers run elsewhere. None is
            shared memory.
        dtype: Cast floating-point weights for the journey ("bfloat16" halves it when the servers compute in it anyway);
            None keeps the student's.
    """

    def __init__(self, folder: str | None = None, dtype: str | None = None) -> None:
        if dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"transfer.dtype: expected float32, bfloat16, float16 or null, got {dtype!r}.")
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"transfer.folder: expected a folder, got {folder!r}.")
        self.folder = Path(folder) if folder is not None else shared_memory_folder()
        self.dtype: torch.dtype | None = None if dtype is None else getattr(torch, dtype)

    def push(self, pool: ServerPool, read_weights: Callable[[], Weights], weight_version: str) -> None:
        """Write, let every server read, remove."""
        path = write_weights(read_weights(), self.folder, self.dtype)
        try:
            pool.on_every_server(lambda server: pool.insist(lambda: self._load(server, path, weight_version)))
        finally:
            path.unlink()

    def _load(self, server: Server, path: Path, weight_version: str) -> None:
        with _paused(server):
            server.ask("/init_weight_transfer_engine", {"init_info": {}})
            server.ask("/start_weight_update", {})
            server.ask("/update_weights", {"update_info": {"path": str(path)}})
            server.ask("/finish_weight_update", {"weight_version": weight_version})
            server.ask("/reset_prefix_cache", {})


class NCCLTransfer(WeightTransfer):
    """Broadcast from the training GPU to the servers' GPUs through vLLM's own trainer side, nothing on disk.

    Needs vLLM in the training environment too, and servers started with
    ``--weight-transfer-config '{"backend": "nccl"}'``. Written against vLLM 0.32 and not run: the project's own tests
    have no GPU. With several servers the weights are broadcast to one after the other.

    Args:
        master_address: Address of the training machine as the servers see it.
        dtype: Dtype on the way; the servers' own.
    """

    def __init__(self, master_address: str = "127.0.0.1", dtype: str = "bfloat16") -> None:
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"transfer.dtype: expected float32, bfloat16 or float16, got {dtype!r}.")
        self.master_address = master_address
        self.dtype: torch.dtype = getattr(torch, dtype)
        self._senders: list[Any] = []

    def push(self, pool: ServerPool, read_weights: Callable[[], Weights], weight_version: str) -> None:
        """Broadcast; the first push also makes the connections."""
        if not self._senders:
            self._senders = [self._connect(pool, server, read_weights) for server in pool.servers]
        for server, sender in zip(pool.servers, self._senders, strict=True):
            sender.source.read_weights = read_weights
            with _paused(server):
                sender.send_weights()
                server.ask("/update_weight_version", {"new_version": weight_version})
                server.ask("/reset_prefix_cache", {})

    def close(self) -> None:
        """Leave the process groups."""
        for sender in self._senders:
            sender.shutdown()
        self._senders = []

    def _connect(self, pool: ServerPool, server: Server, read_weights: Callable[[], Weights]) -> Any:
        from vllm.distributed.weight_transfer.factory import (  # type: ignore[import-not-found]
            WeightTransferTrainerFactory,
        )
        from vllm.distributed.weight_transfer.nccl_engine import (  # type: ignore[import-not-found]
            NCCLTrainerInitInfo,
        )

        with socket.socket() as listener:
            listener.bind(("", 0))
            port = listener.getsockname()[1]
        num_workers = pool.ask(server, "/get_world_size", read=field("world_size", int))
        place = NCCLTrainerInitInfo(
            master_address=self.master_address, master_port=port, world_size=1 + num_workers, rank=0
        )
        return WeightTransferTrainerFactory.trainer_init(
            place, client=_ControlPlane(server), source=make_source(read_weights, self.dtype)
        )


@contextmanager
def _paused(server: Server) -> Iterator[None]:
    """Abort what is still running (requests we gave up waiting for), and never leave a server paused."""
    server.ask("/pause?mode=abort", {})
    try:
        yield
    except BaseException:
        with suppress(ConnectionError, ValueError):  # the first failure is the one to report
            server.ask("/resume", {})
        raise
    server.ask("/resume", {})


class _ControlPlane:
    """The four calls that vLLM's trainer side makes."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._server.ask("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._server.ask("/start_weight_update", {})

    def update_weights(self, update_info: Any) -> None:
        self._server.ask("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._server.ask("/finish_weight_update", {} if weight_version is None else {"weight_version": weight_version})


def make_source(read_weights: Callable[[], Weights], dtype: torch.dtype) -> Any:
    """The student as a `WeightSource` of vLLM's."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource  # type: ignore[import-not-found]

    class LiveStudent(WeightSource):  # type: ignore[misc]
        def __init__(self) -> None:
            self.read_weights = read_weights
            self._metadata: list[Any] = []

        def metadata(self) -> list[Any]:
            if not self._metadata:  # names and shapes stay; under an adapter they are only known by merging once
                self._metadata = [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]
            return self._metadata

        def __iter__(self) -> Weights:
            for name, tensor in self.read_weights():
                yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor

    return LiveStudent()
