"""Read configurations, tokenizers and weights from a folder or the hub, and explain in one line what is wrong."""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from opd_lightning.backends.hf.weightless import blank_model, is_weightless
from opd_lightning.sandbox import resolve

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}

_TAKES_OTHERS = (
    "auto-round",
    "awq",
    "fp8",
    "gptq",
    "mxfp8",
    "quark",
    "sinq",
)  # settings beside those of their signature

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        path: Local folder, hub id, or a sandbox name such as "sandbox:student".
        role: Who it is in messages: "student" or "teacher".
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether code that comes with the model may run.
    """

    path: str
    role: str
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def argument(self) -> str:
        """Name of the setting that says where the model is."""
        return f"{self.role}.path"

    @property
    def location(self) -> str:
        """What `from_pretrained` is given."""
        # absolute, since adapters remember where their base model lies
        return str(self._folder.resolve()) if self.is_folder else self.path

    @property
    def is_folder(self) -> bool:
        """Whether it is a local folder (a folder wins over a hub id of the same name)."""
        return self._folder.is_dir()

    @property
    def _folder(self) -> Path:
        return Path(resolve(self.path, self.argument)).expanduser()

    @property
    def options(self) -> dict[str, Any]:
        """Options that every `from_pretrained` takes."""
        return {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}

    def check(self) -> None:
        """Look for the files a model needs, and whether weight files are whole (from their headers: nothing is read).

        Raises:
            ValueError: There is no such folder and it cannot be a hub id either, the folder is no model, or a file in
                it is cut short.
        """
        if not self.is_folder:
            if _HUB_ID.fullmatch(self.path) is None or self._folder.exists():
                raise ValueError(
                    f"{self.argument}: no folder {self.path!r}. Expected a folder with config.json, *.safetensors and"
                    " tokenizer files, or a hub id such as 'Qwen/Qwen3-1.7B'."
                )
            return
        folder = Path(self.location)
        if (folder / "config.json").is_file():
            for path in sorted(folder.glob("*.safetensors")):
                with _explained(self, "weights"), safe_open(path, "pt"):
                    pass
            return
        if (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"{self.argument}: {self.path!r} holds only a LoRA adapter. Put its base model here and this folder in"
                f" {self.role}.adapter_path, or export it with the adapter merged."
            )
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
        raise ValueError(
            f"{self.argument}: no config.json in {self.path!r} (found: {found}). Expected a folder in Hugging Face"
            " format; `opd-lightning export` makes one from a checkpoint."
        )


def load_config(source: ModelSource) -> Any:
    """Load the model's configuration (no weights)."""
    source.check()
    with _explained(source, "configuration"):
        return AutoConfig.from_pretrained(source.location, **source.options)


def most_tokens(config: Any) -> int | None:
    """Tokens that a sequence may have; None when the configuration names no number.

    Rotary factors that change with the length (longrope) change for a whole batch at once. There it is the length up to
    which they do not, since what a rollout's tokens are worth must not depend on how long those beside it are.
    """
    decoder = config.get_text_config(decoder=True)
    limits: list[int | None] = [getattr(decoder, "max_position_embeddings", None)]
    rope = getattr(decoder, "rope_parameters", None) or {}
    for each in (
        rope,
        *(part for part in rope.values() if isinstance(part, Mapping)),
    ):  # some have one per kind of layer
        if each.get("rope_type") == "longrope":
            limits.append(each.get("original_max_position_embeddings"))
    return min((limit for limit in limits if limit is not None), default=None)


def load_tokenizer(source: ModelSource) -> Any:
    """Load the tokenizer."""
    source.check()
    with _explained(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source.location, **source.options)
    # transformers makes an empty tokenizer of the model's family when the files are missing
    if len(tokenizer.get_vocab()) <= len(tokenizer.get_added_vocab()):
        raise ValueError(
            f"{source.argument}: no tokenizer in {source.path!r}. Expected tokenizer.json (or the files of its family)"
            " beside the weights; copy them from the model it was made from."
        )
    return tokenizer


def load_eos_ids(source: ModelSource, config: Any) -> list[int]:
    """Ids that end a generation according to generation_config.json, or to the model's configuration without one."""
    try:
        eos = GenerationConfig.from_pretrained(source.location, **source.options).eos_token_id
    except OSError:  # optional file: transformers falls back to the same field of config.json
        eos = config.get_text_config(decoder=True).eos_token_id
    if eos is None:
        return []
    return [eos] if isinstance(eos, int) else list(eos)


