r"""Final answers as text: where a response states one, and when two are the same without any algebra.

Everything here is plain Python, takes time linear in the text, and never evaluates what a model wrote.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Literal

AnswerForm = Literal["box", "marked", "last_number"]

# Longer answers are wrong unread; the answer stands at the end, so only the end of a response is searched.
MAX_ANSWER_CHARACTERS = 500
_SEARCHED_CHARACTERS = 50_000

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[\s\S]|[{}]")
_HASHES = re.compile(r"####\s*([^\n]+)")
# what opens a displayed formula may have a line of its own
_PHRASE = re.compile(r"\banswer\b[\s*]*(?:is\b|:|=)[\s*:]*(?:(?:\$\$|\\\[)[ \t]*\n\s*)?", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.(?:\s|$)")

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3})?"
_LAST_NUMBER = re.compile(rf"(?:(?<![\w)\]}}])-)?\$?(?:\d+ (?=\d+/\d))?{_DECIMAL}(?:/{_DECIMAL})?%?")
# two letters at least: "5 x" may be a product, "5 dollars" is not
_UNIT = r"(?:\s+(?P<unit>[A-Za-z]{2,}(?:[\s/-]+[A-Za-z]{2,})*)(?:\s*\^\s*\{?\d\}?)?)?"
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)\s*[€£¥]?\s*"
    rf"(?:(?:(?P<whole>\d+)\s+(?=\d+\s*/))?(?P<top>{_DECIMAL})(?:\s*/\s*(?P<bottom>{_DECIMAL})"
    r"|\s*(?:\\times|\\cdot|[*x])\s*10\s*\^\s*(?:\{\s*(?P<power>[+-]?\d{1,3})\s*\}|(?P<plain_power>[+-]?\d{1,3})))?"
    r"|(?P<tex_whole>\d+)?\s*"
    r"\\[dt]?frac\s*(?:\{(?P<tex_top>-?\d+)\}\s*\{(?P<tex_bottom>\d+)\}|(?P<digit_top>\d)(?P<digit_bottom>\d)))"
    rf"\s*(?P<percent>%?){_UNIT}"
)
# words after a number that change it, so that it has to be worked out
_NOT_A_UNIT = re.compile(
    r"\b(?:hundred|thousand|[mbt]r?illion|dozen|lakh|crore)s?\b|\b(?:hal(?:f|ves)|thirds?|quarters?|pi|sqrt|sin|cos|tan"
    r"|log|ln|exp|infinity|squared|cubed|or|and|mod|base|over|plus|minus|choose|factorial|to)\b"
    r"|\b(?:four|fif|six|seven|eigh|nin|ten|twelf|hundred|thousand|[mbt]r?illion)th(?:s\b|$)",  # not: sixth graders
    re.IGNORECASE,
)
_WORDS = re.compile(r"[A-Za-z][A-Za-z .,;'-]+")
_WORD = re.compile(r"[A-Za-z]+")
_NO_PRODUCT = re.compile(r"[A-Za-z]{4}|\b[A-Z][a-z]{2}")  # fewer letters may be symbols: xyz is zyx
_LETTER = re.compile(r"\(?([A-Za-z])\)?")

_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (
            r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|[mh]box|boldsymbol|bm|underline|emph)\s*\{([^{}]*)\}",
            r" \1 ",
        ),
        (r"\\(?:left|right|displaystyle)(?![A-Za-z])", ""),
        (r"(?<!\\)\\[,;:! ]", ""),
        (r"\{,\}", ","),
        (r"\\[()\[\]]|\\?\$|`", ""),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree(?![A-Za-z])|°", ""),
        (r"\\%|\bpercent\b", "%"),
        ("\N{MINUS SIGN}", "-"),
        ("\N{MULTIPLICATION SIGN}", r"\\times "),
        (r"[\s~]+", " "),
    )
]
_ASSIGNMENT = re.compile(r"^[A-Za-z]\s*=\s*(?=[-+.\d\\])")

# math-verify rounds to six decimals, so it could not call numbers equal that lie further apart than this.
_SURELY_DIFFERENT = Fraction(1, 100_000)


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last complete ``\boxed{...}`` (or ``\fbox``), or None.

    Braces may nest, escaped braces do not count, and a box that is empty or was cut off is not an answer.
    """
    found: tuple[int, int] | None = None
    boxes: list[int | None] = []  # where the content of each open brace begins; None for a brace that opens no box
    for token in _BRACES.finditer(text):
        if token[0] == "{":
            boxes.append(None)
        elif token[0] == "}" and boxes:
            begin = boxes.pop()
            is_later = begin is not None and (found is None or begin > found[0])
            if begin is not None and is_later and text[begin : token.start()].strip():
                found = begin, token.start()
        elif token[0].endswith("{") and len(token[0]) > 2:
            boxes.append(token.end())
    return None if found is None else text[slice(*found)].strip()


