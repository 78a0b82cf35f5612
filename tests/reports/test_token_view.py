"""The fragment of the token view: whole, alone, safe to include, bounded."""

import json
import re

import pytest
from recorded_tokens import HEADER, HOSTILE, row, write_records

from opd_lightning.reports.token_payload import shown_steps
from opd_lightning.reports.token_records import write_record
from opd_lightning.reports.token_view import render_token_page, token_fragment, token_view


def payload(fragment):
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', fragment, flags=re.DOTALL)[1])


def test_the_fragment_holds_words_numbers_and_data(tmp_path):
    fragment = token_view([write_records(tmp_path)])
    assert fragment.count("<section") == fragment.count("</section>") == 1 and "http" not in fragment
    assert "It fades on the same answers" in fragment and "Where do they disagree?" in fragment
    found = payload(fragment)
    assert [point["label"] for point in found["points"]] == ["step 0", "step 10"] and found["start"] == [0, 1]
    look = found["looks"][0]
    assert look["values"]["reverse_kl"][2] == 3.0 and look["values"]["advantage"] is None
    assert look["values"]["entropy_gap"] == [0.0] * 8
    assert {each["name"] for each in found["quantities"] if not each["known"]} == {"token_weight", "advantage"}
    word = found["vocabulary"][found["answers"][0]["tokens"][2]]
    assert word == {"id": 12, "text": " sum", "special": False}


def test_its_style_touches_nothing_else(tmp_path):
    style = re.search(r"<style>(.*?)</style>", token_view([write_records(tmp_path)]), flags=re.DOTALL)[1]
    rules = re.findall(r"([^{}@]+){", re.sub(r"@media[^{]*{", "", style))
    assert len(rules) > 40
    assert all(part.strip().startswith(".token-view") for rule in rules for part in rule.split(","))


def test_answers_cannot_leave_their_place(tmp_path):
    page = render_token_page([write_records(tmp_path, texts=HOSTILE)])
    assert page.count("</script>") == 2 and "<img" not in page and "\x1b" not in page and "\u202e" not in page
    texts = [word["text"] for word in payload(page)["vocabulary"]]
    assert "</script>" in texts and "\\x1b[2J" in texts


@pytest.mark.parametrize("kinds", [("own", "fixed"), ("fixed", "own")])
def test_a_step_that_is_own_and_fixed_is_one_look_with_what_was_trained(tmp_path, kinds):
    trained = {"own": {"token_weight": [0.5], "advantage": [-0.25]}, "fixed": {}}
    rows = [row(0, 0, ["a"], kind=kind, prompt_ids=[1], **trained[kind]) for kind in kinds]
    write_record(tmp_path, 0, rows, HEADER)
    (look,) = payload(token_view([tmp_path], max_tokens=2))["looks"]
    assert look["kinds"] == ["fixed", "own"]
    assert look["values"]["token_weight"] == [0.5] and look["values"]["advantage"] == [-0.25]


def test_what_is_shown_is_bounded_and_said(tmp_path):
    folder = write_records(tmp_path, steps=range(0, 100, 10))
    assert shown_steps(folder, 10**6) == (list(range(0, 100, 10)), 10**6, "")
    steps, most, note = shown_steps(folder, 200)  # 35 tokens a step
    assert (steps, most) == ([0, 40, 80, 90], 200) and note.startswith("4 of 10 recorded steps")
    assert shown_steps(folder, 20)[:2] == ([0, 90], 10)
    fragment = token_view([folder], max_tokens=20)
    assert [look["kinds"] for look in payload(fragment)["looks"]] == [["fixed"], ["fixed"]]
    assert "8 recorded answers are left out here" in fragment
    assert note in token_view([folder], max_tokens=200)


def test_one_or_two_runs(tmp_path):
    one = write_records(tmp_path / "a" / "tokens")
    found = payload(token_view([tmp_path / "a", one]))
    assert [point["label"] for point in found["points"]] == ["a step 0", "a step 10"] * 2 and found["start"] == [1, 3]
    with pytest.raises(ValueError, match="records: expected one or two runs, got 3"):
        token_view([one] * 3)
    with pytest.raises(ValueError, match="holds no records of tokens"):
        token_view([tmp_path])


def test_a_page_about_runs_gets_what_was_recorded(tmp_path):
    for name in "abc":
        write_records(tmp_path / name / "tokens", steps=(0,))
    (tmp_path / "none").mkdir()
    assert token_fragment([tmp_path / "none"]) is None
    heading, fragment = token_fragment([tmp_path / name for name in ("none", "a", "b", "c")])
    assert heading == "Tokens" and fragment == token_view([tmp_path / "a", tmp_path / "b"])
    labelled = token_fragment([tmp_path / "none", tmp_path / "b", tmp_path / "c"], labels=["x", "y", "z"])[1]
    assert [point["label"] for point in payload(labelled)["points"]] == ["y step 0", "z step 0"]


def test_ids_differ_between_two_drawings(tmp_path):
    one, two = (write_records(tmp_path / name) for name in "ab")
    ids = re.findall(r'\bid="([^"]*)"', token_view([one, two]))
    assert len(ids) == len(set(ids)) > 2
