"""The page of a run, and of two, in a real browser: what a reader sees and does."""

from __future__ import annotations

import json
import re

import pytest
from recorded_tokens import write_records

from opd_lightning.reports.contents import Curve, Panel, Section
from opd_lightning.reports.files import write_text
from opd_lightning.reports.token_view import token_fragment
from opd_lightning.reports.training_runs.folder import read_runs
from opd_lightning.reports.training_runs.page import render_page, write_report
from opd_lightning.reports.training_runs.report import RunReport

pytest.importorskip("selenium")
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

pytestmark = pytest.mark.slow

CONTRAST = """
const lowest = new Map();
const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
const linear = (share) => (share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4);
const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => sum + weight * linear(c[i] / 255), 0.05);
const behind = (node) => {
  for (let at = node; at; at = at.parentElement) {
    const c = parse(getComputedStyle(at).backgroundColor);
    if (c[3] === 1) return c;
  }
  return [255, 255, 255, 1];
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode.parentElement, name = node.tagName.toLowerCase();
  if (!walker.currentNode.textContent.trim() || ["script", "style"].includes(name)) continue;
  const style = getComputedStyle(node);
  const both = [light(parse(node.ownerSVGElement ? style.fill : style.color)), light(behind(node))];
  const ratio = Math.max(...both) / Math.min(...both);
  if (!(lowest.get(name) <= ratio)) lowest.set(name, ratio);
}
return [...lowest];
"""  # of each kind of element, the lowest contrast of its text (WCAG 2.2)


@pytest.fixture(scope="module")
def pages(recorded, tmp_path_factory):
    """A page of one run, and one of two."""
    folder, runs = tmp_path_factory.mktemp("pages"), read_runs(recorded)
    tokens = write_records(folder / "tokens")
    write_report(folder / "one", runs[:1], fragments=[token_fragment([tokens], labels=["fast"])])
    write_report(folder / "two", runs)
    return folder / "one" / "report.html", folder / "two" / "report.html", runs


def panel_of(driver, title):
    panels = driver.find_elements(By.CSS_SELECTOR, ".panel")
    return next(each for each in panels if each.find_element(By.TAG_NAME, "figcaption").text == title)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_of_a_run_shows_it_and_is_silent(browser, pages, dark):
    page, _, (run, _) = pages
    driver = browser.open(page, dark=dark)
    heads = [each.text for each in driver.find_elements(By.CSS_SELECTOR, "main > section[id] > h2")]
    assert heads.pop() == "Tokens"
    parts = [
        "Curves",
        "At a glance",
        "Held-out problems",
        "Searches along the ray",
        "Time and memory",
        "Rollouts",
        "Settings",
    ]
    assert heads[-7:] == parts
    row = driver.find_element(By.XPATH, "//th[text()='Reverse KL']/..")
    kl = list(run.series["train/reverse_kl"].values())
    assert [float(each.text) for each in row.find_elements(By.TAG_NAME, "td")] == [
        pytest.approx(value, rel=5e-3)
        for value in (kl[0], kl[-1], min(kl), max(kl))  # means of half of 3 steps
    ]
    assert panel_of(driver, "step 2: kept +2 Delta").find_elements(By.TAG_NAME, "svg")
    contrasts = dict(driver.execute_script(CONTRAST))
    assert {"td", "text", "button"} <= contrasts.keys() and min(contrasts.values()) >= 4.5, contrasts
    assert not browser.complaints() and browser.requests() == [page.as_uri()]


def test_values_under_pointer_and_keys(browser, pages):
    page, _, (run, _) = pages
    driver = browser.open(page)
    panel = panel_of(driver, "Reverse KL")
    output, series = panel.find_element(By.TAG_NAME, "output"), run.series["train/reverse_kl"]
    driver.execute_script("arguments[0].focus()", panel)
    for key, step in ((Keys.HOME, 0), (Keys.ARROW_RIGHT, 1), (Keys.END, 2), (Keys.ARROW_LEFT, 1)):
        panel.send_keys(key)
        assert output.text == f"{step}: rollouts {float(f'{series[step]:.4g}'):g}"
    drawing = panel.find_element(By.CSS_SELECTOR, ".drawing")
    box = json.loads(panel.get_attribute("data-points"))["box"]
    right = int(drawing.size["width"] * (box[1] - 0.5)) - 5
    ActionChains(driver).move_to_element_with_offset(drawing, right, 0).perform()
    assert output.text.startswith("2: rollouts ")
    ActionChains(driver).move_to_element(driver.find_element(By.TAG_NAME, "h1")).perform()
    assert output.text == "" and not browser.complaints()


def test_late_steps_are_shown_whole(browser, tmp_path):
    panel = Panel("Late", "step", "", [Curve("value", [12345, 12346], [0.123456, 2])])
    report = RunReport("A run", "", [], [], [], [Section("Curves", panels=[panel])])
    write_text(tmp_path / "late.html", render_page(report))
    panel = panel_of(browser.open(tmp_path / "late.html"), "Late")
    panel.send_keys(Keys.HOME)
    assert panel.find_element(By.TAG_NAME, "output").text == "12345: value 0.1235"


def test_runs_can_be_hidden_and_tables_sorted(browser, pages):
    _, page, (_, slow) = pages
    driver = browser.open(page)
    boxes = driver.find_elements(By.CSS_SELECTOR, "input[data-run]")
    assert [each.find_element(By.XPATH, "..").text for each in boxes] == ["fast", "slow"]
    panel = panel_of(driver, "Reverse KL")
    prefix = json.loads(panel.get_attribute("data-points"))["prefix"]
    lines = [driver.find_element(By.ID, f"{prefix}-curve-{i}-0") for i in (0, 1)]
    boxes[0].send_keys(Keys.SPACE)
    assert [each.value_of_css_property("visibility") for each in lines] == ["hidden", "visible"]
    driver.execute_script("arguments[0].focus()", panel)
    panel.send_keys(Keys.HOME)
    output = panel.find_element(By.TAG_NAME, "output")
    assert output.text == f"0: slow {slow.series['train/reverse_kl'][0]:.4g}"
    boxes[0].send_keys(Keys.SPACE)
    assert [each.value_of_css_property("visibility") for each in lines] == ["visible", "visible"]

    table = driver.find_element(By.XPATH, "//h3[text()='Time by part']/following::table[1]")
    button = table.find_element(By.XPATH, ".//button[text()='seconds per step']")

    def column():
        return [float(cell.text) for cell in table.find_elements(By.CSS_SELECTOR, "tbody td:nth-child(3)")]

    button.send_keys(Keys.ENTER)
    assert column() == sorted(column()) and len(column()) == 14
    button.send_keys(Keys.ENTER)
    assert column() == sorted(column(), reverse=True)
    assert button.find_element(By.XPATH, "..").get_attribute("aria-sort") == "descending"
    differs = driver.find_element(By.XPATH, "//th[text()='model.optimizer.lr']/..")
    assert differs.text.split() == ["model.optimizer.lr", "0.01", "0.0001"]
    assert not browser.complaints()


def test_it_prints_in_black_on_white_without_controls(browser, pages):
    _, page, _ = pages
    driver = browser.open(page, dark=True)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    paper = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(255, 255, 255)" and not driver.find_element(By.TAG_NAME, "nav").is_displayed()
    contrasts = dict(driver.execute_script(CONTRAST))
    assert {"td", "text", "button"} <= contrasts.keys() and min(contrasts.values()) >= 4.5, contrasts
    printed = driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    assert len(printed["data"]) > 10_000 and re.match("JVBER", printed["data"])
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
