"""The code of docs/effopd.md runs as it stands, and without transformers."""

import re
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest

from opd_lightning import EffOPD, EffOPDOptimizer

PAGE = Path(__file__).parents[2] / "docs" / "effopd.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
# torchmetrics, and so Lightning, imports transformers wherever it is installed: here it is not
HIDE = """
import importlib.metadata, sys
known = importlib.metadata.version
def version(name):
    if name in ("transformers", "vllm"):
        raise importlib.metadata.PackageNotFoundError(name)
    return known(name)
importlib.metadata.version = version
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "vllm"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
"""
CHECK = "\nassert not {'transformers', 'vllm'} & set(sys.modules)\n"


def run(code, folder):
    command = [sys.executable, "-c", HIDE + code + CHECK]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_the_lightning_example(tmp_path):
    code = BLOCKS[0]
    assert len([line for line in code.splitlines() if re.search(r"# [123]\b", line)]) == 3
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"EffOPD step 1: .*", done.stdout)
    assert re.search(r"EffOPD: 7 searches, [1-7] accepted, [\d.]+ % of wall-clock", done.stdout)


@pytest.mark.slow
def test_the_plain_torch_example(tmp_path):
    done = run(BLOCKS[1] + "\nassert 'lightning' not in sys.modules\n", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("EffOPD step 64: ")
    assert "EffOPD: 7 searches, " in done.stdout


def test_there_are_no_other_examples():
    assert len(BLOCKS) == 2


def test_the_guide_names_every_option():
    for argument in {*signature(EffOPD).parameters, *signature(EffOPDOptimizer).parameters} - {"optimizer"}:
        assert f"| `{argument}` |" in PAGE.read_text(), argument


def test_the_guide_stays_a_guide():
    assert len(PAGE.read_text().splitlines()) <= 195


def test_the_package_itself_loads_nothing_heavy():
    code = "import opd_lightning, sys; assert not {'torch', 'lightning', 'transformers', 'vllm'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
