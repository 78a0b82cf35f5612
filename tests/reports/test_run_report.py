"""What a run recorded, read and shown by value: from real runs of tiny models, and from files written by hand."""

import csv
import json
import math
from dataclasses import replace

import pytest
import yaml
from recorded_runs import SETTINGS

from opd_lightning.reports.contents import Curve, Panel
from opd_lightning.reports.plots import draw_alone
from opd_lightning.reports.training_runs.folder import find_folder, read_metrics, read_run, read_runs
from opd_lightning.reports.training_runs.held_out import difference, differences_of, statement
from opd_lightning.reports.training_runs.measures import (
    MEASURES,
    MOST_POINTS,
    mean_of_steps,
    panels_of,
    thinned,
    wilson,
)
from opd_lightning.reports.training_runs.page import render_page, write_report
from opd_lightning.reports.training_runs.report import as_json, make_report
from opd_lightning.reports.training_runs.searches import RATE, search_panels, searches_of
from opd_lightning.reports.training_runs.settings import differences, readable
from opd_lightning.reports.training_runs.time_spent import rollouts_table, time_by_part, time_panels


def write_run(folder, rows, config=None, marks=()):
    """A run by hand: rows of metrics in the order of the file."""
    folder.mkdir(parents=True)
    names = sorted({name for row in rows for name in row})
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if marks:
        (folder / "held_out_marks.jsonl").write_text("".join(json.dumps(each) + "\n" for each in marks))
    return folder


def test_steps_count_those_the_weights_have_made(recorded):
    """Lightning gives a validation after a step the number of that step; marks and searches say it themselves."""
    (run,) = read_runs([recorded[0]])
    assert run.num_steps == 3
    assert list(run.series["train/reverse_kl"]) == [0, 1, 2]
    assert list(run.series["val/avg_at_1"]) == list(run.marks) == [1, 2, 3]
    for step, accuracy in run.series["val/avg_at_1"].items():
        marks = run.marks[step].values()
        assert len(marks) == 6 and accuracy == pytest.approx(sum(marks) / 6)
    assert run.settings["model.optimizer.lr"] == 0.01


def test_a_validation_before_the_first_step_stays_there(tmp_path):
    rows = [{"step": 0, "val/avg_at_1": 0.1}, {"step": 0, "train/loss": 3}, {"step": 0, "val/avg_at_1": 0.2}]
    series, notes = read_metrics(write_run(tmp_path / "run", rows) / "metrics.csv")
    assert series == {"val/avg_at_1": {0: 0.1, 1: 0.2}, "train/loss": {0: 3.0}} and notes == []


def test_a_search_is_what_it_was(recorded):
    (run,) = read_runs([recorded[0]])
    (search,) = searches_of(run)
    assert (search.who, search.step, search.standing, search.kept, search.score) == ("effopd", 2, -2, 2, 0)
    assert search.trials == ((1, -1), (2, 0), (4, -1)) and search.words == "kept +2 Delta"
    (panel,) = search_panels([search])
    assert (panel.curves[0].xs, panel.curves[0].ys, panel.marks) == ([0, 1, 2, 4], [-2, -1, 0, -1], [(2, 0)])


def test_the_search_for_a_learning_rate_too(tmp_path):
    values = {"score_before_step": -3, "score_after": -1, "scale": 0.1, "factor": 0.2, "seconds": 2, "tokens": 0}
    scores = {"score_at/1": -math.inf, "score_at/0.1": -1.0, "score_at/0.0316228": -2.0}
    row = {"step": 1} | {f"{RATE}/{name}": value for name, value in (values | scores).items()}
    (search,) = searches_of(read_run(write_run(tmp_path / "run", [row, {"step": 0, "train/loss": 1}]), "run"))
    assert search.words == "kept 0.1 times the step" and search.trials[-1] == (1, -math.inf)
    (panel,) = search_panels([search])
    assert panel.curves[0].xs == [0, 0.0316228, 0.1] and panel.marks == [(0.1, -1)]