def load_model(
    source: ModelSource,
    dtype: str,
    attn_implementation: str | None = None,
    quantization_config: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
) -> Any:
    """Load the weights, in evaluation mode as transformers leaves them.

    Args:
        source: Where from.
        dtype: A name in `DTYPES`, or "auto" for the dtype they are stored in.
        attn_implementation: Attention kernel; None lets transformers choose.
        quantization_config: Passed to transformers (``{"quant_method": "bitsandbytes", "load_in_4bit": true}``).
        device: Where quantised weights are put at once; others are loaded to the CPU.

    Raises:
        ValueError: Files are missing, damaged or do not fit the configuration, or a setting is not known.
    """
    if is_weightless():
        return blank_model(load_config(source), DTYPES.get(dtype, dtype), attn_implementation)
    source.check()
    options: dict[str, Any] = {"dtype": DTYPES.get(dtype, dtype)}
    what = "weights"
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
        what += f" with {source.role}.attn_implementation={attn_implementation!r}"
    if quantization_config is not None:
        options |= {"quantization_config": dict(quantization_config), "device_map": {"": device}}
        # each 8-bit product would say that it works in float16
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        what += f" with {source.role}.quantization_config={dict(quantization_config)}"
    with _explained(source, what):
        # what does not fit is reported below by name
        model, report = AutoModelForCausalLM.from_pretrained(
            source.location, output_loading_info=True, ignore_mismatched_sizes=True, **source.options, **options
        )
    if misfits := sorted(report["mismatched_keys"]):
        name, found, expected = misfits[0]
        raise ValueError(
            f"{source.argument}: {len(misfits)} weights in {source.path!r} do not have the shape its config.json asks"
            f" for, first {name!r}: expected {list(expected)}, found {list(found)}. Weights and configuration belong to"
            " different models."
        )
    if missing := sorted(report["missing_keys"]):
        # transformers only warns, and leaves them random
        raise ValueError(
            f"{source.argument}: {len(missing)} weights are missing from {source.path!r}, first {missing[0]!r}."
            " The files are incomplete, or belong to another configuration; copy or download the model again."
        )
    return model


def check_dtype(role: str, dtype: str) -> None:
    """Refuse an unknown dtype name."""
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"{role}.dtype: expected 'auto' or one of {', '.join(DTYPES)}, got {dtype!r}.")


def check_quantization(role: str, quantization_config: Mapping[str, Any] | None) -> None:
    """Refuse settings of a quantization that transformers would not know, or would pass over without a word.

    Raises:
        ValueError: No method is named or an unknown one, bits are missing, or a name means nothing to the method.
    """
    if quantization_config is None:
        return
    argument = f"{role}.quantization_config"
    if "quant_method" not in quantization_config:
        raise ValueError(
            f"{argument}: expected a key 'quant_method' (for example 'bitsandbytes') beside"
            f" {sorted(quantization_config)}."
        )
    method = quantization_config["quant_method"]
    known = sorted({name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZATION_CONFIG_MAPPING})
    if method not in known:
        raise ValueError(f"{argument}: quant_method is {method!r}; transformers knows {', '.join(known)}.")
    if method == "bitsandbytes" and not any(quantization_config.get(name) for name in ("load_in_4bit", "load_in_8bit")):
        raise ValueError(
            f"{argument}: bitsandbytes needs load_in_4bit: true or load_in_8bit: true beside"
            f" {sorted(quantization_config)}."
        )
    if method in _TAKES_OTHERS:
        return
    settings_of = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method, BitsAndBytesConfig)
    names = [name for name in inspect.signature(settings_of).parameters if name != "kwargs"]
    if unknown := sorted({*quantization_config} - {"quant_method", *names}):
        raise ValueError(f"{argument}: {method} has no setting {unknown[0]!r}; it has {', '.join(names)}.")


@contextmanager
def _explained(source: ModelSource, what: str) -> Iterator[None]:
    """Turn the many ways in which loading fails into one line that names the setting."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except SafetensorError as error:
        raise ValueError(
            f"{source.argument}: a weight file in {source.path!r} is damaged or cut short ({error})."
            " Copy or download it again."
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{source.argument}: a JSON file in {source.path!r} is damaged or cut short ({error})."
            " Copy or download it again."
        ) from error
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".!")
        hint = "" if source.is_folder else _hub_hint(source)
        raise ValueError(f"{source.argument}: cannot load the {what} of {source.path!r}: {reason}.{hint}") from error


def _hub_hint(source: ModelSource) -> str:
    return (
        f" There is no such folder in {Path.cwd()}, so it was taken for a hub id: check the spelling, the network"
        " (HF_HUB_OFFLINE, access token), or give a local folder."
    )
