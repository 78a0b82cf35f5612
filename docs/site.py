"""What the documentation site shows and nobody writes by hand: pages made of the README, and of docs/reference.py.

MkDocs calls these hooks (mkdocs.yml).
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
BORROWED = {  # page: the file that it is
    "index.md": "README.md",
    "benchmarks.md": "benchmarks/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
LINKS = (  # from places in the repository to places on the site
    (r"\]\((?:\.\./)?benchmarks/README\.md", "](benchmarks.md"),
    (r"\]\(\.\./README\.md", "](index.md"),
    (r"\]\((?:\.\./)?docs/", "]("),
    (r"\]\((notebooks/\w+)\.ipynb", r"](\1.md"),
    (r"\]\((?:\.\./)?CONTRIBUTING\.md", "](contributing.md"),
)


def on_config(config: Any) -> Any:
    """Put the reference's pages into the navigation, in the place that mkdocs.yml keeps for them."""
    for entry in config.nav:
        if "Reference" in entry:
            entry["Reference"] = _reference().nav()
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made."""
    for page, source in BORROWED.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for path in sorted((ROOT / "docs").rglob("*.ipynb")):
        page = path.relative_to(ROOT / "docs").with_suffix(".md")
        files.append(File.generated(config, str(page), content=notebook_page(json.loads(path.read_text("utf-8")))))
    for page, text in _reference().pages().items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **unused: Any) -> str:
    """Links inside the repository become links inside the site; every metric gets an address."""
    for pattern, replacement in LINKS:
        markdown = re.sub(pattern, replacement, markdown)
    return with_addresses(markdown) if page.file.src_uri == "metrics.md" else markdown


def on_post_page(output: str, page: Any, **unused: Any) -> str:
    """Refuse a page that needs the network: nothing but what a reader clicks on may lead elsewhere."""
    elsewhere = re.findall(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="?(https?://[^"> ]+)', output)
    if elsewhere:
        raise PluginError(f"{page.file.src_uri} loads {elsewhere[0]}, but the site has to work without network.")
    return output


def notebook_page(notebook: dict[str, Any]) -> str:
    """A notebook as a page: its cells and, below each, what it printed and drew."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", []):
            if "text" in output:
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            elif "image/png" in output["data"]:
                picture = "".join(output["data"]["image/png"]).replace("\n", "")
                parts.append(f"![drawn by the cell above](data:image/png;base64,{picture})")
    return "\n\n".join(parts) + "\n"


def with_addresses(table: str) -> str:
    """Give every name in the first column of a table an id: `metrics.md#reverse_kl`."""
    seen: set[str] = set()

    def named(match: re.Match[str]) -> str:
        name = match[1].strip("/")
        if name in seen or not name.isidentifier():
            return match[0]
        seen.add(name)
        return f"{match[0]}{{#{name}}}"

    return re.sub(r"^\| [^|]+ \|", lambda cell: re.sub(r"`([^`]+)`", named, cell[0]), table, flags=re.MULTILINE)


def _reference() -> Any:
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "docs")]
    import reference

    return reference
