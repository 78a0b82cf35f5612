"""Secrets stay where they are used: what of addresses and settings may be shown, logged and saved."""

from __future__ import annotations

import re
from typing import Any

_USER = re.compile(r"(\b[a-zA-Z][\w+.-]*://)[^\s'\"<>/]*@")
_QUERY = re.compile(r"(\b[a-zA-Z][\w+.-]*://[^\s'\"?#]*)[?#][^\s'\"]*")
_SIGNED = re.compile(  # a query that is a key, and not a question mark in somebody's prompt
    r"(\b[a-zA-Z][\w+.-]*://[^\s'\"?#]*)\?[^\s'\"]*(?:sig|token|key|secret|password|credential)[^\s'\"]*=[^\s'\"]*",
    re.IGNORECASE,
)
_SECRET_NAME = re.compile(r"(?:^|_)(?:key|token|secret|password|passwd|credentials?)$")
_TOKENS_OF_TEXT = re.compile(r"(?:^|_)(?:bos|eos|pad|unk|sep|cls|mask|stop|start|end)_token$")
_LEFT_OUT = re.compile(r"<left out, set [^<>]* again>")


def is_secret_name(name: str) -> bool:
    """Whether a setting of this name holds a secret: `api_key`, `hf_token`, `password` and the like."""
    return _SECRET_NAME.search(name) is not None and _TOKENS_OF_TEXT.search(name) is None


def without_secrets(text: str) -> str:
    """The text, its addresses without user, password, query and fragment."""
    return _QUERY.sub(r"\1", _USER.sub(r"\1", text))


def leave_secrets_out(settings: Any, name: str = "") -> Any:
    """A copy of nested settings to be kept: a placeholder that names the setting stands where a secret was.

    Secrets are texts under the names that `is_secret_name` knows, and in addresses user, password and signed queries.
    """
    if isinstance(settings, dict):
        dot = f"{name}." if name else ""
        return {key: leave_secrets_out(value, f"{dot}{key}") for key, value in settings.items()}
    if isinstance(settings, list):
        return [leave_secrets_out(value, name) for value in settings]
    if not isinstance(settings, str) or not settings:
        return settings
    placeholder = f"<left out, set {name} again>"
    if is_secret_name(name.rpartition(".")[2]) and not _LEFT_OUT.search(settings):
        return placeholder
    return _USER.sub(rf"\1{placeholder}@", _SIGNED.sub(rf"\1?{placeholder}", settings))


def check_nothing_left_out(settings: Any, name: str = "") -> None:
    """Refuse settings in which a secret was left out and not put back.

    Raises:
        ValueError: One is still missing; names it.
    """
    parts = settings.items() if isinstance(settings, dict) else []
    for key, value in parts:
        check_nothing_left_out(value, f"{name}.{key}" if name else str(key))
    for value in settings if isinstance(settings, list) else []:
        check_nothing_left_out(value, name)
    if isinstance(settings, str) and _LEFT_OUT.search(settings):
        raise ValueError(
            f"{name}: its password or key was left out when this configuration was saved ({settings}). Put it into the"
            f" file, or give the whole value behind it: --{name.replace('.init_args.', '.')}=..."
        )
