"""`HFTokenizer`: chat template, padding and stop ids of a transformers tokenizer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from opd_lightning.interfaces import Message, Tokenizer


class HFTokenizer(Tokenizer):
    """Text to token ids and back with a loaded transformers tokenizer.

    Args:
        tokenizer: The transformers tokenizer.
        eos_ids: Ids that end a generation according to the model's own configuration.
        chat_template: Template that replaces the tokenizer's own: its text, or a file that holds it.
        template_kwargs: Extra variables of the template, for example ``{"enable_thinking": False}``.
        extra_stop_tokens: More tokens that close a response, as ids or as they are written in the vocabulary.
        role: Who it belongs to in messages: "student" or "teacher".

    Attributes:
        vocab_size: Highest token id + 1. Models often have more rows than this; those are padding.
        pad_id: The pad token, or else a stop token: masks say what is padding, so nothing ever looks for the id, and a
            closing token that equals it is still trained on.
        stop_ids: Everything that closes a response, sorted: `eos_ids`, the tokenizer's own, and the extra ones.

    Raises:
        ValueError: An extra stop token is not one token, or the template file is missing.
    """

    def __init__(
        self,
        tokenizer: Any,
        eos_ids: Sequence[int] = (),
        chat_template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        extra_stop_tokens: Sequence[int | str] | None = None,
        role: str = "student",
    ) -> None:
        self._tokenizer = tokenizer
        self._role = role
        self._template = None if chat_template is None else _read_template(chat_template, role)
        self._template_kwargs = dict(template_kwargs or {})
        self.vocabulary: dict[str, int] = tokenizer.get_vocab()
        self.vocab_size = max(self.vocabulary.values()) + 1
        extra = [self._stop_id(token) for token in extra_stop_tokens or ()]
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.stop_ids = tuple(sorted({*eos_ids, *own, *extra}))
        self.pad_id = self._choose_pad_id()

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""
        return bool(self._template or self._tokenizer.chat_template)

    def render(self, messages: Sequence[Message]) -> list[int]:
        """Apply the chat template with the generation header and return token ids.

        Raises:
            ValueError: There is no template, it fails on these messages, or it renders to nothing.
        """
        if not self.has_template:
            raise ValueError(
                f"{self._role}.chat_template: the tokenizer has no chat template (base models often have none)."
                " Give one as text or as a file, for example the chat_template.jinja of the instruction-tuned model."
            )
        try:
            token_ids: list[int] = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self._template,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **self._template_kwargs,
            )
        except (TemplateError, TypeError, ValueError) as error:
            roles = [message.get("role") for message in messages]
            raise ValueError(
                f"{self._role}.chat_template: rendering messages with roles {roles} failed: {error}."
                " Change the messages (some templates have no system role), template_kwargs or the template."
            ) from error
        if not token_ids:
            raise ValueError(
                f"{self._role}.chat_template: {len(messages)} messages render to nothing. Check the template and that"
                " the messages have content."
            )
        return token_ids

    def encode(self, text: str) -> list[int]:
        """Return the token ids of plain text, without template and special tokens."""
        token_ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return token_ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of the ids, spaces exactly as the tokens have them."""
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def name_of(self, token_id: int) -> str:
        """The token as it is written in the vocabulary."""
        name: str | None = self._tokenizer.convert_ids_to_tokens(token_id)
        return str(token_id) if name is None else name

    def check(self) -> None:
        """Check that responses can end, and warn about template variables that do nothing.

        Raises:
            ValueError: There is no stop id, or one is outside the vocabulary.
        """
        if outside := [token_id for token_id in self.stop_ids if not 0 <= token_id < self.vocab_size]:
            raise ValueError(
                f"{self._role}.extra_stop_tokens: stop ids {outside} are outside the vocabulary of {self.vocab_size}"
                " tokens (they may also come from eos_token_id in the model's generation_config.json)."
            )
        if not self.stop_ids:
            raise ValueError(
                f"{self._role}.extra_stop_tokens: neither generation_config.json nor the tokenizer names an"
                " end-of-sequence token, so no response would ever end. Name one here."
            )
        template = str(self._template or self._tokenizer.chat_template or "")
        for name in self._template_kwargs:
            if name not in template:
                warnings.warn(
                    f"{self._role}.template_kwargs: the chat template does not use {name!r}; it is ignored.",
                    stacklevel=2,
                )

    def save(self, folder: Path) -> None:
        """Write the tokenizer with the template in use."""
        stored = self._tokenizer.chat_template
        self._tokenizer.chat_template = self._template or stored
        try:
            self._tokenizer.save_pretrained(folder)
        finally:
            self._tokenizer.chat_template = stored

    def _stop_id(self, token: int | str) -> int:
        token_id = token if isinstance(token, int) else self.vocabulary.get(token)
        if token_id is None:
            raise ValueError(
                f"{self._role}.extra_stop_tokens: {token!r} is not one token of this vocabulary. Give a token as it is"
                " written there (such as '<|im_end|>'), or its id."
            )
        return token_id

    def _choose_pad_id(self) -> int:
        if self._tokenizer.pad_token_id is not None:
            return int(self._tokenizer.pad_token_id)
        return self.stop_ids[0] if self.stop_ids else 0


def _read_template(chat_template: str, role: str) -> str:
    """A template is text when it has a Jinja bracket in it, and a file otherwise."""
    if "{" in chat_template:
        return chat_template
    file = Path(chat_template).expanduser()
    if not file.is_file():
        raise ValueError(
            f"{role}.chat_template: {chat_template!r} is neither a template (it has no '{{{{') nor an existing file."
        )
    return file.read_text(encoding="utf-8")
