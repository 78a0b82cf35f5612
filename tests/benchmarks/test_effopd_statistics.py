import math

import pytest
from effopd_speedup_arms import GROUPS, METHODS, TARGETS
from effopd_speedup_statistics import describe_speedup, interval, read_rows, same_rate, separation


def make_run(arm, seed, steps_to_bar, method="opd", lr=0.1, reaches=True):
    kl = 0.0 if reaches else 1.0
    points = [
        {"step": 0, "seconds": 0.0, "wall_seconds": 0.0, "tokens": 0, "kl": 1.0, "accuracy": 0.0},
        {
            "step": steps_to_bar,
            "seconds": 2.0 * steps_to_bar,
            "wall_seconds": 4.0,
            "tokens": 9,
            "kl": kl,
            "accuracy": 1,
        },
    ]
    settings = {"method": method, "lr": lr, "prompts": 64, "warmup": 0, "decay": 0, "averaged": False}
    searches = [] if method == "opd" else [{"seconds": 1.0}]
    return {"arm": arm, "seed": seed, "settings": settings, "trajectory": points, "searches": searches}


def test_the_interval_is_that_of_the_t_distribution():
    mean, half = interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.303 / math.sqrt(3)))
    assert math.isnan(interval([1.0])[1])


def test_speedups_are_paired_by_seed_and_say_when_the_baseline_never_arrived():
    runs = [make_run("opd", seed, steps) for seed, steps in enumerate([40, 80, 20])]
    runs += [make_run("effopd", seed, steps, method="effopd") for seed, steps in enumerate([10, 20])]
    plain, fast = read_rows(runs)
    assert same_rate(fast, [plain, fast]) is plain
    assert fast.search_share == 0.25
    assert describe_speedup(plain, fast, "steps") == "4.00 [4.00, 4.00]"  # seed 2 has no partner
    never = read_rows([make_run("opd", seed, 40, reaches=False) for seed in range(2)])[0]
    assert describe_speedup(never, fast, "seconds").startswith(">= 2.83")
    assert describe_speedup(fast, never, "seconds") == "-"


def test_separation_counts_ties_half():
    assert separation([(0.9, True), (0.1, False)]) == (1.0, 1)
    assert separation([(0.5, True), (0.5, False), (0.7, False)]) == (0.25, 2)
    assert math.isnan(separation([(0.5, True)])[0])


def test_every_arm_names_a_method_and_a_target_and_no_two_settings_share_a_name():
    settings = {}
    for _, arms in GROUPS.values():
        for arm in arms:
            assert arm.method in METHODS and arm.target in TARGETS
            same = settings.setdefault((arm.target, arm.name), arm)
            assert (same.lr, same.warmup, same.decay, same.prompts) == (arm.lr, arm.warmup, arm.decay, arm.prompts)
