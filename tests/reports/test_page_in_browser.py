"""A report's page in a real browser: what a reader sees, in both themes."""

from __future__ import annotations

import pytest
from example_report import REPORT

from opd_lightning.reports.files import write_page

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_shows_its_report_alone_and_silently(browser, tmp_path, dark):
    write_page(tmp_path / "page.html", REPORT)
    driver = browser.open(tmp_path / "page.html", dark=dark)
    assert driver.find_element("css selector", "h1").text == REPORT.title
    assert driver.find_element("css selector", ".statement h2").text == "Distil"
    assert [cell.text for cell in driver.find_elements("css selector", "tbody tr > *")] == ["overlap", "0.75"]
    assert driver.find_element("css selector", "pre").text == REPORT.texts[0].text
    paper = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 24, 31)" if dark else "rgb(255, 255, 255)")
    assert not browser.complaints()
    assert browser.requests() == [(tmp_path / "page.html").as_uri()]
