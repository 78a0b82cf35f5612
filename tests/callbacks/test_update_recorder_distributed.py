"""One process, two with copies (DDP), two with shards (FSDP2), and averaged weights beside: the same records."""

from pathlib import Path

import pytest
import torch

from opd_lightning.training.run_points import find_updates

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).parent / "update_recorder_distributed_run.py"
NAMES = ["net.2.weight", "net.4.weight"]


@pytest.fixture(scope="module")
def folder(forks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    for kind in ("single", "ddp", "fsdp"):
        done = forks.run(PROGRAM, kind, folder, processes=1 if kind == "single" else 2)
        assert done.returncode == 0, kind + (done.stdout + done.stderr)[-4000:]
    return folder


def records(folder, kind):
    found = find_updates(str(folder / kind))
    assert found.matrices == NAMES
    return {step: {name: found.update(i, name) for name in NAMES} for i, step in enumerate(found.steps)}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_record_as_one_does(folder, kind):
    alone, together = records(folder, "single"), records(folder, kind)
    assert list(together) == list(alone) == [2, 4, 5]
    changes = torch.load(folder / f"{kind}.pt", weights_only=True)
    for name in NAMES:
        assert torch.equal(together[5][name], changes[name].double())
        for step, updates in alone.items():
            torch.testing.assert_close(together[step][name], updates[name], rtol=1e-3, atol=1e-6)


def test_averaged_weights_beside_change_no_record(folder):
    plain, averaged = records(folder, "ddp"), records(folder, "average")
    changes = torch.load(folder / "average.pt", weights_only=True)
    for name in NAMES:
        assert not torch.equal(averaged[5][name], changes[name].double())  # the run ends with the average
        assert all(torch.equal(averaged[step][name], plain[step][name]) for step in plain)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_resumed_run_records_the_same(folder, kind):
    whole, again = records(folder, kind), records(folder, f"{kind}-again")
    assert list(again) == [2, 3, 4, 5]  # 3 was the last step of a part
    for step, updates in whole.items():
        assert all(torch.equal(again[step][name], updates[name]) for name in NAMES)
