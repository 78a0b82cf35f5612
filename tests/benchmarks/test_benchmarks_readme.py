import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
PAGE = (BENCHMARKS / "README.md").read_text()


def test_every_script_and_every_results_file_is_listed():
    there = {path.name for path in BENCHMARKS.glob("*.py")} | {path.name for path in (BENCHMARKS / "results").iterdir()}
    listed = set(re.findall(r"(?<![\w*-])([\w-]+\.(?:py|jsonl?|csv))\b", PAGE))
    assert listed == there


def test_links_lead_somewhere():
    for page in (BENCHMARKS / "README.md", ROOT / "docs" / "effopd.md"):
        for target in re.findall(r"\]\(([^)#:]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
    headings = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.+)$", PAGE, re.M)}
    for page in (BENCHMARKS / "README.md", ROOT / "docs" / "effopd.md", ROOT / "README.md"):
        own = r"\]\(#([^)]+)\)|" if page.parent == BENCHMARKS else ""
        for groups in re.findall(own + r"benchmarks/README\.md#([^)]+)\)", page.read_text()):
            anchor = groups if isinstance(groups, str) else "".join(groups)
            assert anchor in headings, f"{page.name}: {anchor}"
