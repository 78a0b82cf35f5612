import pytest
from toys import make_trainer

from opd_lightning.callbacks.console import printable, say


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


def test_long_lines_are_not_broken_where_there_is_no_bar(tmp_path, capsys):
    path = "/very/long" * 30 + " [bold]not markup[/bold]"
    say(make_trainer(tmp_path, 1), path)
    assert capsys.readouterr().out == path + "\n"


def test_only_the_first_process_talks(tmp_path, capsys, monkeypatch):
    trainer = make_trainer(tmp_path, 1)
    trainer.strategy.global_rank = 1
    monkeypatch.setattr(type(trainer.strategy), "is_global_zero", False)
    say(trainer, "twice")
    assert capsys.readouterr().out == ""
