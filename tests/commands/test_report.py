"""`opd-lightning report` from the command line."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from test_ckpt_path import SETTINGS, elsewhere  # noqa: F401

sys.path.append(str(Path(__file__).parent.parent / "reports"))
from recorded_tokens import write_records

from opd_lightning.commands.cli import main
from opd_lightning.commands.report import with_runs_named
from opd_lightning.reports.token_records import FOLDER


@pytest.fixture(autouse=True)
def without_curves(monkeypatch):
    """They take time, and are other tests'."""
    monkeypatch.setattr("opd_lightning.reports.training_runs.page.can_draw", lambda: False)


def test_a_tilde_is_the_home_folder(copied, tmp_path, monkeypatch):
    """Shells leave it alone behind an equals sign."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(copied[0].parent)
    main(["report", str(copied[0]), "--output=~/shown"])
    assert (tmp_path / "shown" / "report.html").exists() and not Path("~").exists()


def test_a_run_and_two(copied, capsys):
    fast, slow = map(str, copied)
    main(["report", fast])
    shown = capsys.readouterr().out
    assert "Report of a run" in shown and "kept +2 Delta" in shown and f"{fast}/report/report.html" in shown
    assert "Every score" not in shown and "All settings" not in shown
    assert (copied[0] / "report" / "report.html").exists()
    main(["report", fast, slow, "--output", str(copied[0].parent / "it's here")])
    shown = capsys.readouterr().out
    assert "Comparison of 2 runs" in shown and "model.optimizer.lr   0.01   0.0001" in shown
    numbers = json.loads((copied[0].parent / "it's here" / "report.json").read_text())
    assert [run["label"] for run in numbers["runs"]] == ["fast", "slow"]


def test_tokens_are_the_last_part_of_the_page_or_a_page_alone(copied, capsys):
    run = copied[0]
    write_records(run / FOLDER)
    main(["report", str(run)])
    page = (run / "report" / "report.html").read_text()
    assert '<section id="fragment-1">' in page and page.index("Settings</h2>") < page.index("problem/0")
    main(["report", str(run.parent / "fast"), "--tokens"])
    page = (run / "report" / "tokens.html").read_text()
    assert "problem/0" in page and "Reverse KL</figcaption>" not in page
    assert "tokens.html" in capsys.readouterr().out


def write_settings(run, ckpt_path=None, dirpath=None):
    recorder = {"class_path": "opd_lightning.TokenRecorder", "init_args": {"dirpath": dirpath}}
    settings = {"trainer": {"callbacks": [recorder]}, "ckpt_path": ckpt_path}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))


@pytest.mark.parametrize("kind", ["resumed", "dirpath"])
def test_tokens_are_found_where_the_run_recorded_them(copied, tmp_path, capsys, kind):
    first, run = copied
    write_settings(run)
    main(["report", str(run)])
    assert f"TokenRecorder left no records in '{run}'" in capsys.readouterr().err
    if kind == "resumed":
        write_records(first / FOLDER)
        write_settings(run, ckpt_path=str(first / "checkpoints" / "last.ckpt"))
    else:
        write_settings(run, dirpath=str(write_records(tmp_path / "elsewhere")))
    for words, page in (([], "report.html"), (["--tokens"], "tokens.html")):
        main(["report", str(run), *words])
        assert "problem/0" in (run / "report" / page).read_text()
    assert "left no records" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "runs: there is no folder 'nowhere'"),
        ([], "runs: expected at least one folder of a run: opd-lightning report RUN [RUN2 ...]."),
        (["--output", "x"], "runs: expected at least one folder of a run"),
        (["{fast}", "--runs", "{slow}"], "runs: expected folders as words or after --runs, got both"),
        (["--tokens", "{fast}"], "holds no records of tokens"),
        (["{fast}", "{fast}"], "is named twice. Name different runs"),
        (["{fast}", *["{slow}"] * 9], "runs: expected at most 8, one for each colour, got 10"),
        (["{fast}", "--output", "{fast}/metrics.csv"], "cannot be a folder, since"),
        (["{fast}", "--outptu", "x"], "outptu"),
        (["{fast}", "--tokens"], "holds no records of tokens"),
    ],
)
def test_mistakes_are_one_line(words, message, recorded, capfd):
    fast, slow = recorded
    with pytest.raises(SystemExit, match="2"):
        main(["report", *(word.format(fast=fast, slow=slow) for word in words)])
    lines = [line for line in capfd.readouterr().err.splitlines() if "OPD_LIGHTNING_TRACEBACK" not in line]
    assert len(lines) == 1 and message in lines[0]


def test_folders_may_have_any_name():
    assert with_runs_named(["a", "it's [b], c", "--output", "d"]) == [
        "--runs",
        "['a', 'it''s [b], c']",
        "--output",
        "d",
    ]
    assert with_runs_named(["--help"]) == ["--help"]


def test_folders_may_stand_anywhere():
    assert with_runs_named(["--output", "x", "a", "--tokens", "b"]) == [
        "--runs",
        "['a', 'b']",
        "--output",
        "x",
        "--tokens=true",
    ]
    assert with_runs_named(["a", "--tokens", "false"]) == ["--runs", "['a']", "--tokens=false"]