def find_answer(response: str, accept: AnswerForm = "marked") -> str | None:
    r"""Return what a response states as its final answer, or None.

    The last complete box wins; with `accept` "marked" a line after ``####`` comes next, then what follows
    "answer is" or "answer:"; with "last_number" the last number of the text after those. Only the last 50,000
    characters are searched.

    Args:
        response: The text to search.
        accept: Least explicit form of an answer that counts.
    """
    text = response[-_SEARCHED_CHARACTERS:]
    answer = last_boxed(text) or ""
    if not answer and accept != "box":
        if hashes := _HASHES.findall(text):
            answer = hashes[-1]
        elif phrases := list(_PHRASE.finditer(text)):
            answer = _SENTENCE_END.split(text[phrases[-1].end() :].partition("\n")[0])[0]
    if not answer.strip() and accept == "last_number" and (numbers := _LAST_NUMBER.findall(text)):
        answer = numbers[-1].rstrip(".")
    return answer.strip() or None


def read_reference(text: str) -> str:
    r"""Return the final answer of a reference: after the last ``####`` (GSM8K), in the last box, or all of it."""
    if hashes := _HASHES.findall(text):
        return str(hashes[-1]).strip()
    boxed = last_boxed(text)
    return text.strip() if boxed is None else boxed


def same_answer(reference: str, answer: str) -> bool | None:
    """Compare two final answers without algebra; None means that algebra has to decide.

    True when they read the same after typesetting is taken off, are the same number (leading zeros, thousands
    separators, currency, percent with or against the fraction it stands for, a/b, 1 1/2, 3 x 10^8, units in words) or
    the same words. False when both are numbers that differ, different letters, or other words of the same letters.
    """
    if not answer or len(answer) > MAX_ANSWER_CHARACTERS:
        return False
    reference, answer = _plain(reference), _plain(answer)
    if bool(_ASSIGNMENT.match(reference)) != bool(_ASSIGNMENT.match(answer)):
        reference, answer = _ASSIGNMENT.sub("", reference, count=1), _ASSIGNMENT.sub("", answer, count=1)
    if reference == answer:
        return bool(answer)
    numbers = _number(reference), _number(answer)
    if numbers[0] is not None and numbers[1] is not None:
        return _same_number(numbers[0], numbers[1])
    letters = _LETTER.fullmatch(reference), _LETTER.fullmatch(answer)
    if letters[0] and letters[1]:
        return letters[0][1].casefold() == letters[1][1].casefold()
    if not (_WORDS.fullmatch(reference) and _WORDS.fullmatch(answer)):
        return None
    return True if reference.casefold() == answer.casefold() else False if _are_anagrams(reference, answer) else None


def _plain(text: str) -> str:
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip(" *").rstrip(".").strip(" *")
    if text.startswith("{") and text.endswith("}") and "{" not in text[1:]:
        text = text[1:-1].strip()
    return text


def _number(text: str) -> tuple[Fraction, bool] | None:
    """Value and whether a percent sign follows it; None for anything but one plain number."""
    match = _NUMBER.fullmatch(text)
    if match is None or _NOT_A_UNIT.search(match["unit"] or ""):
        return None
    whole = match["whole"] or match["tex_whole"] or "0"
    top = Fraction((match["top"] or match["tex_top"] or match["digit_top"]).replace(",", ""))
    bottom = Fraction((match["bottom"] or match["tex_bottom"] or match["digit_bottom"] or "1").replace(",", ""))
    if bottom == 0 or (whole != "0" and top < 0):
        return None
    size = (Fraction(whole) + top / bottom) * Fraction(10) ** int(match["power"] or match["plain_power"] or "0")
    return -size if match["sign"] == "-" else size, bool(match["percent"])


def _same_number(reference: tuple[Fraction, bool], answer: tuple[Fraction, bool]) -> bool | None:
    (left, left_percent), (right, right_percent) = reference, answer
    distances = [abs(left - right)]
    if left_percent != right_percent:
        distances.append(abs(left / 100 - right) if left_percent else abs(left - right / 100))
    if min(distances) == 0:
        return True
    surely = min(_SURELY_DIFFERENT, max(abs(left), abs(right)) / 1000)  # to math-verify, 2e-7 and 1e-7 are the same
    return False if min(distances) >= surely else None


def _are_anagrams(one: str, other: str) -> bool:
    """Other words of the same letters. math-verify reads words as products of letters: May would be Amy."""
    words = [sorted(word.casefold() for word in _WORD.findall(text)) for text in (one, other)]
    letters = [sorted("".join(each)) for each in words]
    return words[0] != words[1] and letters[0] == letters[1] and bool(_NO_PRODUCT.search(f"{one} {other}"))
