"""What all parts of the campaign share (a plugin of pytest): how much, from which seed, and the table at the end.

pytest tests/campaign -m slow -n 0                        # minutes, as CI does
OPD_CAMPAIGN=long pytest tests/campaign -m slow -n 0      # 10 minutes and more
OPD_CAMPAIGN_SEED=7 ...                                   # other moments and inputs
"""

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "backends"))  # the fake server and its hostile answers

IS_LONG = os.environ.get("OPD_CAMPAIGN") == "long"
SEED = int(os.environ.get("OPD_CAMPAIGN_SEED", "0"))
HEADER = ("kind", "inputs", "survived", "what was lost")


@pytest.fixture
def rng(request):
    """Random numbers of one test: the same whatever else runs."""
    return random.Random(f"{SEED}/{request.node.name}")


@pytest.fixture
def report(record_property):
    """Adds a line to the table, and fails where something did not survive."""

    def add(kind, inputs, failures, lost="nothing"):
        record_property("campaign", json.dumps([kind, inputs, inputs - len(failures), lost]))
        assert not failures, "\n".join(map(str, failures[:10]))

    return add


def pytest_terminal_summary(terminalreporter):
    reports = [each for outcome in ("passed", "failed") for each in terminalreporter.stats.get(outcome, [])]
    lines = [json.loads(value) for each in reports for name, value in each.user_properties if name == "campaign"]
    if lines:
        terminalreporter.write_line(f"\nseed {SEED}, {'long' if IS_LONG else 'short'}")
        for line in (HEADER, ["---"] * 4, *sorted(lines)):
            terminalreporter.write_line("| " + " | ".join(map(str, line)) + " |")


@dataclass
class Outcome:
    status: int  # negative: the signal that ended it
    said: str
    num_events: int
    seconds: float  # of processor time

    def is_told_in_one_line(self, *statuses):
        """Ended with one of these, no traceback, and one line of error at most."""
        num_lines = self.said.count("opd-lightning: error: ")
        return self.status in statuses and "Traceback" not in self.said and num_lines == (self.status in (1, 2))


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Start the real command in a process of its own and wait for its end; see `runs.py` for what can happen to it."""
    folder = tmp_path_factory.mktemp("said")
    program = [sys.executable, str(Path(__file__).parent / "runs.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder
    ) as process:

        def run(words, **accidents):
            log = folder / "said.txt"
            order = {"words": [*map(str, words)], "log": str(log), **accidents}
            print(json.dumps(order), file=process.stdin, flush=True)
            answer = json.loads(process.stdout.readline())
            return Outcome(said=log.read_text(errors="replace"), **answer)

        yield run
        process.stdin.close()
