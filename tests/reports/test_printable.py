import pytest

from opd_lightning.reports.printable import printable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("two\nlines\tand ü 中 🙂", "two\nlines\tand ü 中 🙂"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("over\rwritten\x08\x7f\x9b", "over\\rwritten\\x08\\x7f\\x9b"),
        ("turned \u202eround\u2069", "turned \\u202eround\\u2069"),
        ("half \ud83d", "half \\ud83d"),
    ],
)
def test_control_characters_are_spelt_out(text, expected):
    assert printable(text) == expected
    printable(text).encode()
