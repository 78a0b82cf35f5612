"""The token view in a real browser: content by value, hover, keyboard, filters, both themes, ten thousand tokens."""

from __future__ import annotations

import pytest
from recorded_tokens import HEADER, HOSTILE, divergence, row, write_records
from selenium.webdriver import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from opd_lightning.reports.token_records import write_record
from opd_lightning.reports.token_view import render_token_page

pytestmark = pytest.mark.slow


class View:
    """The page, by the names of its parts."""

    def __init__(self, driver):
        self.driver = driver

    def settle(self):
        """Go to the answers, which are drawn when they come near."""
        self.driver.execute_async_script(
            "const done = arguments[0]; document.querySelector(\"[data-tv='answers']\").scrollIntoView();"
            "let frames = 5; const wait = () => (frames-- ? requestAnimationFrame(wait) : done()); wait()"
        )

    def part(self, name):
        return self.driver.find_element("css selector", f"[data-tv='{name}']")

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def texts(self, selector):
        return self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map(each => each.textContent)", selector
        )

    def choose(self, name, value):
        Select(self.part(name)).select_by_value(value)
        self.settle()

    def type(self, name, value):
        self.part(name).clear()
        self.part(name).send_keys(value, Keys.TAB)
        self.settle()

    @property
    def detail(self):
        return self.part("detail").text


def show(browser, folder, page_folder, dark=False, **options):
    page = page_folder / "tokens.html"
    page.write_text(render_token_page([folder] if not isinstance(folder, list) else folder, **options))
    view = View(browser.open(page, dark=dark))
    view.settle()
    return view, page


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("records"))


def test_two_steps_stand_side_by_side_on_the_same_answers(browser, records, tmp_path):
    view, page = show(browser, records, tmp_path)
    assert view.texts("article h3") == [f"problem/{i}" for i in range(4)]  # the largest mean first
    about = view.texts(".about")
    first, last = (sum(divergence(p, 0, step) for p in range(8)) / 8 for step in (0, 10))
    assert about[0] == f"step 0 · reward 1 · 8 tokens · reverse KL {first:.3g} a token"
    assert about[1] == f"step 10 · reward 1 · 8 tokens · reverse KL {float(f'{last:.3g}')} a token"
    assert "reward 0 · 8 tokens, cut" in about[2] and "no mark" in about[4]
    answers = view.texts("article:first-of-type .answer")
    assert answers == ["so the sum↵is 42<|im_end|>+0"] * 2
    classes = [each.get_attribute("class") for each in view.all("article:first-of-type .look:first-child .tok")]
    assert classes == ["tok q1"] * 2 + ["tok q6"] + ["tok q1"] * 3 + ["tok q1 special"] + ["tok q1"]
    assert view.texts("[data-tv='legend'] .tok")[0] == "< 0.01" and not browser.complaints()
    assert browser.requests() == [page.as_uri()]


def test_pointing_at_a_token_shows_what_both_expected(browser, records, tmp_path):
    view, _ = show(browser, records, tmp_path)
    ActionChains(view.driver).move_to_element(view.all(".answer .tok")[2]).perform()
    assert "id 12 · position 2 · at step 0" in view.detail
    rows = view.texts("[data-tv='detail'] table:first-of-type tr")
    assert rows[:2] == ["sum60.7 %both", "seven30.1 %both"] or rows[:2] == [" sum60.7 %both", "seven30.1 %both"]
    assert "reverse KL 3 0.273" in view.detail and "weight unknown unknown" in view.detail


def test_bars_of_both_lists_are_as_wide(browser, tmp_path):
    top = {"teacher_top_texts": [["a", "a rather long token"]] * 2, "teacher_top_ids": [[10, 99]] * 2}
    write_record(tmp_path, 0, [row(0, 0, ["a", "b"], **top)], HEADER)
    view, _ = show(browser, tmp_path, tmp_path)
    ActionChains(view.driver).move_to_element(view.all(".answer .tok")[0]).perform()
    meters = view.all("[data-tv='detail'] .meter")
    assert len(meters) == 4 and len({(each.rect["x"], each.rect["width"]) for each in meters}) == 1


def test_the_keyboard_goes_to_the_worst_and_from_token_to_token(browser, records, tmp_path):
    view, _ = show(browser, records, tmp_path)
    body = view.driver.find_element("tag name", "body")  # the view itself has no focus yet
    body.send_keys("n")
    active = view.driver.switch_to.active_element
    assert active.text.strip() == "sum" and "position 2" in view.detail
    assert view.all("li button")[0].get_attribute("aria-current") == "true"
    active.send_keys("n")
    assert "2.5" in view.detail
    view.driver.switch_to.active_element.send_keys("p", Keys.ARROW_RIGHT)
    view.driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert "position 3" in view.detail or "position 4" in view.detail
    view.driver.switch_to.active_element.send_keys(Keys.END)
    assert "position 7" in view.detail
    view.part("previous").click()
    assert [float(text.split()[1]) for text in view.texts("li button")[:4]] == [3.0, 2.5, 2.0, 1.5]


