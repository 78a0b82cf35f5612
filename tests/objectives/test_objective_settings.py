"""What `Objective` refuses, warns about and prints."""

import doctest
import math
import warnings

import pytest
import yaml
from jsonargparse import ArgumentParser

from opd_lightning.interfaces import Sampling, ScoreRequest
from opd_lightning.objectives import JensenShannon, Objective, ReverseKL, objective

SCORE = {"estimator": "score_function"}
SAMPLED = {"support": "sampled_token", **SCORE}
TOP = {"support": "student_top_k"}

REFUSED = [
    ({"support": "top_k"}, r"objective\.support: expected one of sampled_token, .*got 'top_k'"),
    ({"normalization": "softmax"}, r"objective\.normalization: expected one of"),
    ({"estimator": "reinforce"}, r"objective\.estimator: expected one of"),
    ({**SCORE, "weighting": "p"}, r"objective\.weighting: expected one of"),
    ({**SCORE, "weight_scale": "sum"}, r"objective\.weight_scale: expected one of"),
    ({**SAMPLED, "importance": "clip"}, r"objective\.importance: expected one of"),
    ({"divergence": "reverse_kl"}, r"objective\.divergence: expected a Divergence"),
    ({**TOP, "k": 0}, r"objective\.k: expected an integer of at least 1, got 0"),
    ({"chunk_tokens": 0}, r"objective\.chunk_tokens"),
    ({"student_temperature": 0.0}, r"objective\.student_temperature: expected a finite number above 0"),
    ({"student_temperature": math.nan}, r"objective\.student_temperature"),
    ({"teacher_temperature": -1.0}, r"objective\.teacher_temperature"),
    ({"teacher_temperature": math.inf}, r"objective\.teacher_temperature"),
    ({**SAMPLED, "importance": "masked", "importance_cap": 1.0}, r"objective\.importance_cap: .*wants more than 1"),
    ({**SAMPLED, "importance_cap": 0.5}, r"objective\.importance_cap: expected a finite number of at least 1"),
    ({**SAMPLED, "importance": "ppo", "clip_low": 1.0}, r"objective\.clip_low: expected a number between 0 and 1"),
    ({**SAMPLED, "importance": "ppo", "clip_high": 0.0}, r"objective\.clip_high"),
    ({**SAMPLED, "advantage_clip": 0.0}, r"objective\.advantage_clip: expected a number above 0, or null"),
    ({"normalization": "tail"}, r"'full_vocabulary' leaves none outside"),
    ({**TOP, "k": 1}, r"objective\.k: .*has no gradient"),
    ({"support": "teacher_top_k", "k": 1}, r"objective\.k: .*has no gradient"),
    ({"support": "intersection", "k": 1, **SCORE}, r"objective\.k: .*has no gradient"),
    ({**TOP, **SCORE, "k": 1, "normalization": "none", "centered": True}, r"objective\.centered: .*always 0"),
    ({**TOP, "normalization": "none"}, r"objective\.normalization: .*even where it equals the teacher"),
    ({"support": "union", "normalization": "none"}, r"objective\.normalization"),
    ({"support": "sampled_token"}, r"objective\.estimator: 'direct' with support='sampled_token'"),
    ({"support": "sampled_token", "normalization": "renormalize"}, r"has no usable gradient"),
    ({**SAMPLED, "normalization": "renormalize"}, r"objective\.normalization: .*so 'none'; got 'renormalize'"),
    ({**SAMPLED, "normalization": "tail"}, r"With 'tail' use estimator='direct'"),
    ({**SAMPLED, "weighting": "uniform"}, r"objective\.weighting: support='sampled_token' compares one token"),
    ({**SAMPLED, "weight_scale": "raw"}, r"objective\.weight_scale"),
    ({**SAMPLED, "centered": True}, r"objective\.centered"),
    ({"weighting": "student_probability"}, r"objective\.weighting: .*differentiates the divergence itself"),
    ({**TOP, "weight_scale": "raw"}, r"objective\.weight_scale"),
    ({**TOP, "centered": True}, r"objective\.centered: True belongs to estimator='score_function'"),
    ({"importance": "truncated"}, r"objective\.importance"),
    ({**TOP, "advantage_clip": 1.0}, r"objective\.advantage_clip"),
    ({**TOP, **SCORE, "importance": "ppo"}, r"objective\.importance: .*taken analytically"),
    ({**SCORE, "importance": "truncated"}, r"objective\.importance: .*taken analytically"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_impossible_settings_are_refused_with_the_reason(arguments, message):
    with pytest.raises(ValueError, match=message):
        Objective(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 8}, r"objective\.k=8 is ignored: it only matters with a top-k support"),
        ({**SAMPLED, "k": 8}, r"objective\.k=8 is ignored"),
        ({"importance_cap": 2.0}, r"objective\.importance_cap=2\.0 is ignored"),
        ({**SAMPLED, "importance": "ppo", "importance_cap": 2.0}, r"only matters with importance='truncated'"),
        ({**SAMPLED, "clip_low": 0.1}, r"objective\.clip_low=0\.1 is ignored: it only matters with importance='ppo'"),
        ({**SAMPLED, "clip_high": 0.28}, r"objective\.clip_high=0\.28 is ignored"),
    ],
)
def test_settings_without_effect_are_warned_about_where_they_are_written(arguments, message):
    with pytest.warns(UserWarning, match=message) as caught:
        Objective(**arguments)
    assert caught[0].filename == __file__


