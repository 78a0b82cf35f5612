"""One training example (arXiv 2609.04172). Cells and covers are in tests/diagnosis/test_coverage.py."""

import yaml

from opd_lightning.commands.shipped_configs import path_of
from opd_lightning.selection import Filtered, Shuffled
from opd_lightning.tasks import ArithmeticTask


def chosen(selector, seed, steps=5):
    selector.setup(ArithmeticTask(num_train=32, num_validation=0, num_test=0).problems("train"), seed)
    return [selector.select(4) for _ in range(steps)]


def test_every_rollout_of_a_run_answers_the_same_prompt():
    settings = yaml.safe_load(path_of("methods/one_example").read_text())["data"]
    batches = [chosen(Filtered(**settings["selector"]["init_args"]), seed) for seed in range(6)]
    assert all(len({index for batch in run for index in batch}) == 1 for run in batches)
    assert len({run[0][0] for run in batches}) > 1  # the seed decides which
    assert settings["prompts_per_step"] * settings["rollouts_per_prompt"] == 64


def test_all_examples_are_the_baseline():
    assert chosen(Filtered(most=32), 3) == chosen(Shuffled(), 3)
