import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_annotated_tree_shows_what_is_there():
    shown = set(re.findall(r"^[├└]── (\S+?)/?\s", README, flags=re.MULTILINE))
    package = ROOT / "src" / "opd_lightning"
    hidden = {"__init__.py", "__main__.py", "__pycache__", "py.typed"}
    assert shown == {path.name for path in package.iterdir()} - hidden


def test_every_file_the_readme_names_exists():
    for name in re.findall(r"(?:configs|docs|benchmarks)/[\w./-]+\.\w+", README):
        assert (ROOT / name).exists(), name


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"\b[A-Z]{4,}_[A-Z]+\b", README.replace("OPD_LIGHTNING_TRACEBACK", ""))


def test_no_room_is_shown_twice():
    shown = re.findall(r"^[├└]── (\S+)", README, flags=re.MULTILINE)
    assert len(shown) == len(set(shown))
