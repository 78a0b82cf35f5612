"""What the documentation site shows and nobody writes by hand: pages made of the README, the parser and the docstrings.

MkDocs calls these hooks (mkdocs.yml).
"""

from __future__ import annotations

import os
import re
import sys
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

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
    (r"\]\((?:\.\./)?CONTRIBUTING\.md", "](contributing.md"),
)
ROOMS = {  # of the Python reference, in the order in which a reader needs them: package and its modules
    "Training": {"training": "module datamodule schedules"},
    "EffOPD": {
        "callbacks": "effopd effopd_scores held_out_loss learning_rate_search",
        "extrapolation": "optimizer rate_search",
    },
    "Words and seams": {"interfaces": "words tokens models generation learning problems"},
    "Objectives": {"objectives": "objective supports divergences estimators sampled_token likelihood facts"},
    "Rollouts": {"rollouts": "on_policy one_step_ahead reuse horizon stored rejection plain_engine comparison"},
    "Prompts": {
        "selection": "passes difficulty filtered mixture",
        "tasks": "arithmetic mathematics prompts cleaned sources",
    },
    "Models and engines": {
        "backends.hf": "student teacher engine",
        "teachers": "base_model kept_scores",
        "backends.vllm": "colocated server.engine server.teacher",
    },
    "Callbacks": {"callbacks": "samples guards rescue mismatch start_validation update_recorder"},
    "Geometry of updates": {"": "geometry"},
}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made."""
    for page, source in BORROWED.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for page, make in (("commands", commands), ("configurations", configurations), ("python", python_names)):
        files.append(File.generated(config, f"reference/{page}.md", content=make()))
    return files


def on_page_markdown(markdown: str, **unused: Any) -> str:
    """Links inside the repository become links inside the site."""
    for pattern, replacement in LINKS:
        markdown = re.sub(pattern, replacement, markdown)
    return markdown


def commands() -> str:
    """What each command says of itself."""
    sys.path.insert(0, str(ROOT / "src"))
    from opd_lightning.commands.cli import COMMANDS, main

    os.environ |= {"NO_COLOR": "1", "COLUMNS": "110"}
    parts = ["# Commands\n\nEach command's own `--help`. Classes explain themselves: `--model.objective.help`.\n"]
    for name in COMMANDS:
        with redirect_stdout(StringIO()) as shown, suppress(SystemExit):
            main([name, "--help"])
        parts.append(f"## {name}\n\n```text\n{shown.getvalue().strip()}\n```\n")
    return "\n".join(parts)


def configurations() -> str:
    """The shipped configurations as they are."""
    parts = [
        "# Shipped configurations\n\nUse one with `--config @NAME`; a second `--config` goes on top of the first.\n"
    ]
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        parts.append(f"## @{path.stem}\n\n```yaml\n{path.read_text(encoding='utf-8').strip()}\n```\n")
    return "\n".join(parts)


def python_names() -> str:
    """The Python reference: directives that mkdocstrings replaces by docstrings."""
    parts = ["# Python\n\nPublic names can be imported from the top: `from opd_lightning import OPDModule, EffOPD`.\n"]
    for title, packages in ROOMS.items():
        parts.append(f"## {title}\n")
        for package, modules in packages.items():
            for module in modules.split():
                name = ".".join(filter(None, ("opd_lightning", package, module)))
                parts.append(f"::: {name}\n    options: {{show_root_heading: false, show_root_toc_entry: false}}\n")
    return "\n".join(parts)
