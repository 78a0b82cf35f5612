import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def test_the_annotated_tree_shows_what_is_there():
    shown = set(re.findall(r"^[├└]── (\S+?)/?\s", CONTRIBUTING, flags=re.MULTILINE))
    package = ROOT / "src" / "opd_lightning"
    hidden = {"__init__.py", "__init__.pyi", "__main__.py", "__pycache__", "py.typed"}
    assert shown == {path.name for path in package.iterdir()} - hidden


def test_every_file_the_readme_names_exists():
    for name in re.findall(r"(?:configs|docs|benchmarks)/[\w./-]+\.\w+", README + CONTRIBUTING):
        assert (ROOT / name).exists(), name


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"\b[A-Z]{4,}_[A-Z]+\b", README.replace("OPD_LIGHTNING_TRACEBACK", ""))


def test_no_room_is_shown_twice():
    shown = re.findall(r"^[├└]── (\S+)", CONTRIBUTING, flags=re.MULTILINE)
    assert len(shown) == len(set(shown))


def test_the_front_door_is_short():
    lines = re.sub(r"\]\([^)]*\)", "]", README).splitlines()  # as they are read: without the addresses of links
    assert len(lines) < 120
    assert max(map(len, lines)) <= 160  # rows of tables
    assert max(len(line) for line in lines if not line.startswith("|")) <= 125
    assert len(re.findall(r"^!\[", README, flags=re.MULTILINE)) == 1  # one picture
    head = README[: README.index("![")]
    assert head.count("```bash") == 2  # two commands before it


def test_each_use_takes_five_lines():
    uses = README[README.index("## Three uses") : README.index("## Where to go next")]
    blocks = re.findall(r"```(?:bash|python)\n(.*?)```", uses, flags=re.DOTALL)
    assert len(blocks) == 3
    assert all(len([line for line in block.splitlines() if line.strip()]) <= 5 for block in blocks)


def test_every_row_of_what_is_different_has_a_proof():
    table = README[README.index("## What is different here") : README.index("## Three uses")]
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \|$", table, flags=re.MULTILINE)
    assert len(rows) >= 8
    for proof in rows:
        paths = re.findall(r"(?:tests|docs|benchmarks)/[\w./]*", proof)
        assert paths and all((ROOT / path).exists() for path in paths if path.startswith("tests")), proof
