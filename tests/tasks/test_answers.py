import string
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from opd_lightning.tasks.answers import MAX_ANSWER_CHARACTERS, find_answer, last_boxed, read_reference, same_answer

integers = st.integers(-(10**12), 10**12)


@st.composite
def written_numbers(draw, value):
    """One of the ways in which people and models write an integer."""
    sign = draw(st.sampled_from(["-", "−", "- "])) if value < 0 else draw(st.sampled_from(["", "+"]))
    digits = str(abs(value)) if draw(st.booleans()) else f"{abs(value):,}"
    if "," not in digits:
        digits = "0" * draw(st.integers(0, 3)) + digits
    elif draw(st.booleans()):
        digits = digits.replace(",", draw(st.sampled_from(["{,}", r"\,"])))
    tail = draw(st.sampled_from(["", ".", ".0", ".000"]))
    unit = draw(st.sampled_from(["", " dollars", r"\text{ apples}", " square feet", r"\,\mathrm{cm}^2", r"^\circ"]))
    wrap = draw(st.sampled_from(["%s", " %s ", "$%s$", r"\$%s", r"\(%s\)", r"\text{%s}", "**%s**", "{%s}"]))
    assume(not (unit and tail == ".") and not (wrap == r"\text{%s}" and "{" in digits + unit))
    assume(not (wrap == "{%s}" and "{" in digits + unit))
    return wrap % (sign + digits + tail + unit)


@settings(deadline=None)
@given(st.data(), integers)
def test_an_integer_is_itself_however_it_is_written(data, value):
    assert same_answer(str(value), data.draw(written_numbers(value))) is True


@settings(deadline=None)
@given(st.data(), integers, integers)
def test_different_integers_differ_however_they_are_written(data, value, other):
    assume(value != other)
    assert same_answer(str(value), data.draw(written_numbers(other))) is False


@settings(deadline=None)
@given(st.integers(-999, 999), st.integers(1, 999), st.integers(1, 9))
def test_fractions_are_compared_by_value(top, bottom, factor):
    sign, size = "-" if top < 0 else "", abs(top)
    value = Fraction(top, bottom)
    assert same_answer(f"{top}/{bottom}", rf"{sign}\frac{{{size * factor}}}{{{bottom * factor}}}") is True
    assert same_answer(f"{value.numerator}/{value.denominator}", f"{top} / {bottom}") is True
    assert same_answer(f"{top}/{bottom}", f"{top + bottom}/{bottom}") is False


@settings(deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 6))
def test_decimals_equal_the_fraction_they_stand_for(digits, places):
    assert same_answer(f"{digits}/{10**places}", f"{digits / 10**places:.{places}f}") is True


