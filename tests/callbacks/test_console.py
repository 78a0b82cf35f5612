from toys import make_trainer

from opd_lightning.callbacks.console import say


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
