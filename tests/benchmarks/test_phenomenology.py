import json
from pathlib import Path

import pytest
from phenomenology import NUM_PROMPTS, RESULTS, OtherPrompts
from phenomenology_arms import OBJECTIVES, PHENOMENA, SEEDS, Arm
from phenomenology_report import SHOWN, cell, gap_recovery, table, with_tables, write_report

from opd_lightning.sandbox.make_zoo import RECIPES
from opd_lightning.sandbox.notations import NotationTask

ROOT = Path(__file__).parents[2]
RUNS = [json.loads(line) for line in RESULTS.read_text().splitlines()]
ARMS = {arm.name: arm for arms in PHENOMENA.values() for arm in arms.values()}


def made_run(arm, seed, before, after, teacher, imitated=None):
    step = dict.fromkeys(("overlap_ratio", "overlap_mass_student", "overlap_mass_teacher", "reverse_kl"), 0.5)
    step |= dict.fromkeys(("student_entropy", "grad_norm"), 1.0)
    run = {
        "arm": arm.name,
        "seed": seed,
        "teacher_accuracy": teacher,
        "steps": [step, step],
        "evaluations": [
            {"step": 0, "accuracy": before, "length": 20.0},
            {"step": 2, "accuracy": after, "length": 21.0},
        ],
    }
    return run | ({"imitation": {"evaluations": [{"accuracy": imitated}]}} if imitated is not None else {})


def test_gap_recovery_counts_from_the_student_before_any_training():
    arm = Arm("student", "teacher")
    assert gap_recovery(made_run(arm, 0, before=0.25, after=0.625, teacher=1.0)) == 0.5
    assert gap_recovery(made_run(arm, 0, before=0.6, after=0.625, teacher=1.0, imitated=0.25)) == 0.5
    assert gap_recovery(made_run(arm, 0, before=1.0, after=0.7, teacher=0.4)) is None


def reverse_runs():
    arm = PHENOMENA["reverse"]["its own earlier self"]
    return [made_run(arm, seed, 0.99, after, 0.4) for seed, after in ((0, 0.4), (1, 0.5), (100, 0.0))]


def test_tables_hold_means_and_ranges_of_the_seeds_that_count():
    row = "| its own earlier self | 2 | 0.400 | 0.990 | 0.450 (0.400 to 0.500) | 0.500 | 0.500 |"
    assert row in table(reverse_runs(), "reverse")
    assert cell([], gap_recovery) == "-"
    page = with_tables("a\n<!-- table reverse -->\nold\n<!-- end -->\nb\n", reverse_runs())
    assert page.startswith("a\n<!-- table reverse -->\n| arm") and page.endswith(f"{row}\n<!-- end -->\nb\n")
    assert "old" not in page


@pytest.mark.slow  # two pictures of nine panels
def test_one_call_writes_tables_and_pictures(tmp_path, capsys):
    write_report(reverse_runs(), tmp_path)
    assert "its own earlier self" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"phenomenology_accuracy.svg", "phenomenology_overlap.svg"}
    assert all("</svg>" in path.read_text() for path in tmp_path.iterdir())


def test_arms_name_what_exists():
    assert set(SHOWN) == set(PHENOMENA)
    for arm in ARMS.values():
        assert {arm.student, arm.teacher} <= {*RECIPES, "student", "teacher"}
        OBJECTIVES[arm.objective]()


def test_the_cold_start_uses_other_prompts():
    imitated = {problem.uid for problem in OtherPrompts(num_train=2 * NUM_PROMPTS, levels=(1, 2)).problems("train")}
    distilled = {problem.uid for problem in NotationTask(num_train=NUM_PROMPTS, levels=(1, 2)).problems("train")}
    assert len(imitated) == len(distilled) == NUM_PROMPTS and not imitated & distilled


def test_every_arm_has_run_with_every_seed_once_and_the_page_shows_it():
    assert sorted((run["arm"], run["seed"]) for run in RUNS) == sorted((name, s) for name in ARMS for s in SEEDS)
    page = (ROOT / "docs" / "phenomenology.md").read_text()
    assert page == with_tables(page, RUNS)
    assert all(f"<!-- table {phenomenon} -->" in page for phenomenon in PHENOMENA)
