"""The page of an analysis in a real browser: every number of it, in both themes."""

import pytest
from test_analyze import grid, make_run

from opd_lightning.commands.analysis_report import Analysis, make_report
from opd_lightning.commands.update_geometry import measure
from opd_lightning.reports.files import write_page
from opd_lightning.training.run_points import find_updates

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    names = [f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("mlp.up_proj", "self_attn.q_proj")]
    updates = {step: {name: step * grid(i, 6, 4) for i, name in enumerate(names)} for step in (1, 2, 8)}
    found = find_updates(str(make_run(folder, updates)))
    return make_report(
        Analysis(
            run=str(folder),
            start=None,
            points=[str(point.stored.path) for point in found.points],
            dtypes=["float32"],
            is_low_rank=False,
            early=0,
            geometry=measure(found),
            variants=[],
        )
    )


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_number_is_there_and_can_be_read(browser, tmp_path, report, dark):
    write_page(tmp_path / "page.html", report)
    driver = browser.open(tmp_path / "page.html", dark=dark)
    driver.set_window_size(1200, 900)
    rows = [" ".join(cell.split()) for table in report.tables for row in table.rows for cell in row]
    assert browser.texts("tbody tr > *") == rows and len(rows) > 30
    drawn = browser.texts("svg text")
    assert {"Cosine with the last update", "random walk", "top 1", "Effective rank"} <= set(drawn)
    lines = driver.find_elements("css selector", "svg path[style*='stroke:']")
    colours = {line.value_of_css_property("stroke") for line in lines}
    assert len(colours - {"none", "rgb(0, 0, 0)"}) >= 4  # as many as there are curves on the first axes
    weak = {text: ratio for text, ratio in browser.contrasts().items() if ratio < 4.5}
    assert not weak and len(browser.contrasts()) > 40
    assert not browser.complaints() and browser.requests() == [(tmp_path / "page.html").as_uri()]
    ((inside, outside),) = browser.scrolls("html")
    assert inside <= outside