def test_time_by_part_adds_up(recorded):
    (run,) = read_runs([recorded[0]])
    spent = {each.part: each for each in time_by_part(run)}
    assert list(spent) == ["generate", "sync", "grade", "teacher", "student", "optimizer", "searches"]
    assert spent["student"].total == pytest.approx(sum(run.series["train/seconds/student"].values()))
    assert spent["student"].per_step == pytest.approx(spent["student"].total / 3)
    assert spent["searches"].total == run.series["effopd/seconds"][2]
    assert sum(each.of_steps for each in spent.values()) == pytest.approx(1)


def test_steps_that_were_not_logged_took_time_too(tmp_path):
    """`log_every_n_steps: 10`: two of twenty steps are logged, of two rounds in four; every search is."""
    rows = [{"step": step, "train/seconds/student": 2, "train/round": step // 5} for step in (9, 19)]
    rows += [{"step": 15, "effopd/score_before": -1, "effopd/seconds": 10}]
    run = read_run(write_run(tmp_path / "run", [row | {"train/pass": 0} for row in rows]), "run")
    student, searches = time_by_part(run)
    assert (student.total, student.per_step, student.of_steps) == (40, 2, 0.8)
    assert (searches.total, searches.per_step, searches.of_steps) == (10, 0.5, 0.2)
    shown = dict(rollouts_table([run]).rows)
    assert (shown["rounds of rollouts generated"], shown["steps per round, mean"]) == ("3", "6.67")


def test_the_parts_of_a_long_run_are_drawn_at_the_same_steps(tmp_path):
    """Thinned apart, searches would stand beside the other parts instead of on top of them."""
    rows = [{"step": step, "train/seconds/student": 2} for step in range(2 * MOST_POINTS)]
    rows += [{"step": 7, "effopd/score_before": -1, "effopd/seconds": 10}]
    run = read_run(write_run(tmp_path / "run", rows), "run")
    student, searches = time_panels([run])[0].curves
    assert student.xs == searches.xs and set(student.ys) == {2}
    assert {x: y for x, y in zip(searches.xs, searches.ys, strict=True) if y} == {6.5: 5}  # mean of steps 6 and 7
    (both,) = time_panels([run, replace(run, label="again")])[0].curves[:1]
    assert max(both.ys) == 7


def test_generated_ahead_counts_what_was_waited_for(tmp_path):
    row = {"step": 0, "train/seconds/generate": 9, "train/seconds/wait": 1, "train/seconds/student": 3}
    row["DeviceStatsMonitor.on_train_batch_end/allocated_bytes.all.peak"] = 3 * 2**29
    row |= {"train/memory_gb/between_steps": 2.5, "train/memory_gb/student": 4}
    run = read_run(write_run(tmp_path / "run", [row]), "run")
    assert [(each.part, each.total) for each in time_by_part(run)] == [("wait", 1), ("student", 3)]
    by_part, memory = time_panels([run])[-2:]
    assert by_part.title == "Memory by part of a step"
    assert [(curve.label, curve.ys) for curve in by_part.curves] == [("between steps", [2.5]), ("student", [4])]
    assert memory.title == "Memory of the GPU" and memory.curves[0].ys == [1.5]


def test_rollouts_reused_and_chosen(tmp_path):
    rows = [
        {"step": i, "train/round": i // 3, "train/pass": i % 3, "train/staleness": i % 3, "train/skipped_steps": i // 4}
        | {"selection/pool_share": 1 - i / 10, "train/truncation_rate": 0.25}
        for i in range(6)
    ]
    run = read_run(write_run(tmp_path / "run", rows), "run")
    shown = dict(rollouts_table([run]).rows)
    assert shown["rounds of rollouts generated"] == "2" and shown["steps per round, mean"] == "3"
    assert shown["passes over a round, at most"] == "3" and shown["staleness in steps, largest"] == "2"
    assert shown["steps skipped for a gradient that was not finite"] == "1"
    assert shown["selection: pool share, at the end"] == "0.5" and shown["answers cut at max_new_tokens"] == "25.0%"


def test_two_runs_beside_each_other(recorded):
    fast, slow = runs = read_runs(recorded)
    assert [run.label for run in runs] == ["fast", "slow"]
    assert differences([fast.settings, slow.settings]) == {"model.optimizer.lr": ["0.01", "0.0001"]}
    (found,) = differences_of(runs)
    marks = fast.marks[3], slow.marks[3]
    assert found.mean == pytest.approx(sum(marks[1][uid] - marks[0][uid] for uid in marks[0]) / 6)
    assert set(found.gained) == {uid for uid in marks[0] if marks[0][uid] <= 0.5 < marks[1][uid]}
    kl = next(panel for panel in panels_of(MEASURES[0], runs))
    assert [(curve.label, curve.colour, curve.run) for curve in kl.curves] == [
        ("fast", 0, 0),
        ("slow", 1, 1),
    ]
    assert [curve.ys for curve in kl.curves] == [list(run.series["train/reverse_kl"].values()) for run in runs]
    numbers = as_json(runs)
    assert numbers["settings_that_differ"] and len(numbers["runs"]) == 2
    assert numbers["held_out_differences"][0]["mean"] == found.mean


def test_untrained_weights_are_not_compared(tmp_path):
    """Both validated at 0; what they came to was validated at different steps."""
    runs = [
        read_run(
            write_run(
                tmp_path / name,
                [{"step": 0, "train/loss": 1}],
                marks=[{"step": 0, "marks": {"a": [0]}}, {"step": step, "marks": {"a": [mark]}}],
            ),
            name,
        )
        for name, step, mark in (("one", 4, 0), ("two", 6, 1))
    ]
    (found,) = differences_of(runs)
    assert (found.before, found.after, found.mean) == ("one, step 4", "two, step 6", 1)
    assert differences_of([replace(run, marks={0: run.marks[0]}) for run in runs]) == []


@pytest.mark.parametrize(("num_steps", "first", "last"), [(1, 0, 0), (3, 0, 2), (6, 1, 4), (20, 2, 17)])
def test_first_and_last_share_no_step_of_several(num_steps, first, last):
    series = {step: float(step) for step in range(num_steps)}
    assert [mean_of_steps(series, last=each) for each in (False, True)] == [first, last]


def test_settings_of_classes_have_short_names_and_do_not_shift():
    one = {"class_path": "a.One", "init_args": {"x": 1, "inner": {"class_path": "b.Inner"}}}
    two = {"class_path": "c.Two", "init_args": None}
    assert readable({"callbacks": [two, one, two], "plain": [1, 2], "none": {}}) == {
        "callbacks.Two": "c.Two",
        "callbacks.One": "a.One",
        "callbacks.One.x": 1,
        "callbacks.One.inner": "b.Inner",
        "callbacks.Two#2": "c.Two",
        "plain": [1, 2],
        "none": {},
    }
    runs = [readable({"callbacks": [one]}), readable({"callbacks": [two, one]})]
    assert differences(runs) == {"callbacks.Two": ["-", "c.Two"]}


def test_problems_that_changed_sides_by_value():
    before, after = {"a": 0.0, "b": 1.0, "c": 1.0, "d": 0.5}, {"a": 1.0, "b": 0.0, "c": 1.0, "d": 0.75, "e": 1.0}
    found = difference("x", before, "y", after)
    assert found.num_problems == 4 and found.mean == pytest.approx(0.25 / 4)
    assert found.gained == {"a": (0, 1), "d": (0.5, 0.75)} and found.lost == {"b": (1, 0)}
    deviation = math.sqrt(sum((x - 0.0625) ** 2 for x in (1, -1, 0, 0.25)) / 3)
    assert found.half_width == pytest.approx(1.96 * deviation / 2)
    assert difference("x", {"a": 1.0}, "y", {"b": 1.0}) is None
    alike = difference("x", {"a": 0.0, "b": 0.0}, "y", {"a": 1.0, "b": 1.0})
    assert alike.half_width == 1.5 and "+100.0 ± 150.0 points (no certain difference)" in statement(alike).words


def test_wilsons_interval():
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # textbook values
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4) and wilson(1.0, 10)[1] == 1


def test_an_accuracy_that_is_no_share_has_no_interval(tmp_path):
    """The folder of any Trainer with a CSVLogger will do, and some count in percent."""
    rows = [{"step": step, "val/avg_at_1": 45.0, "val/num_problems": 4} for step in (0, 1)]
    run = read_run(write_run(tmp_path / "run", rows), "run")
    (panel,) = panels_of(next(each for each in MEASURES if each.title == "Accuracy"), [run])
    assert panel.curves[0].ys == [45, 45] and panel.curves[0].intervals == []


def test_a_resumed_run_is_read_with_what_it_went_on_from(tmp_path):
    first = [{"step": i, "train/loss": 10 + i} for i in range(5)] + [{"step": 4, "val/avg_at_1": 0.5}]
    second = [{"step": i, "train/loss": 20 + i} for i in range(3, 6)]
    before = write_run(tmp_path / "version_0", first, marks=[{"step": 5, "marks": {"a": [1.0]}}])
    config = {"ckpt_path": str(before / "checkpoints" / "last.ckpt")}
    write_run(tmp_path / "version_1", second, config, [{"step": 6, "marks": {"a": [0.0, 1.0]}}])
    assert find_folder(tmp_path).name == "version_1"
    (run,) = read_runs([tmp_path])
    assert run.series["train/loss"] == {0: 10, 1: 11, 2: 12, 3: 23, 4: 24, 5: 25}
    assert run.marks == {6: {"a": 0.5}}  # the validation after step 5 was of weights that the resumed run never had
    assert "val/avg_at_1" not in run.series or 5 not in run.series["val/avg_at_1"]
    assert "went on at step 3" in run.notes[0]


def test_a_run_that_has_only_validated_since_it_was_resumed_keeps_what_was_before(tmp_path):
    """`log_every_n_steps: 50`: training has logged nothing yet."""
    first = [{"step": i, "train/loss": i} for i in (9, 19, 29)] + [{"step": 19, "val/avg_at_1": 0.5}]
    before = write_run(tmp_path / "version_0", first)
    config = {"ckpt_path": str(before / "checkpoints" / "last.ckpt")}
    write_run(tmp_path / "version_1", [{"step": 24, "val/avg_at_1": 0.75}], config)
    (run,) = read_runs([tmp_path])
    assert run.series == {"train/loss": {9: 9, 19: 19}, "val/avg_at_1": {20: 0.5, 25: 0.75}}
    assert "went on at step 24" in run.notes[0]


def test_long_curves_are_thinned_to_means():
    xs, ys = thinned({step: float(step) for step in range(10 * MOST_POINTS)} | {-1: math.nan})
    assert len(xs) == MOST_POINTS and xs[0] == ys[0] == 4.5


def test_a_kill_in_the_middle_of_a_row_costs_that_row(copied):
    path = copied[0] / "metrics.csv"
    whole = path.read_text()
    path.write_text(whole + whole.splitlines()[-1][:-3])
    marks = copied[0] / "held_out_marks.jsonl"
    marks.write_text(marks.read_text() + '{"step": 9, "ma')
    (run,) = read_runs([copied[0]])
    assert run.series == read_metrics(path)[0] and list(run.marks) == [1, 2, 3]
    assert ["cut off" in note for note in run.notes] == [True, True]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.csv", "", "is no table of metrics"),
        ("metrics.csv", f"step,train/loss\n0,{'1' * 200_000}\n", "is no table: field larger than"),
        ("metrics.csv", "step,train/lo", "is no table of metrics"),
        ("metrics.csv", "step,train/loss\n", "holds no values yet"),
        ("metrics.csv", "step,train/loss\n0,1,2\n", "line 2 of .* has 3 cells, but the first line has 2 names"),
        ("metrics.csv", "step,train/loss\n0,much\n", "line 2 of .*: could not convert"),
        ("metrics.csv", b"step,\xff\n", "cannot be read: it is no UTF-8 text"),
        ("config.yaml", "a: [", "is no YAML"),
        ("config.yaml", "- a", "holds no settings by name"),
        ("held_out_marks.jsonl", "[]\n", "line 1 of .* is no line of marks"),
    ],
)
def test_files_that_are_none_are_named(copied, name, text, message):
    (copied[0] / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"^runs: .*{message}") as caught:
        read_runs([copied[0]])
    assert "\n" not in str(caught.value)


