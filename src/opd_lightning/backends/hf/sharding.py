"""Cut a causal language model up over processes (FSDP2), so that body and head still run apart.

Every decoder layer is a unit of its own, gathered while it computes. Embedding, last norm and head are one unit, the
root: a head that is tied to the embedding is the same tensor on both sides and gets one gradient. FSDP2 gathers a root
in its `forward`, which nobody calls here; so the root is given a method that runs the body, with the same hooks around
it. The root stays gathered until its gradients are there, so the head's weight can be read as a plain tensor.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method


def shard_causal_lm(lm: Any, mesh: DeviceMesh, argument: str) -> None:
    """Cut a transformers model up in place; adapters in its layers are cut with them.

    Weights are gathered in their own dtype, so that autocast sees what it sees on one process.

    Args:
        lm: The model itself, out of its peft wrapper.
        mesh: The processes, in one dimension.
        argument: Name of the setting to blame, for example ``"student.path"``.

    Raises:
        ValueError: The model does not say what its layers are.
    """
    remedy = "Use trainer.strategy: ddp, or a model such as Qwen3, Llama, Mistral or Gemma."
    for layer in _layers(lm, argument, remedy):
        fully_shard(layer, mesh=mesh)
    lm.run_body = MethodType(_run_body, lm)
    fully_shard(lm, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(lm, "run_body")


def shard_frozen_body(lm: Any, mesh: DeviceMesh, argument: str) -> None:
    """Cut the body of a frozen model up in place, embedding included; nothing of it stays gathered after a pass.

    The head is let go of: whoever needs it has a copy, since one that is tied would go with the embedding.

    Args:
        lm: The model itself.
        mesh: The processes, in one dimension.
        argument: Name of the setting to blame.

    Raises:
        ValueError: The model does not say what its layers are.
    """
    remedy = f"Set {argument.partition('.')[0]}.sharded: false, which keeps it whole on each process."
    layers = _layers(lm, argument, remedy)
    head = lm.get_output_embeddings()
    head.weight = head.bias = None
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(lm.get_decoder(), mesh=mesh, reshard_after_forward=True)


def _layers(lm: Any, argument: str, remedy: str) -> list[nn.Module]:
    kinds = set(getattr(lm, "_no_split_modules", None) or ())
    layers = [part for part in lm.modules() if type(part).__name__ in kinds]
    if not layers:
        raise ValueError(
            f"{argument}: {type(lm).__name__} does not say which of its parts are layers (_no_split_modules), so it"
            f" cannot be cut up. {remedy}"
        )
    return layers


def _run_body(lm: Any, **inputs: Any) -> Any:
    return lm.get_decoder()(**inputs)


def body_of(lm: Any) -> Any:
    """What turns token ids into hidden states: the decoder, or the method around it that gathers its weights."""
    return lm.get_decoder() if getattr(lm, "run_body", None) is None else lm.run_body


def gather_root(lm: nn.Module) -> None:
    """Have embedding, last norm and head as plain tensors; a collective call unless they are already."""
    if isinstance(lm, FSDPModule):
        lm.unshard()


def plain_class(lm: Any) -> Any:
    """The model's class as transformers knows it: FSDP2 puts one of its own before it."""
    cls = type(lm)
    return cls.__mro__[2] if isinstance(lm, FSDPModule) else cls
