"""The files of tested versions name what the package needs."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def names(requirements):
    found = (re.match(r"[\w.-]+", line) for line in requirements)
    return {re.sub(r"[-_.]+", "-", each[0]).lower() for each in found if each}


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-vllm.txt"])
def test_every_dependency_has_a_tested_version(file):
    needed = names(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    assert needed <= names((ROOT / file).read_text().splitlines())
