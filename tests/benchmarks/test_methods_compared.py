import math

import methods
import methods_report
import pytest


def record(name, seed, kls, lr=1e-3, seconds=2.0):
    points = [
        {"rollouts": 128 * n, "seconds": seconds * n, "kl": kl, "accuracy": 0.5} for n, kl in enumerate([1.0, *kls])
    ]
    return {
        "name": name,
        "sandbox": "short",
        "seed": seed,
        "settings": {"lr": lr, "rollouts": 512},
        "trajectory": points,
    }


@pytest.fixture
def runs(monkeypatch):
    made = []
    for name, factor in (("plain", 1.0), ("control", 4.0), ("vopd", 0.5)):
        kls = [factor * kl for kl in (0.8, 0.4, 0.2, 0.1)]
        for lr in methods.SANDBOXES["short"].rates:  # the middle one is the best
            made.append(record(name, 20, [kl * (1 if lr == 5e-4 else 2) for kl in kls], lr))
        if name != "control":
            made += [record(name, seed, kls, 5e-4) for seed in range(30, 35)]
    for module in (methods, methods_report):
        monkeypatch.setattr(module, "read_runs", lambda _: made)
    return made


def test_a_contestant_is_compared_at_its_own_best_rate_seed_by_seed(runs):
    lines = methods_report.table("short").splitlines()
    rows = {line.split(" | ")[0].strip("| "): line for line in lines[2:] if line.startswith("|")}
    assert list(rows) == ["vopd", "plain", "control"]
    assert "| 0.0005 | 5 | 0.0500 | 50% | 2.00 [2.00, 2.00]: nearer | 2.00 [2.00, 2.00]: nearer |" in rows["vopd"]
    assert "0.25: tuned only" in rows["control"]


def test_what_differs_by_chance_is_no_gain():
    text, verdict = methods_report.gain([0.0, 1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0, 0.5])
    assert verdict == "no difference shown" and text == "0.90 [0.25, 3.23]"
    assert methods_report.gain([0.0] * 3, [-1.0] * 3)[1] == "too few seeds"


def test_seconds_are_interpolated_between_measurements(runs):
    run = record("plain", 1, [math.exp(-1), math.exp(-2)], seconds=1.0)
    assert methods_report.at_seconds(run, 1.5) == pytest.approx(-1.5)
    assert methods_report.at_seconds(run, 99.0) == pytest.approx(-2)


def test_a_method_is_tuned_before_it_is_compared(runs):
    assert methods.best_rate("plain", "short") == 5e-4
    with pytest.raises(ValueError, match="veto: tune it first"):
        methods.best_rate("veto", "short")


def test_all_contestants_are_shipped_or_controls_and_none_is_left_out_without_a_reason():
    names = methods.contestants()
    assert {"plain", "control", "vopd"} <= set(names)
    assert set(methods.NOT_RUN) <= set(names) and all(methods.NOT_RUN.values())
