"""`VLLMColocatedEngine` in a child process, and one in each of two training processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
from engine_pair import Pair, assert_greedy_is_the_same
from make_tiny_models import make_folder

pytestmark = pytest.mark.vllm


def test_in_a_process_of_its_own_it_is_the_same(tmp_path):
    shared = set(Path("/dev/shm").iterdir())
    pair = Pair(make_folder(tmp_path, tied=True), own_process=True)
    try:
        assert_greedy_is_the_same(pair)
        pair.step()
        assert_greedy_is_the_same(pair)
        assert not [path for path in set(Path("/dev/shm").iterdir()) - shared if "opd_lightning" in path.name]
    finally:
        pair.vllm.close()


def test_two_training_processes_have_an_engine_each(tmp_path):
    folder = make_folder(tmp_path / "student", tied=True)
    here = Path(__file__).parent
    command = [sys.executable, str(here / "two_ranks.py"), str(folder)]
    paths = [str(here.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.count("greedy is the same") == 2
