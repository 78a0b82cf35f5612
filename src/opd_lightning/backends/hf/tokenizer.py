"""`HFTokenizer`: chat template, padding and stop ids of a transformers tokenizer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from opd_lightning.backends.hf.loading import ModelSource
from opd_lightning.backends.hf.token_bytes import bytes_of_tokens
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
        pad_id: The pad token, or else a stop token, or else 0: masks say what is padding, so nothing ever looks for the
            id, and a closing token that equals it is still trained on.
        stop_ids: Everything that closes a response, sorted: `eos_ids`, the tokenizer's own, and the extra ones; there
            may be none.
        template_kwargs: Extra variables of the template.

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
        self._template = None if chat_template is None else read_template(chat_template, role)
        self.template_kwargs = dict(template_kwargs or {})
        self.vocabulary: dict[str, int] = tokenizer.get_vocab()
        self.vocab_size = max(self.vocabulary.values()) + 1
        extra = [self._stop_id(token) for token in extra_stop_tokens or ()]
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.stop_ids = tuple(sorted({*eos_ids, *own, *extra}))
        self.pad_id = self._choose_pad_id()
        self._bos_id: int | None = tokenizer.bos_token_id
        self._looks_for_bos = False

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""
        return self.template is not None

    @property
    def template(self) -> str | None:
        """Text of the chat template in use; None where there is none."""
        text: str | None = self._template or self._tokenizer.chat_template or None
        return text

    def render(self, messages: Sequence[Message]) -> list[int]:
        """Apply the chat template with the generation header and return token ids.

        One message with role "raw" is plain text: no template, and the begin-of-sequence token in front only where the
        tokenizer puts it there by itself.

        Raises:
            ValueError: There is no template, it fails on these messages, they render to nothing, or a raw message has
                company.
        """
        is_raw = any(message.get("role") == "raw" for message in messages)
        token_ids = self._render_raw(messages) if is_raw else self._render_chat(messages)
        if not token_ids:
            raise ValueError(
                f"{self._role}.chat_template: {len(messages)} messages render to nothing. Check the template and that"
                " the messages have content."
            )
        if self._looks_for_bos and self._bos_id is not None and token_ids[0] != self._bos_id:
            self._looks_for_bos = False
            where = "with role 'raw'" if is_raw else "of the chat template"
            warnings.warn(
                f"{self._role}.chat_template: the tokenizer has a begin-of-sequence token"
                f" {self.name_of(self._bos_id)!r}, but prompts {where} do not begin with it. A model that was trained"
                " with it is worse without: put it in front, or go on if this one does without.",
                stacklevel=2,
            )
        return token_ids

    def _render_chat(self, messages: Sequence[Message]) -> list[int]:
        if not self.has_template:
            raise ValueError(
                f"{self._role}.chat_template: the tokenizer has no chat template (base models often have none)."
                " Give one as text or as a file, for example the chat_template.jinja of the instruction-tuned model,"
                " or ask with plain text: one message with role 'raw'."
            )
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self._template,
                add_generation_prompt=True,
                tokenize=False,  # as text and then encoded: half the time of asking for both at once
                **self.template_kwargs,
            )
        except (TemplateError, TypeError, ValueError) as error:
            roles = [message.get("role") for message in messages]
            raise ValueError(
                f"{self._role}.chat_template: rendering messages with roles {roles} failed: {error}."
                " Change the messages (some templates have no system role), template_kwargs or the template."
            ) from error
        return self.encode(text)

    def _render_raw(self, messages: Sequence[Message]) -> list[int]:
        if len(messages) != 1:
            roles = [message.get("role") for message in messages]
            raise ValueError(
                f"messages: one with role 'raw' is a whole prompt as it stands; got roles {roles}. Leave the others out"
                " (a task's system_prompt makes one), or give all of them chat roles."
            )
        token_ids = self.encode(messages[0]["content"])
        adds_bos = self._bos_id is not None and self._tokenizer.encode("a")[0] == self._bos_id
        return [self._bos_id, *token_ids] if adds_bos and token_ids[:1] != [self._bos_id] else token_ids  # type: ignore[list-item]

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

    def token_bytes(self) -> dict[int, bytes]:
        """The bytes of text that each token stands for, whatever stands for a space and for single bytes.

        Raises:
            ValueError: The tokenizer is of a kind of which that is not known.
        """
        return bytes_of_tokens(self._tokenizer, self._role)

    @property
    def closing_id(self) -> int | None:
        """The token that ends a text by the tokenizer's own account; None where it names none."""
        token_id: int | None = self._tokenizer.eos_token_id
        return token_id if token_id is not None else next(iter(self.stop_ids), None)

    def name_of(self, token_id: int) -> str:
        """The token as it is written in the vocabulary."""
        name: str | None = self._tokenizer.convert_ids_to_tokens(token_id)
        return str(token_id) if name is None else name

    def check(self) -> None:
        """Check stop ids and warn about template variables that do nothing; warn of a missing bos when rendering.

        Raises:
            ValueError: A stop id is outside the vocabulary.
        """
        self._looks_for_bos = True
        if outside := [token_id for token_id in self.stop_ids if not 0 <= token_id < self.vocab_size]:
            raise ValueError(
                f"{self._role}.extra_stop_tokens: stop ids {outside} are outside the vocabulary of {self.vocab_size}"
                " tokens (they may also come from eos_token_id in the model's generation_config.json)."
            )
        template = self.template or ""
        for name in self.template_kwargs:
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


def read_template(chat_template: str, role: str) -> str:
    """A template is text when it has a Jinja bracket in it, and a file otherwise.

    Raises:
        ValueError: It is neither.
    """
    if "{" in chat_template:
        return chat_template
    file = Path(chat_template).expanduser()
    if not file.is_file():
        raise ValueError(
            f"{role}.chat_template: {chat_template!r} is neither a template (it has no '{{{{') nor an existing file."
        )
    text = file.read_text(encoding="utf-8")
    if "{" not in text:
        raise ValueError(f"{role}.chat_template: {chat_template!r} holds no template (it has no '{{{{').")
    return text


def check_vocabulary_rows(source: ModelSource, config: Any, tokenizer: HFTokenizer) -> None:
    """Refuse a model with fewer rows than its tokenizer has ids."""
    num_rows = config.get_text_config(decoder=True).vocab_size
    if num_rows < tokenizer.vocab_size:
        raise ValueError(
            f"{source.argument}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the model has only"
            f" {num_rows} rows. The tokenizer belongs to another model, or tokens were added without resizing the"
            " embeddings."
        )
