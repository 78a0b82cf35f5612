"""GKD (arXiv 2306.13649): the ends of its divergence. Its mixed data are tests/rollouts/test_mixed_data.py."""

import pytest
import torch
import yaml
from built_methods import ROOT
from objective_cases import forward_kl, jensen_shannon, make_case, reverse_kl

from opd_lightning.objectives import DivergenceObjective, JensenShannon

CONFIG = yaml.safe_load((ROOT / "configs" / "methods" / "gkd.yaml").read_text())


@pytest.mark.parametrize(("beta", "reference"), [(0.0, forward_kl), (0.5, jensen_shannon(0.5)), (1.0, reverse_kl)])
def test_the_ends_of_the_divergence(beta, reference):
    case = make_case()
    losses = case.losses(DivergenceObjective(divergence=JensenShannon(beta)))
    torch.testing.assert_close(losses, reference(case.p, case.q))
    gradient = case.agreeing().gradient(DivergenceObjective(divergence=JensenShannon(beta)))
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-13, rtol=0)


def test_the_configuration_has_the_defaults_of_trl():
    assert CONFIG["model"]["objective"]["init_args"]["divergence"]["init_args"] == {"beta": 0.5}
    assert CONFIG["data"]["source"]["init_args"]["student_share"] == 0.5
