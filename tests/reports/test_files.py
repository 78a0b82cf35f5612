"""One page that needs nothing beside itself, and JSON that everyone can read."""

import importlib.util
import json
from html.parser import HTMLParser

import pytest
from example_report import REPORT

from opd_lightning.reports.contents import number, share
from opd_lightning.reports.files import render_page, write_json, write_page

VOID = {"meta", "br", "use", "path"}


class Page(HTMLParser):
    """Opens and closes every element, and keeps ids, texts and what would be fetched."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.texts, self.fetched, self.tags = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "action", "data") and not value.startswith("#"):
                self.fetched.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_whole_and_fetches_nothing():
    text = render_page(REPORT)
    page = Page(text)
    assert page.fetched == [] and "http" not in text and "@import" not in text and "url(http" not in text
    assert "script" not in page.tags and len(page.ids) == len(set(page.ids))
    shown = " ".join(page.texts)
    assert "A <title> & more" in shown and "<|user|>1 < 2\n<script>alert(1)</script>" in shown
    assert "0.2 > 0.05" in shown and "Left out: nothing." in shown and "overlap" in shown


def test_it_has_a_light_and_a_dark_face_and_drawings_wear_both():
    text = render_page(REPORT)
    assert "prefers-color-scheme: dark" in text and 'content="light dark"' in text
    drawing = text[text.index("<svg") : text.index("</svg>")]
    assert "currentColor" in drawing and "#010203" not in drawing and "#000000" not in drawing
    assert 'aria-label="Gain, In nats"' in drawing
    assert render_page(REPORT) == text  # nothing of the clock


def test_without_matplotlib_the_tables_are_enough(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    page = Page(render_page(REPORT))
    assert "svg" not in page.tags and "table" in page.tags


def test_files_are_replaced_as_a_whole(tmp_path):
    write_page(tmp_path / "new" / "page.html", REPORT)
    write_json(tmp_path / "new" / "numbers.json", {"gain": 0.25, "unknown": None, "name": "π"})
    assert json.loads((tmp_path / "new" / "numbers.json").read_text(encoding="utf-8"))["name"] == "π"
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "new" / "numbers.json", {"gain": float("nan")})
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["numbers.json", "page.html"]


def test_numbers_for_people():
    assert [number(None), number(3), number(0.12345), share(0.5), share(None)] == ["-", "3", "0.123", "50.0%", "-"]