def test_filters_order_and_quantities(browser, records, tmp_path):
    view, _ = show(browser, records, tmp_path)
    view.choose("reward", "right")
    assert view.texts("article h3") == ["problem/0", "problem/3"]
    view.choose("reward", "unmarked")
    assert view.texts("article h3") == ["problem/2"]
    view.choose("reward", "")
    view.choose("source", "words")
    assert view.texts("article h3") == ["problem/1", "problem/3"]
    view.choose("source", "")
    view.choose("second", "")
    assert view.part("count").text == "5 answers, 35 tokens"
    view.type("longest", "3")
    assert view.texts("article h3") == ["problem/4"]
    view.type("longest", "")
    view.choose("kind", "own")
    assert view.texts(".answer") == ["own words 0"]
    view.choose("kind", "")
    view.choose("first", "")
    assert len(view.texts("article")) == 10 and len(view.texts("li")) == 50
    view.choose("order", "length")
    assert view.texts("article h3")[-1] == "problem/4"
    view.type("from", "1")
    view.type("to", "1")
    assert {text.split(", ")[1] for text in view.texts("li button")} == {"token 1"}
    view.choose("quantity", "sampled_log_ratio")
    classes = [each.get_attribute("class") for each in view.all("article:first-of-type .tok")]
    assert classes[:3] == ["tok q0 outside", "tok n3", "tok q0 outside"]
    view.choose("quantity", "advantage")
    assert "Unknown in these records" in view.part("legend").text and not browser.complaints()
    view.choose("reward", "wrong")
    view.type("shortest", "99")
    assert "the filters leave none" in view.part("count").text


def test_prompts_as_rendered_for_both(browser, records, tmp_path):
    view, _ = show(browser, records, tmp_path)
    first, second = view.texts("article details")[:2]
    assert "<|user|>question 0 </script><|assistant|>" in first and "[INST] question 0 [/INST]" in first
    assert "The teacher's own template is not known here." in second and "Reference: 42" in second


def test_what_models_wrote_is_text_and_nothing_else(browser, tmp_path):
    view, page = show(browser, write_records(tmp_path, texts=HOSTILE), tmp_path)
    shown = view.texts("article:first-of-type .look:first-child .tok")
    assert shown[:2] == HOSTILE[:2] and shown[2:4] == ["\\x1b[2J", "\\u202e"]
    assert shown[4:9] == ["↵", "␣", "⇥", "(nothing)", "<|im_end|>"] and shown[9:11] == ["&amp;", "end.↵"]
    assert not view.all("img") and not browser.complaints() and browser.requests() == [page.as_uri()]


def test_two_runs_meet_on_the_same_answers_and_lists_leave_the_rest_unknown(browser, records, tmp_path):
    header = {"teacher": "VLLMServerTeacher", "gives_vocabulary": False, "objective": "x", "facts_k": 16}
    other = write_records(tmp_path / "other", lists_only=True, header=header)
    view, _ = show(browser, [records, other], tmp_path, labels=["plain", "served"])
    assert view.texts("article .about")[0].startswith("plain step 10") and len(view.all("article")) == 5
    assert "served: VLLMServerTeacher does not tell its whole distribution" in view.driver.page_source
    assert view.texts("article .about")[1].endswith("reverse KL unknown a token")
    view.choose("quantity", "sampled_log_ratio")
    assert "unknown" not in "".join(view.texts("article .about")) and not browser.complaints()


CONTRAST = """
const view = document.querySelector('.token-view'), found = {};
const channels = (text) => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
  .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const paper = (each) => {
  const colour = channels(getComputedStyle(each).backgroundColor);
  return colour.length === 4 && colour[3] === 0 ? paper(each.parentElement) : colour;
};
for (const name of ['q0','q1','q2','q3','q4','q5','q6','n1','n2','n3','n4','p1','p2','p3','p4','others','outside']) {
  const token = document.createElement('span');
  token.className = `tok ${name}`;
  document.querySelector('.answer').append(token);
}
for (const each of view.querySelectorAll('*')) {
  if (['SCRIPT', 'STYLE', 'NOSCRIPT', 'OPTION', 'I'].includes(each.tagName) || each.closest('svg')) continue;
  const [a, b] = [light(channels(getComputedStyle(each).color)), light(paper(each))].sort((x, y) => x - y);
  const name = each.tagName + '.' + each.className;
  found[name] = Math.min(found[name] ?? 99, (b + 0.05) / (a + 0.05));
}
return found;
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_everything_can_be_read_in_both_themes(browser, records, tmp_path, dark):
    view, _ = show(browser, records, tmp_path, dark=dark)
    ActionChains(view.driver).move_to_element(view.all(".answer .tok")[2]).perform()
    contrasts = view.driver.execute_script(CONTRAST)
    assert len(contrasts) > 30
    assert {name: round(ratio, 2) for name, ratio in contrasts.items() if ratio < 4.5} == {}


WORK = {
    "draw": "document.querySelectorAll('article').forEach(each => each.scrollIntoView())",
    "recolour": "quantity.value = 'forward_kl'; quantity.dispatchEvent(new Event('change'))",
    "point": "document.querySelector('.answer .tok').dispatchEvent(new Event('mouseover', {bubbles: true}))",
}
TIMED = """
const work = new Function('quantity', arguments[0]), done = arguments[1], start = performance.now();
work(document.querySelector("[data-tv='quantity']"));
let frames = 3;
const wait = () => {
  document.body.offsetHeight;
  if (frames--) requestAnimationFrame(wait);
  else done(performance.now() - start);
};
wait();
"""


def test_ten_thousand_tokens_stay_fluid(browser, tmp_path):
    texts = [f"word{i % 97} " for i in range(500)]
    view, page = show(browser, write_records(tmp_path, texts=texts, num_answers=10, steps=(0, 1)), tmp_path)
    assert page.stat().st_size < 6e6
    assert view.part("count").text == "10 answers, 5010 tokens"  # and the same ones beside them
    assert len(view.all(".answer .tok")) < 6000  # what is far below waits
    view.choose("order", "recorded")
    milliseconds = {name: view.driver.execute_async_script(TIMED, script) for name, script in WORK.items()}
    print(milliseconds)
    view.part("next").click()
    assert "word2" in view.driver.switch_to.active_element.text
    # a busy machine takes a multiple of the 100 ms or so of an idle one
    assert max(milliseconds.values()) < 3000, milliseconds
