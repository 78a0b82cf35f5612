"""Passwords and keys are neither shown nor saved; what stands in their place says which setting to fill."""

import pytest

from opd_lightning.interfaces.addresses import (
    check_nothing_left_out,
    is_secret_name,
    leave_secrets_out,
    without_secrets,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("reading http://me:hush@host:80/a.ckpt now", "reading http://host:80/a.ckpt now"),
        ("'s3://me:hu@sh@bucket/a', 'x'", "'s3://bucket/a', 'x'"),
        ("https://host/a.ckpt?X-Amz-Signature=hush&b=c", "https://host/a.ckpt"),
        ("hf://datasets/me/sums@main/a.json, a@b.c", "hf://datasets/me/sums@main/a.json, a@b.c"),
        ("no address?", "no address?"),
    ],
)
def test_addresses_are_shown_without_what_opens_them(text, shown):
    assert without_secrets(text) == shown


@pytest.mark.parametrize(("name", "is_secret"), [("api_key", True), ("hf_token", True), ("eos_token", False)])
def test_secrets_are_known_by_their_names(name, is_secret):
    assert is_secret_name(name) == is_secret
    assert not is_secret_name("max_new_tokens")


def test_settings_are_kept_without_secrets_and_ask_for_them_again():
    settings = {
        "urls": ["http://me:hush@a:1", "http://b"],
        "inner": {"api_key": "hush", "password": None, "n": 3},
        "ckpt_path": "https://me:hush@c/x.ckpt?sig=hush",
        "prompt": "What is http://d/?a=b",
    }
    kept = leave_secrets_out(settings)
    assert "hush" not in str(kept)
    assert kept == leave_secrets_out(kept)
    assert kept["urls"] == ["http://<left out, set urls again>@a:1", "http://b"]
    assert kept["inner"] == {"api_key": "<left out, set inner.api_key again>", "password": None, "n": 3}
    assert kept["prompt"] == settings["prompt"]
    check_nothing_left_out(settings)
    for part in ("urls", "inner", "ckpt_path"):
        with pytest.raises(ValueError, match=rf"^{part}.*: its password or key was left out when this configuration"):
            check_nothing_left_out({part: kept[part]})