@settings(deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_any_text_gets_a_verdict_that_is_symmetric(left, right):
    if left and right:
        assert same_answer(left, right) == same_answer(right, left)


@pytest.mark.parametrize(
    ("reference", "answer", "verdict"),
    [
        ("70", "70%", True),
        ("70%", "0.7", True),
        (r"70\%", "70 percent", True),
        ("0.7", "70", False),
        ("5 cm^2", "5", True),
        (r"\frac34", ".75", True),
        ("1000", "1e3", True),
        ("(B)", "b", True),
        ("B", "C", False),
        (r"\text{Yes}", "yes", True),
        ("5", "x = 5", True),
        ("x=5", "y=5", None),
        (r"\left( 1, 2 \right)", "(1,2)", None),
        ("2", "2 million", None),
        ("5", "5 x", None),
        ("23", "2**3", None),
        ("1/3", "0.3333333", None),  # math-verify rounds to six decimals
        ("3", "1,23", None),
        ("1/0", "2/0", None),
        ("1.5", "1 1/2", True),
        ("-3.5", "-3 1/2 cups", True),
        ("1", "1 1/2", False),  # math-verify reads a mixed number as its whole part
        ("3/2", r"1\frac{1}{2}", True),
        ("300000000", r"3\times 10^8", True),
        ("0.03", "3 x 10^{-2}", True),
        ("6.63e-34", r"6.7 \times 10^{-34}", False),
        ("0.0000001", "0.0000002", False),  # to math-verify both are 0.000000
        ("3", "3 tenths", None),
        ("5", "5 millions", None),
        ("20", "20 sixth graders", True),
        ("5", r"\boldsymbol{5}", True),
        ("5 cm", r"\underline{5}\textrm{ cm}", True),
        ("Amy", "May", False),  # math-verify reads both as a*m*y
        (r"\text{Amy}, Bob", "May, Bob", False),
        ("Alice and Bob", "Bob and Alice", None),
        ("ab", "ba", None),
        ("0", "", False),
        ("0", "0" * (MAX_ANSWER_CHARACTERS + 1), False),
    ],
)
def test_comparison_without_algebra(reference, answer, verdict):
    assert same_answer(reference, answer) is verdict


def nested(depth):
    leaf = st.text(alphabet=string.ascii_letters + string.digits + " +-", min_size=1, max_size=5)
    if depth == 0:
        return leaf
    return st.lists(
        st.one_of(leaf, nested(depth - 1).map("{{{}}}".format), st.just(r"\{"), st.just(r"\}")), max_size=4
    ).map("".join)


@settings(deadline=None)
@given(nested(3), nested(2), nested(2))
def test_last_complete_box_is_found_whatever_it_holds(content, before, after):
    text = rf"{before} \boxed{{1}} and then \boxed{{{content}}} {after}"
    expected = content.strip() or "1"
    assert last_boxed(text) == expected
    assert last_boxed(text + r" \boxed{cut off") == expected


@pytest.mark.parametrize(
    ("response", "box", "marked", "last_number"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}", r"\frac{1}{2}", r"\frac{1}{2}"),
        (r"\boxed {7}", "7", "7", "7"),
        (r"\boxed{\boxed{3}}", "3", "3", "3"),
        ("1+1=2\n#### 1,234\n", None, "1,234", "1,234"),
        (r"#### 3" + "\n" + r"\boxed{4}", "4", "4", "4"),
        ("The answer is 5. No, the final answer is: 18 dollars. Done", None, "18 dollars", "18 dollars"),
        ("**Answer:** 3.5", None, "3.5", "3.5"),
        ("The answer is:\n\\[\nx+1\n\\]", None, "x+1", "x+1"),
        ("The answer is $$x+1$$", None, "$$x+1$$", "$$x+1$$"),
        ("An answer cannot be given before 12", None, None, "12"),
        ("10-3 gives -7, or $1,200.50", None, None, "$1,200.50"),
        ("she needs 1 1/2 cups", None, None, "1 1/2"),
        (r"\boxed{}", None, None, None),
        (r"\boxed{4} as asked, in \boxed{}", "4", "4", "4"),
        ("The answer is 4. The answer is", None, None, "4"),
        ("", None, None, None),
    ],
)
def test_where_a_response_states_its_answer(response, box, marked, last_number):
    assert find_answer(response, "box") == box
    assert find_answer(response, "marked") == marked
    assert find_answer(response, "last_number") == last_number


@pytest.mark.parametrize("unit", [r"\boxed{", "{", "}", "####", "answer ", "answer is ", "1,", "1.1/", " ", "\\text{"])
def test_long_repetitions_are_searched_quickly(unit):
    import time

    text = unit * 100_000
    started = time.perf_counter()
    find_answer(text, "last_number")
    same_answer("5", text[:MAX_ANSWER_CHARACTERS])
    assert time.perf_counter() - started < 2


def test_reference_answers():
    assert read_reference("2+2 = <<2+2=4>>4\n#### 1,004") == "1,004"
    assert read_reference(r"We get \boxed{1}, hence \boxed{\frac{a}{b}}.") == r"\frac{a}{b}"
    assert read_reference(" x^2 ") == "x^2"
