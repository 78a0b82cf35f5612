import pytest
import throughput
from throughput_models import Shape, Work

WORK = Work(1000, Shape(8, 2, 16, head_dim=4), Shape(16, 1, 16, heads=4, key_value_heads=2, head_dim=4), 3, 5, 2)


def test_work_survives_being_written():
    assert Work.read(WORK.written()) == WORK


def test_the_floor_counts_products_and_bytes():
    assert WORK.student.body == 2 * (4 * 8 * 8 + 3 * 8 * 16)
    assert WORK.teacher.body == 16 * (2 * 16 + 2 * 8 + 3 * 16)
    floor = WORK.floor(flops=1.0, bandwidth=float("inf"))
    rows, tokens = 3 * 7, 3 * 5
    attended = 3.5  # tokens that a row of 7 looks at on average
    assert floor["teacher"] == 2 * rows * (WORK.teacher.body + 2 * 16 * attended)
    forward = 2 * rows * (WORK.student.body + 2 * 2 * 8 * attended)
    assert floor["student"] == 3 * forward + 2 * tokens * 1000 * (3 * 8 + 16)
    assert floor["optimizer"] == 0
    moving = WORK.floor(flops=float("inf"), bandwidth=1.0)
    weights = WORK.student.body + 8 * 1000
    assert moving["optimizer"] == 28 * weights and moving["generate"] > 5 * 4 * weights
    assert moving["teacher"] == moving["student"] == 0


def test_the_products_alone_are_those_of_the_floor():
    products = WORK.products(chunk_tokens=4)

    def operations(part):
        return sum(2 * each.rows * each.inner * each.columns * each.times for each in products[part])

    rows, tokens = 3 * 7, 3 * 5
    assert operations("teacher") == 2 * rows * WORK.teacher.body
    assert operations("student") == 3 * 2 * rows * WORK.student.body + 2 * tokens * 1000 * (3 * 8 + 16)
    assert operations("generate") == 2 * 3 * ((2 + 4) * WORK.student.body + 5 * 8 * 1000)
    assert max(each.rows for each in products["student"] if each.columns == 1000) == 4
    assert throughput.products_alone(WORK).keys() == products.keys()


def test_ratios_are_taken_turn_by_turn():
    parts = {"generate": 1.0, "teacher": 0.25, "student": 0.5, "optimizer": 0.125}
    ours = [{"seconds": s, "tokens": 10, "parts": parts} for s in (2.0, 4.0, 2.0)]
    other = [{"seconds": s, "tokens": 10} for s in (6.0, 8.0, 4.0)]
    found = {
        "steps": {"ours": ours, "TRL": other},
        "peaks": {"ours": {"peak_mib_above_imports": 50.0}, "TRL": {"peak_mib_above_imports": 200.0}},
    }
    summary = throughput.summarize(WORK, found, {"flops": 1e9, "bytes_per_second": 1e9})
    assert summary["TRL"]["ours_times_as_fast"] == [2.0, 2.0, 3.0]
    assert summary["TRL"]["ours_of_its_memory"] == 0.25
    assert summary["parts"]["rest"]["seconds"] == pytest.approx(0.125)
    assert "2.00x [2.00, 3.00] as fast" in throughput.table("a case", summary)


@pytest.mark.slow
def test_contenders_take_turns(tmp_path):
    found = throughput.race(throughput.CASES["tiny"], ["plain loop"], 1, tmp_path, warm_up=0)
    (step,) = found["steps"]["plain loop"]
    assert 0 < step["tokens"] <= 8 and step["seconds"] > 0
    assert found["peaks"]["plain loop"]["peak_mib"] > found["peaks"]["plain loop"]["peak_mib_above_imports"] > 0


def test_a_contender_that_breaks_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "HERE", tmp_path)
    (tmp_path / "throughput_contenders.py").write_text("raise SystemExit('no such model')")
    with pytest.raises(RuntimeError, match=r"TRL ended early:\nno such model"):
        throughput.Contender("TRL", WORK, tmp_path)