def test_settings_that_matter_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Objective(support="union", k=1, normalization="tail")
        Objective(**SAMPLED, importance_cap=2.0)
        Objective(**SAMPLED, importance="ppo", clip_low=0.1, clip_high=0.28)
        Objective(importance="none")


def test_null_settings_become_what_the_support_needs():
    assert Objective().normalization == "none"
    assert Objective(support="union").normalization == "renormalize"
    assert Objective(**SAMPLED).normalization == "none"
    assert Objective(**SAMPLED).effective_importance == "truncated"
    assert Objective(**TOP, **SCORE).effective_importance == "none"


def test_the_request_names_what_the_losses_need():
    assert Objective().request() == ScoreRequest(full_vocabulary=True)
    assert Objective(**TOP, teacher_temperature=2.0).request() == ScoreRequest(arbitrary_ids=True, temperature=2.0)
    assert Objective(support="intersection", k=8).request() == ScoreRequest(top_k=8)
    assert Objective(**SAMPLED).request() == ScoreRequest()


def test_the_presets_of_the_docstring_run():
    assert doctest.testmod(objective).attempted >= 4
    assert doctest.testmod(objective).failed == 0


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(temperature=0.7), r"sampling\.temperature is 0\.7 but objective\.student_temperature is 1\.0"),
        (Sampling(temperature=0.0), r"sampling\.temperature is 0\.0"),
        (Sampling(top_p=0.9), r"sampling\.top_p=0\.9 and sampling\.top_k=0 cut tokens off"),
        (Sampling(top_k=20), r"sampling\.top_k=20 cut tokens off"),
    ],
)
def test_sampling_from_another_distribution_is_refused_or_warned_about_once(sampling, message):
    with pytest.raises(ValueError, match=message):
        Objective().check_sampling(sampling)
    tolerant = Objective(allow_biased_sampling=True)
    with pytest.warns(UserWarning, match=message):
        tolerant.check_sampling(sampling)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tolerant.check_sampling(sampling)


def test_sampling_at_the_students_temperature_is_accepted():
    Objective(student_temperature=0.7).check_sampling(Sampling(temperature=0.7))
    with pytest.raises(ValueError, match="student_temperature"):
        Objective(student_temperature=0.7).check_sampling(Sampling())


def parser():
    result = ArgumentParser(exit_on_error=False)
    result.add_class_arguments(Objective, "objective")
    return result


def test_yaml_prints_every_default_and_comes_back():
    printed = parser().dump(parser().parse_args([]))
    settings = yaml.safe_load(printed)["objective"]
    assert settings["support"] == "full_vocabulary"
    assert settings["divergence"]["class_path"].endswith("ReverseKL")
    assert settings["importance_cap"] == 5.0
    again = parser().parse_string(printed)
    assert isinstance(parser().instantiate(again).objective.divergence, ReverseKL)


def test_yaml_chooses_the_divergence_by_its_short_name():
    text = "objective: {support: student_top_k, k: 8, divergence: {class_path: JensenShannon, init_args: {beta: 0.2}}}"
    built = parser().instantiate(parser().parse_string(text)).objective
    assert isinstance(built.divergence, JensenShannon)
    assert (built.support, built.k, built.divergence.beta) == ("student_top_k", 8, 0.2)
    built = parser().instantiate(parser().parse_args(["--objective.divergence=ForwardKL"])).objective
    assert repr(built.divergence) == "ForwardKL()"


class Owner:
    def __init__(self, objective: Objective = Objective()):  # noqa: B008
        self.objective = objective


def test_an_owner_may_hold_an_objective_as_its_default_and_override_one_setting():
    owners = ArgumentParser(exit_on_error=False)
    owners.add_class_arguments(Owner, "model")
    built = owners.instantiate(owners.parse_args(["--model.objective.chunk_tokens=64"])).model
    assert built.objective.chunk_tokens == 64
    assert isinstance(built.objective.divergence, ReverseKL)
