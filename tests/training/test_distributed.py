"""One process or two: the same rollouts, the same gradient, the same metrics."""

import json
from pathlib import Path

import pytest
import torch

from opd_lightning.reports.token_records import read_record, steps_of

PROGRAM = Path(__file__).parent / "distributed_run.py"
PER_PROCESS = ("seconds/", "tokens_per_second/", "padding_share")


@pytest.fixture(scope="module")
def runs(forks, tmp_path_factory, tiny_qwen3_folder, tiny_teacher_folder):
    folders = {}
    for num_processes in (1, 2):
        folder = folders[num_processes] = tmp_path_factory.mktemp(f"processes{num_processes}")
        words = [PROGRAM, num_processes, tiny_qwen3_folder, tiny_teacher_folder, folder]
        done = forks.run(*words, processes=num_processes)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return folders


def facts(folder, rank=0):
    return json.loads((folder / f"rank{rank}.json").read_text())


@pytest.mark.slow
def test_two_processes_generate_the_rollouts_of_one(runs):
    one, first, second = facts(runs[1]), facts(runs[2], 0), facts(runs[2], 1)
    for whole, a, b in zip(one["seeds"], first["seeds"], second["seeds"], strict=True):
        assert sorted(whole) == sorted(a + b)


@pytest.mark.slow
def test_two_processes_make_the_step_of_one(runs):
    one = torch.load(runs[1] / "rank0.pt")
    for rank in (0, 1):
        for name, weight in torch.load(runs[2] / f"rank{rank}.pt").items():
            torch.testing.assert_close(weight, one[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_two_processes_record_the_tokens_of_one(runs):
    one, two = (steps_of(runs[number] / "tokens") for number in (1, 2))
    assert list(one) == list(two) == [0, 2, 4]
    for step in one:
        for a, b in zip(read_record(one[step]), read_record(two[step]), strict=True):
            assert (a["kind"], a["uid"], a["token_ids"]) == (b["kind"], b["uid"], b["token_ids"])
            assert a["reverse_kl"] == pytest.approx(b["reverse_kl"], rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_metrics_are_reduced_over_processes(runs):
    one, two = facts(runs[1])["metrics"], facts(runs[2])["metrics"]
    assert one[-1].keys() == two[-1].keys()
    for a, b in zip(one, two, strict=True):
        for name in a.keys() & b.keys():
            if not any(part in name for part in PER_PROCESS):
                assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name


@pytest.mark.slow
def test_the_selector_sees_the_outcomes_of_all_processes(runs):
    assert facts(runs[1])["selector"] == facts(runs[2], 0)["selector"] == facts(runs[2], 1)["selector"]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["ahead", "reuse"])
def test_held_rollouts_resumed_on_two_processes_equal_the_whole_run(runs, source):
    for rank in (0, 1):
        whole, resumed = (torch.load(runs[2] / f"{source}_{name}_rank{rank}.pt") for name in ("whole", "resumed"))
        for name, weight in torch.load(runs[1] / f"{source}_whole_rank0.pt").items():
            assert torch.equal(resumed[name], whole[name]), name
            torch.testing.assert_close(whole[name], weight, rtol=1e-4, atol=1e-5, msg=name)
    state = torch.load(runs[2] / f"{source}_first.ckpt", weights_only=True)["OPDDataModule"]["source"]
    groups = state["groups"] if source == "ahead" else state["round"]["groups"]
    assert [len(group) for group in groups] == [2] * (4 if source == "ahead" else 8)


@pytest.mark.slow
def test_two_processes_drop_what_one_drops(runs):
    one = torch.load(runs[1] / "dropout_rank0.pt")
    assert any("lora_B" in name and weight.abs().max() > 1e-3 for name, weight in one.items())
    for rank in (0, 1):
        for name, weight in torch.load(runs[2] / f"dropout_rank{rank}.pt").items():
            torch.testing.assert_close(weight, one[name], rtol=1e-4, atol=1e-5, msg=name)
