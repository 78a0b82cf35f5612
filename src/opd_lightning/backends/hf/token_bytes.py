"""What text each token stands for, in bytes: tokenizers write spaces and bytes in several ways."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's alphabet writes these bytes as themselves
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
_BYTE_OF_LETTER = {chr(byte): byte for byte in _VISIBLE} | {chr(256 + n): byte for n, byte in enumerate(_HIDDEN)}
_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def bytes_of_tokens(tokenizer: Any, role: str) -> dict[int, bytes]:
    """The bytes of each token of a transformers tokenizer, without special tokens.

    Byte-level vocabularies (GPT-2's alphabet) and those that write a space as one letter (metaspace, with or without
    tokens for single bytes) are known.

    Args:
        tokenizer: A fast one.
        role: Who it belongs to in messages: "student" or "teacher".

    Raises:
        ValueError: It is of another kind.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoders = [] if backend is None else list(_decoders(json.loads(backend.to_str())["decoder"]))
    kinds = {decoder["type"] for decoder in decoders}
    if not kinds or kinds - {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
        raise ValueError(
            f"{role}.path: its tokenizer decodes by {', '.join(sorted(kinds)) or 'no rule that is known'}, so nobody"
            " knows which bytes a token stands for. Byte-level and metaspace tokenizers can be read across."
        )
    special = set(tokenizer.all_special_ids)
    added = {int(place): token for place, token in tokenizer.added_tokens_decoder.items()}
    found: dict[int, bytes] = {}
    for name, token_id in tokenizer.get_vocab().items():
        if token_id in added:
            if token_id not in special and not added[token_id].special:
                found[token_id] = name.encode()
        else:
            found[token_id] = _bytes_of(name, decoders, kinds)
    return found


def _decoders(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if decoder is not None:
        yield from decoder.get("decoders", [decoder])


def _bytes_of(name: str, decoders: list[Mapping[str, Any]], kinds: set[str]) -> bytes:
    if "ByteLevel" in kinds:
        return b"".join(
            bytes([_BYTE_OF_LETTER[letter]]) if letter in _BYTE_OF_LETTER else letter.encode() for letter in name
        )
    if "ByteFallback" in kinds and (byte := _FALLBACK.fullmatch(name)):
        return bytes([int(byte[1], 16)])
    for decoder in decoders:
        if decoder["type"] == "Metaspace":
            name = name.replace(decoder["replacement"], " ")
        elif decoder["type"] == "Replace" and "String" in decoder["pattern"]:
            name = name.replace(decoder["pattern"]["String"], decoder["content"])
    return name.encode()
