"""One process, two with copies (DDP), two with shards (FSDP2): the same learning rate, the same weights."""

import json
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).parent / "learning_rate_search_distributed_run.py"


@pytest.fixture(scope="module")
def folder(forks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rate")
    for kind in ("single", "ddp", "fsdp"):
        done = forks.run(PROGRAM, kind, folder, processes=1 if kind == "single" else 2)
        assert done.returncode == 0, kind + (done.stdout + done.stderr)[-4000:]
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_find_what_one_finds_and_decide_alike(folder, kind):
    alone, first, second = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("single-0", f"{kind}-0", f"{kind}-1")
    )
    assert first == second
    assert first["rate"] == pytest.approx(alone["rate"], rel=1e-3)
    assert first["rate"] > 1e-3
    assert first["scores"] == pytest.approx(alone["scores"], rel=1e-4)
    weights = [torch.load(folder / f"{name}.pt") for name in ("single-0", f"{kind}-0", f"{kind}-1")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-3, atol=1e-5, msg=name)
        assert torch.equal(weights[1][name], weights[2][name])
