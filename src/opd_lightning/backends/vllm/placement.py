"""Where a colocated vLLM runs, and what it must leave as it was: devices, process groups, threads, random state."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.seed import isolate_rng


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, which is the only way vLLM listens to, and take them back."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def engine_defaults(device: torch.device, max_model_len: int) -> dict[str, Any]:
    """Arguments of `vllm.LLM` where the user gives none."""
    is_cuda = device.type == "cuda"
    defaults: dict[str, Any] = {
        "dtype": "bfloat16" if is_cuda else "float32",
        "max_model_len": max_model_len,
        "gpu_memory_utilization": 0.4,
        "generation_config": "vllm",
        "disable_log_stats": True,
    }
    if not is_cuda:
        defaults["enable_chunked_prefill"] = False  # a seeded request whose prompt is cut in two stops the CPU build
        defaults["block_size"] = 32  # only whole blocks of a prompt are shared, and 128 is seldom reached
    return defaults


def launcher_variables(device: torch.device) -> tuple[dict[str, str], dict[str, str]]:
    """Engine arguments and environment that put an in-process vLLM on this process's device.

    Left alone vLLM takes the first GPU. Told that a launcher like torchrun started it, it reads its place from the
    environment, and uses the process group that is there.

    Args:
        device: The training device of this process.
    """
    is_initialized = dist.is_initialized()
    world_size = dist.get_world_size() if is_initialized else 1
    if world_size == 1 and not device.index:
        return {}, {}
    variables = {
        "RANK": str(dist.get_rank() if is_initialized else 0),
        "LOCAL_RANK": str(device.index or 0),
        "WORLD_SIZE": str(world_size),
    }
    if not is_initialized:
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    return {"distributed_executor_backend": "external_launcher"}, variables


def visible_devices(device: torch.device, devices: Sequence[int] | None, num_shards: int) -> dict[str, str]:
    """Environment that shows a child process its GPUs only.

    Args:
        device: The training device of this process.
        devices: GPUs as this process counts them; None is `device`, or all when several are wanted.
        num_shards: GPUs wanted.

    Raises:
        ValueError: Several GPUs per engine and several training processes, without saying who takes which.
    """
    if device.type != "cuda":
        return {}
    if devices is None and num_shards > 1:
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                f"engine.engine_args: an engine over {num_shards} GPUs for each of {dist.get_world_size()} training"
                " processes would share GPUs. Set tensor_parallel_size: 1 (each process generates its own share), or"
                " use VLLMServerEngine."
            )
        return {}
    if devices is not None and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"engine.devices: each of {dist.get_world_size()} training processes would put its engine on GPUs"
            f" {list(devices)}. Leave it out (each generates on its own GPU), or use VLLMServerEngine."
        )
    wanted = [device.index or 0] if devices is None else devices
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in wanted] if not shown else [shown.split(",")[i] for i in wanted]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names)}


@contextmanager
def process_group_kept(keep: bool) -> Iterator[None]:
    """Shut an in-process vLLM down without the default process group, which it would take with it whoever made it."""
    destroy = dist.destroy_process_group

    def destroy_subgroup(group: dist.ProcessGroup | None = None) -> None:
        if group is not None:
            destroy(group)

    if keep:
        dist.destroy_process_group = destroy_subgroup
    try:
        yield
    finally:
        dist.destroy_process_group = destroy


@contextmanager
def left_alone(device: torch.device) -> Iterator[None]:
    """Keep vLLM from the caller's random state, thread settings and autocast."""
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    try:
        with isolate_rng(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_num_threads = set_num_threads  # the CPU build makes it a no-op
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
