"""A real browser on pages written to disk: Debian's chromium, driven by selenium, without a window or a network."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,900",
    "--hide-scrollbars",
)


class Browser:
    """One chromium for a test session; `open` starts a page anew."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path, *, dark: bool = False) -> Any:
        """Show a file, with the light or the dark theme, and give selenium's driver."""
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [theme]})
        self.complaints(), self.requests()  # of the page before
        self.driver.get(page.resolve().as_uri())
        return self.driver

    def complaints(self) -> list[str]:
        """What the console said since the last call: errors, warnings, requests that failed."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses that were asked for since the last call: a page that needs nothing asks for itself alone."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = (message for message in messages if message["method"] == "Network.requestWillBeSent")
        return [message["params"]["request"]["url"] for message in sent]

    def texts(self, selector: str) -> list[str]:
        """What stands in the elements that a selector finds, seen or scrolled away."""
        found = self.driver.find_elements("css selector", selector)
        return [" ".join(str(element.get_property("textContent")).split()) for element in found]

    def contrasts(self) -> dict[str, float]:
        """Contrast ratio (WCAG 2) of every text with what is behind it, the least for each text."""
        found: dict[str, float] = {}
        for text, colour, paper in self.driver.execute_script(_COLOURS):
            light, dark = sorted((_luminance(colour), _luminance(paper)), reverse=True)
            found[text] = min((light + 0.05) / (dark + 0.05), found.get(text, 21.0))
        return found

    def scrolls(self, selector: str) -> list[tuple[int, int]]:
        """Width of the contents and of the window onto them, for each element that a selector finds."""
        script = "return [...document.querySelectorAll(arguments[0])].map(e => [e.scrollWidth, e.clientWidth])"
        return [(inside, outside) for inside, outside in self.driver.execute_script(script, selector)]

    def screenshot(self, path: Path) -> None:
        """The window as PNG."""
        path.write_bytes(self.driver.get_screenshot_as_png())


_COLOURS = """
const paper = element => {
  for (let each = element; each; each = each.parentElement) {
    const colour = getComputedStyle(each).backgroundColor;
    if (!colour.endsWith(", 0)")) return colour;
  }
  return "rgb(255, 255, 255)";
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const found = [];
while (walker.nextNode()) {
  const text = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
  if (!text || element.closest("style, script, title")) continue;
  const style = getComputedStyle(element);
  found.push([text, element.closest("svg") ? style.fill : style.color, paper(element)]);
}
return found;
"""


def _luminance(colour: str) -> float:
    """Relative luminance of ``rgb(...)``."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium, or a skip that says what is missing."""
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("needs chromium and chromedriver on the PATH (Debian: apt install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=chromedriver))
    yield Browser(driver)
    driver.quit()
