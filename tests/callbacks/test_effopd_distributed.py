"""One process, two with copies (DDP), two with shards (FSDP2): the same searches, the same weights, the same resume."""

import json
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).parent / "effopd_distributed_run.py"
KINDS = ("ddp", "fsdp", "fsdp_file")


@pytest.fixture(scope="module")
def folder(forks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("effopd")
    for kind in ("single", *KINDS):
        done = forks.run(PROGRAM, kind, folder, processes=1 if kind == "single" else 2)
        assert done.returncode == 0, kind + (done.stdout + done.stderr)[-4000:]
    return folder


def reports(folder, name, rank=0):
    return json.loads((folder / f"{name}-{rank}.json").read_text())


def weights(folder, name, rank=0):
    return torch.load(folder / f"{name}-{rank}.pt", weights_only=True)


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_search_as_one_does(folder, kind):
    alone, together = reports(folder, "single"), reports(folder, kind)
    assert [r["step"] for r in together] == [1, 2, 4, 8]
    assert sum(r["factor"] != 0 for r in alone) >= 3
    for one, two in zip(alone, together, strict=True):
        assert one["factor"] == two["factor"]
        for name in ("norm", "baseline", "scores"):
            assert one[name] == pytest.approx(two[name], rel=1e-4), name
        assert one["cosine"] == pytest.approx(two["cosine"], rel=1e-3, nan_ok=True)
    for name, weight in weights(folder, "single").items():
        torch.testing.assert_close(weight, weights(folder, kind)[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", [*KINDS, "torn"])
def test_all_processes_decide_alike(folder, name):
    first, second = reports(folder, name, 0), reports(folder, name, 1)
    assert [{**r, "cosine": str(r["cosine"])} for r in first] == [{**r, "cosine": str(r["cosine"])} for r in second]
    assert_same(weights(folder, name, 0), weights(folder, name, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [3, 4], ids=["between searches", "at a search"])
def test_a_resumed_run_is_the_uninterrupted_one(folder, kind, stop):
    whole, again = reports(folder, kind), reports(folder, f"{kind}-again{stop}")
    assert again == [r for r in whole if r["step"] > stop]
    for rank in (0, 1):
        assert_same(weights(folder, kind, rank), weights(folder, f"{kind}-again{stop}", rank))


@pytest.mark.parametrize("kind", ["ddp", "fsdp_file"])
def test_the_anchor_in_the_checkpoint_is_whole_and_safe_to_load(folder, kind):
    path = folder / kind / "checkpoints" / "step=4.ckpt"
    saved, alone = (
        torch.load(p, weights_only=True)["effopd"]["anchor"]
        for p in (path, folder / "single" / "checkpoints" / "step=4.ckpt")
    )
    for name, anchor in alone.items():
        assert type(saved[name]) is torch.Tensor
        torch.testing.assert_close(saved[name], anchor, rtol=1e-4, atol=1e-5, msg=name)
