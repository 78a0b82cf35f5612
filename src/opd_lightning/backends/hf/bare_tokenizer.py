"""What stands in for a tokenizer where a folder has a configuration only: it knows how many tokens there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from opd_lightning.backends.hf.loading import ModelSource, load_config
from opd_lightning.interfaces import Message, Tokenizer

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


class BareTokenizer(Tokenizer):
    """A number of tokens, for planning: it neither reads nor writes text.

    Args:
        vocab_size: How many.
    """

    pad_id = 0
    stop_ids: tuple[int, ...] = ()
    vocabulary: Mapping[str, int] = {}

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    @override
    def render(self, messages: Sequence[Message]) -> list[int]:
        raise _no_files()

    @override
    def encode(self, text: str) -> list[int]:
        raise _no_files()

    @override
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        raise _no_files()


def has_tokenizer(source: ModelSource) -> bool:
    """Whether a model comes with a tokenizer; of one on the hub it is taken for granted."""
    return not source.is_folder or any(Path(source.location, name).is_file() for name in _FILES)


def bare_tokenizer(source: ModelSource) -> BareTokenizer:
    """One with as many tokens as the configuration names.

    Raises:
        ValueError: There is no configuration.
    """
    config: Any = load_config(source)
    return BareTokenizer(config.get_text_config(decoder=True).vocab_size)


def _no_files() -> AssertionError:
    return AssertionError("there are no files of a tokenizer: only its size is known")
