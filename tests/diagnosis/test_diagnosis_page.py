"""The page of a diagnosis in a real browser: every number of it, in both themes and on a narrow screen."""

import pytest
from diagnosed import answers, gain, loss, make_diagnosis
from test_template_choice import CLOSER, OWN

from opd_lightning.diagnosis.measurements import Gradients, PositionBin
from opd_lightning.diagnosis.report import make_report
from opd_lightning.reports.files import write_page

pytestmark = pytest.mark.slow
FACTS = {"reverse_kl": 0.25, "student_entropy": 0.5, "overlap_ratio": 0.75, "overlap_mass_teacher": 0.98}


@pytest.fixture(scope="module")
def report():
    bins = tuple(PositionBin(8 * i, 8 * i + 7, 100, FACTS | {"reverse_kl": 0.25 + i / 10}) for i in range(8))
    losses = tuple(loss(f"student top {k} + tail", k) for k in (1, 4, 16, 64))
    return make_report(
        make_diagnosis(
            positions=bins,
            templates=(OWN, CLOSER),
            gradients=Gradients(32, 1000, 1000, (loss("the run's own"), loss("full vocabulary"), *losses)),
            continuations=tuple(gain(depth, 0.2 / (1 + depth / 8), 0.02) for depth in (0, 8, 16, 32)),
            teacher_own_template=answers(accuracy=0.6),
            settings={"student": "a/path/" + "x" * 120, "seed": 0},
        )
    )


@pytest.mark.parametrize(("dark", "width"), [(False, 1200), (True, 1200), (False, 500)])
def test_every_number_is_there_and_can_be_read(browser, tmp_path, report, dark, width):
    write_page(tmp_path / "page.html", report)
    driver = browser.open(tmp_path / "page.html", dark=dark)
    driver.set_window_size(width, 900)
    assert browser.texts(".statement h2") == [each.words for each in report.statements]
    rows = [" ".join(cell.split()) for table in report.tables for row in table.rows for cell in row]
    assert browser.texts("tbody tr > *") == rows and "75.0%" in rows
    assert browser.texts("thead th") == [column for table in report.tables for column in table.columns]
    drawn = browser.texts("svg text")
    assert {panel.title for panel in report.panels} | {"reverse KL (student to teacher)"} <= set(drawn)
    weak = {text: ratio for text, ratio in browser.contrasts().items() if ratio < 4.5}
    assert not weak and len(browser.contrasts()) > 100
    assert not browser.complaints() and browser.requests() == [(tmp_path / "page.html").as_uri()]
    ((inside, outside),) = browser.scrolls("html")
    assert inside <= outside  # the page does not scroll sideways: its tables do
    heights = driver.execute_script("return [...document.querySelectorAll('tbody tr')].map(e => e.offsetHeight)")
    assert max(heights) <= 1.5 * min(heights)  # no cell is broken into lines
    assert any(inside > outside for inside, outside in browser.scrolls("div.wide"))
