import json
from dataclasses import replace

import pytest
from fewer_rollouts_groups import GROUPS
from fewer_rollouts_report import RESULTS, Table, finals, finish, is_plain
from sandbox_runs import read_runs, run_missing


class NamedArm:
    name = "arm"


def make_run(arm, seed, rounds, seconds, generation_seconds, reaches=True, **settings):
    spent = {"rounds": rounds, "rollouts": 64 * rounds, "tokens": 1000 * rounds, "updates": rounds}
    start = dict.fromkeys([*spent, "seconds", "generation_seconds"], 0) | {"kl": 1.0, "accuracy": 0.0}
    end = spent | {"seconds": seconds, "generation_seconds": generation_seconds}
    end |= {"kl": 0.01 if reaches else 1.0, "accuracy": 0.9}
    chosen = {"mini_batches": 1, "passes": 1, "target": "near", "bar": {"kl": 0.035, "accuracy": 0.87}} | settings
    return {"arm": f"near {arm}", "seed": seed, "settings": chosen, "trajectory": [start, end]}


@pytest.fixture
def runs():
    few = [make_run("few rounds", seed, rounds=8, seconds=20.0, generation_seconds=5.0) for seed in (1, 2)]
    quick = [make_run("quick", seed, rounds=12, seconds=10.0, generation_seconds=5.0) for seed in (1, 2)]
    reuse = [make_run("reuse", seed, rounds=2, seconds=10.0, generation_seconds=1.0, passes=4) for seed in (1, 2)]
    return [*few, *quick, *reuse, make_run("too large", 1, 99, 99.0, 9.0, reaches=False)]


def test_each_axis_is_compared_with_the_plain_arm_that_is_best_on_it(runs):
    table = Table("near", runs)
    assert (table.best_plain("rounds"), table.best_plain("seconds")) == ("near few rounds", "near quick")
    assert table.ratio("near few rounds", "near reuse", "rounds") == "4.00 [4.00, 4.00]"
    assert "| reuse | 1, 2 | 2/2 |" in table.costs()
    assert "| too large | 1 | 0/1 | - |" in table.costs()


def test_slower_generation_fills_its_share_of_the_quickest_plain_step(runs):
    table = Table("near", runs)
    end = table.finishes["near quick"][1]
    assert end["seconds at 90%"] == pytest.approx(5.0 / 0.1)  # the 5 seconds of the rest are a tenth
    assert table.finishes["near reuse"][1]["seconds at 90%"] == pytest.approx(9.0 + 1.0 * 9)


def test_an_averaged_arm_is_read_at_its_average(runs):
    averaged = make_run("averaged", 1, 3, 1.0, 0.5, reaches=False, average=0.9)
    averaged["trajectory"] = [
        point | {"averaged_kl": 0.01, "averaged_accuracy": 1.0} for point in averaged["trajectory"]
    ]
    assert finish(averaged, averaged["settings"]["bar"])["rounds"] == 0
    assert is_plain(averaged) and not is_plain(runs[4])


def test_final_accuracies_are_compared_seed_by_seed():
    plain, reuse = (0.90, 0.94), {"accuracy": (0.91, 0.93), "averaged_accuracy": (0.92, 0.96)}
    runs = [
        make_run("plain", i, 9, 1.0, 0.5) | {"final": {"problems": 100, "accuracy": a}} for i, a in enumerate(plain)
    ]
    for average in (0.0, 0.9):
        for i in range(2):
            final = {"problems": 100} | {name: values[i] for name, values in reuse.items()}
            arm = "averaged" if average else "reuse"
            runs.append(make_run(arm, i, 2, 1.0, 0.5, passes=4, average=average) | {"final": final})
    table = finals(runs).splitlines()
    assert table[2].startswith("| near plain | 0, 1 | 92.0 ±") and table[2].endswith("|  |")
    assert table[3].startswith("| near reuse | 0, 1 | 92.0 ±") and "| +0.0 ±" in table[3]
    assert table[4].startswith("| near averaged | 0, 1 | 94.0 ±") and "| +2.0 ±" in table[4]


def test_only_what_is_missing_is_run(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps({"arm": "arm", "seed": 1}) + "\n")
    asked = []

    def run(arm, seed):
        asked.append(seed)
        return {"trajectory": [{"step": 0}]}

    for _ in range(2):
        run_missing({"group": (range(1, 3), [NamedArm()])}, [], run, lambda _: path)
    assert asked == [2]
    assert [entry["seed"] for entry in read_runs(path)] == [1, 2]


def test_no_two_settings_share_a_name_and_results_can_be_read():
    arms = {}
    for _, members in GROUPS.values():
        for arm in members:
            endless = replace(arm, max_updates=0)  # when to give up makes no other arm
            assert arms.setdefault(arm.name, endless) == endless
    for run in read_runs(RESULTS):
        is_plain(run)
        finish(run, run["settings"]["bar"])
