"""The schedules of POPD, TOPD, Fast OPD and ESR are those of the horizons that their page names.

That the gradient is the one of whole responses up to the horizon is tests/rollouts/test_horizon.py.
"""

import pytest
import yaml

from opd_lightning.commands.shipped_configs import path_of
from opd_lightning.interfaces import Sampling
from opd_lightning.rollouts.horizon import ConstantHorizon, GrowingHorizon, StepSampling

T = 1000
SCHEDULES = {
    "POPD": (GrowingHorizon(start=100, every=3, add=50), lambda k: min(T, 100 + 50 * (k // 3))),
    "TOPD": (ConstantHorizon(tokens=250), lambda k: min(T, T // 4)),
    "all of it": (ConstantHorizon(tokens=T), lambda k: T),
    "Fast OPD": (GrowingHorizon(start=256, every=1, add=256), lambda k: min(T, 256 + 256 * k)),
    "ESR": (ConstantHorizon(tokens=100), lambda k: 100),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedule_is_the_published_one_monotone_and_capped(name):
    horizon, published = SCHEDULES[name]
    sampling = StepSampling(Sampling(max_new_tokens=T), horizon)
    lengths = [sampling.of_step(k).max_new_tokens for k in range(100)]
    assert lengths == [published(k) for k in range(100)]
    assert lengths == sorted(lengths) and lengths[-1] <= T


def test_the_configuration_grows():
    settings = yaml.safe_load(path_of("methods/popd").read_text())["data"]["horizon"]
    assert settings["class_path"] == "GrowingHorizon"
    assert GrowingHorizon(**settings["init_args"]).num_tokens(8) == 16