def test_folders_that_are_no_run_are_named(copied, tmp_path):
    with pytest.raises(ValueError, match="runs: there is no folder"):
        read_runs([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"runs: no metrics.csv in .*empty"):
        read_runs([tmp_path / "empty"])
    with pytest.raises(ValueError, match=r"holds 2 runs: .*fast', .*slow'. Name one of them"):
        read_runs([tmp_path])
    with pytest.raises(ValueError, match="is named twice"):
        read_runs([copied[0], copied[0]])


HOSTILE = '<script>alert(1)</script>"$x_1$'


def test_the_page_is_whole_and_hostile_names_are_text(copied):
    runs = [folder.rename(folder.with_name(f"{folder.name}{HOSTILE.replace('/', '')}")) for folder in copied]
    read = read_runs(runs)
    report = make_report(read)
    page = render_page(replace(report, sections=[replace(each, panels=each.panels[:1]) for each in report.sections]))
    assert "<script>alert" not in page and page.count("<script>") == 1
    assert "http" not in page and "&lt;script&gt;" in page
    assert 'id="p0-0-curve-0-0"' in page and 'id="p3-0-curve-0-0"' in page


def test_a_page_that_is_not_finished_says_so_to_the_browser(tmp_path):
    runs = [read_run(write_run(tmp_path / "run", [{"step": 0, "train/loss": 1, "val/none": "nan"}], SETTINGS), "run")]
    write_report(tmp_path, runs, refresh_seconds=300)
    assert '<meta http-equiv="refresh" content="300">' in (tmp_path / "report.html").read_text()
    write_report(tmp_path, runs)
    assert "refresh" not in (tmp_path / "report.html").read_text()
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["runs"][0]["settings"]["data.prompts_per_step"] == SETTINGS["data"]["prompts_per_step"]


def test_what_is_not_finite_is_null_in_json(recorded):
    (run,) = read_runs(recorded[:1])
    run = replace(run, series=run.series | {"train/loss": {0: math.inf, 1: math.nan}})
    numbers = json.loads(json.dumps(as_json([run]), allow_nan=False))
    assert numbers["runs"][0]["searches"][0]["kept"] == 2 and numbers["runs"][0]["searches"][0]["cosine"] is None
    assert numbers["runs"][0]["curves"]["train/loss"] == {"steps": [], "values": []}


def test_ids_of_drawings_differ_and_the_box_is_where_the_axes_are(recorded):
    (panel,) = panels_of(MEASURES[1], read_runs(recorded[:1]))
    drawings = [draw_alone(panel, prefix) for prefix in ("a", "b")]
    assert drawings[0].svg != drawings[1].svg and drawings[0].box == drawings[1].box
    left, right, top, bottom = drawings[0].box
    assert 0 < left < right <= 1 and 0 <= top < bottom < 1
    assert drawings[0].limits[0] < 0 < 3 < drawings[0].limits[1]


def test_there_is_no_half_of_a_step():
    svg = draw_alone(Panel("Loss", "step", "nats", [Curve("", [0, 1, 2], [7, 8, 9])]), "a").svg
    assert ">1<" in svg and ">0.5<" not in svg
