"""What objectives and their factors refuse, warn about and print."""

import doctest
import math
import warnings
from functools import partial

import pytest
import yaml
from jsonargparse import ArgumentError, ArgumentParser

from opd_lightning.interfaces import Objective, Sampling, ScoreRequest
from opd_lightning.objectives import (
    NLL,
    CandidateScore,
    Clipped,
    DivergenceObjective,
    ForwardKL,
    FullVocabulary,
    Intersection,
    JensenShannon,
    Masked,
    ReverseKL,
    SampledToken,
    SampledTokenObjective,
    StudentTopK,
    SymmetricDifference,
    TeacherTopK,
    Truncated,
    Union,
    objective,
)

EVERY_TOP_K = [StudentTopK, TeacherTopK, Intersection, Union, SymmetricDifference]
TEMPERED = [DivergenceObjective, SampledTokenObjective]

REFUSED = [
    (partial(DivergenceObjective, support="top_k"), r"objective\.support: .* subclass of Support, got 'top_k'"),
    (partial(DivergenceObjective, support=StudentTopK), r"objective\.support: .* in Python construct it"),
    (partial(DivergenceObjective, divergence="reverse_kl"), r"objective\.divergence: .* subclass of Divergence"),
    (partial(DivergenceObjective, estimator="reinforce"), r"objective\.estimator: .* subclass of Estimator"),
    (partial(SampledTokenObjective, divergence="reverse_kl"), r"objective\.divergence: .* subclass of Divergence"),
    (partial(SampledTokenObjective, importance="clip"), r"objective\.importance: .* subclass of Importance"),
    (partial(SampledTokenObjective, advantage="baseline"), r"objective\.advantage: .* subclass of Advantage"),
    (partial(StudentTopK, normalization="softmax"), r"support\.normalization: expected one of renormalize, tail, none"),
    (partial(CandidateScore, weighting="p"), r"estimator\.weighting: expected one of student_probability, .* got 'p'"),
    (partial(CandidateScore, scale="sum"), r"estimator\.scale: expected one of normalized, raw"),
    (partial(CandidateScore, advantage_clip=0.0), r"estimator\.advantage_clip: expected a number above 0, or null"),
    (partial(SampledTokenObjective, advantage_clip=0.0), r"objective\.advantage_clip: expected a number above 0"),
    (partial(SampledTokenObjective, advantage_clip=math.nan), r"objective\.advantage_clip"),
    *((partial(kind, k=0), r"support\.k: expected an integer of at least 1, got 0") for kind in EVERY_TOP_K),
    *((partial(kind, chunk_tokens=0), r"objective\.chunk_tokens: .* at least 1, got 0") for kind in [*TEMPERED, NLL]),
    *((partial(kind, student_temperature=0.0), r"objective\.student_temperature: .* above 0") for kind in TEMPERED),
    *((partial(kind, student_temperature=math.nan), r"objective\.student_temperature") for kind in TEMPERED),
    *((partial(kind, teacher_temperature=-1.0), r"objective\.teacher_temperature") for kind in TEMPERED),
    *((partial(kind, teacher_temperature=math.inf), r"objective\.teacher_temperature") for kind in TEMPERED),
    (partial(Masked, 1.0), r"importance\.cap: .* above 1 \(at 1 nothing is left\), got 1\.0"),
    (partial(Masked, math.inf), r"importance\.cap: expected a finite number above 1"),
    (partial(Truncated, 0.5), r"importance\.cap: expected a finite number of at least 1"),
    (partial(Truncated, math.nan), r"importance\.cap"),
    (partial(Clipped, low=1.0), r"importance\.low: expected a number between 0 and 1"),
    (partial(Clipped, high=0.0), r"importance\.high: expected a finite number above 0"),
    (partial(StudentTopK, 1), r"support\.k: .*StudentTopK with k=1 has no gradient"),
    (partial(TeacherTopK, 1), r"support\.k: .*has no gradient"),
    (partial(Intersection, 1), r"support\.k: .*has no gradient"),
    (
        lambda: DivergenceObjective(StudentTopK(1, "none"), estimator=CandidateScore(centered=True)),
        r"estimator\.centered: .*always 0",
    ),
    *(
        (lambda kind=kind: DivergenceObjective(kind(8, "none")), r"support\.normalization: .*even where it equals the")
        for kind in EVERY_TOP_K
    ),
    (
        lambda: DivergenceObjective(SampledToken(), estimator=CandidateScore()),
        r"objective\.estimator: .*Use SampledTokenObjective",
    ),
]


@pytest.mark.parametrize(("construct", "message"), REFUSED)
def test_impossible_settings_are_refused_with_the_reason(construct, message):
    with pytest.raises(ValueError, match=message):
        construct()


def test_settings_that_make_sense_are_accepted_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in (Union, SymmetricDifference):  # of two lists: not one token
            DivergenceObjective(kind(1))
            DivergenceObjective(kind(1, "none"), estimator=CandidateScore(centered=True))
        for kind in EVERY_TOP_K:
            DivergenceObjective(kind(1, "tail"))
        DivergenceObjective(StudentTopK(1, "none"), estimator=CandidateScore())
        DivergenceObjective(SampledToken())
        SampledTokenObjective(importance=None)
        Truncated(1.0)


IMPOSSIBLE = [  # what has no effect, or no meaning, cannot be written
    ("DivergenceObjective", "support: {class_path: FullVocabulary, init_args: {k: 8}}", "k"),
    ("DivergenceObjective", "support: {class_path: FullVocabulary, init_args: {normalization: tail}}", "normalization"),
    ("DivergenceObjective", "support: {class_path: SampledToken, init_args: {normalization: none}}", "normalization"),
    ("DivergenceObjective", "estimator: {class_path: Direct, init_args: {centered: true}}", "centered"),
    ("DivergenceObjective", "estimator: {class_path: Direct, init_args: {weighting: uniform}}", "weighting"),
    ("DivergenceObjective", "importance: Truncated", "importance"),
    ("DivergenceObjective", "advantage_clip: 1.0", "advantage_clip"),
    ("SampledTokenObjective", "support: StudentTopK", "support"),
    ("SampledTokenObjective", "estimator: CandidateScore", "estimator"),
    ("SampledTokenObjective", "importance: {class_path: Clipped, init_args: {cap: 2.0}}", "cap"),
    ("SampledTokenObjective", "importance: {class_path: Truncated, init_args: {low: 0.1}}", "low"),
    ("NLL", "student_temperature: 0.7", "student_temperature"),
]


@pytest.mark.parametrize(("kind", "setting", "name"), IMPOSSIBLE)
def test_settings_without_effect_cannot_be_written(kind, setting, name):
    with pytest.raises(ArgumentError, match=rf"Option '{name}' is not accepted|'{name}'"):
        build(f"{{class_path: {kind}, init_args: {{{setting}}}}}")


def test_the_request_names_what_the_losses_need():
    assert DivergenceObjective().request() == ScoreRequest(full_vocabulary=True)
    top = DivergenceObjective(StudentTopK(), teacher_temperature=2.0)
    assert top.request() == ScoreRequest(arbitrary_ids=True, temperature=2.0)
    assert DivergenceObjective(Intersection(8)).request() == ScoreRequest(top_k=8)
    assert SampledTokenObjective(teacher_temperature=2.0).request() == ScoreRequest(temperature=2.0)
    assert NLL().request() is None


def test_only_importance_needs_the_log_probs_of_the_rollouts():
    assert SampledTokenObjective().needs_rollout_log_probs
    assert not SampledTokenObjective(importance=None).needs_rollout_log_probs
    assert not DivergenceObjective().needs_rollout_log_probs
    assert not NLL().needs_rollout_log_probs


def test_only_direct_estimators_have_the_divergence_as_their_value():
    assert DivergenceObjective().value_is_divergence
    assert not DivergenceObjective(estimator=CandidateScore()).value_is_divergence
    assert not SampledTokenObjective().value_is_divergence
    assert not NLL().value_is_divergence


def test_the_presets_of_the_docstring_run():
    result = doctest.testmod(objective)
    assert result.attempted >= 4
    assert result.failed == 0


@pytest.mark.parametrize("kind", TEMPERED)
@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(temperature=0.7), r"sampling\.temperature is 0\.7 but objective\.student_temperature is 1\.0"),
        (
            Sampling(temperature=0.0),
            r"sampling\.temperature is 0, .* above 0 is needed; set it to .*student_temperature, 1\.0",
        ),
        (Sampling(top_p=0.9), r"sampling\.top_p=0\.9 and sampling\.top_k=0 cut tokens off"),
        (Sampling(top_k=20), r"sampling\.top_k=20 cut tokens off"),
    ],
)
def test_sampling_from_another_distribution_is_refused_or_warned_about(sampling, message, kind):
    with pytest.raises(ValueError, match=message):
        kind().check_sampling(sampling)
    with pytest.warns(UserWarning, match=message) as caught:
        kind(allow_biased_sampling=True).check_sampling(sampling)
    assert caught[0].filename == __file__


def test_sampling_at_the_students_temperature_is_accepted():
    for kind in TEMPERED:
        kind(student_temperature=0.7).check_sampling(Sampling(temperature=0.7))
        with pytest.raises(ValueError, match="student_temperature"):
            kind(student_temperature=0.7).check_sampling(Sampling())
    NLL().check_sampling(Sampling(temperature=0.7, top_p=0.9))  # others wrote the responses


class Owner:
    def __init__(self, objective: Objective = DivergenceObjective()):  # noqa: B008
        self.objective = objective


def parser():
    result = ArgumentParser(exit_on_error=False)
    result.add_class_arguments(Owner, "model")
    return result


def build(text):
    return parser().instantiate(parser().parse_string(f"model: {{objective: {text}}}")).model.objective


def test_yaml_prints_every_default_and_comes_back():
    printed = parser().dump(parser().parse_args([]))
    settings = yaml.safe_load(printed)["model"]["objective"]["init_args"]
    assert settings["support"]["class_path"].endswith("FullVocabulary")
    assert settings["divergence"]["class_path"].endswith("ReverseKL")
    assert settings["estimator"]["class_path"].endswith("Direct")
    again = parser().instantiate(parser().parse_string(printed)).model.objective
    assert vars(again) == vars(DivergenceObjective())


def test_yaml_chooses_factors_by_their_short_names():
    built = build("{support: {class_path: StudentTopK, init_args: {k: 8}}, divergence: ForwardKL}")
    assert vars(built) == vars(DivergenceObjective(StudentTopK(8), ForwardKL()))
    built = build("{class_path: SampledTokenObjective, init_args: {importance: null, divergence: JensenShannon}}")
    assert vars(built) == vars(SampledTokenObjective(JensenShannon(), None))
    options = ["--model.objective.support=StudentTopK", "--model.objective.support.k=8"]
    built = parser().instantiate(parser().parse_args(options)).model.objective
    assert built.support == StudentTopK(8)


def test_one_setting_of_the_default_may_be_changed_alone():
    built = parser().instantiate(parser().parse_args(["--model.objective.chunk_tokens=64"])).model
    assert vars(built.objective) == vars(DivergenceObjective(chunk_tokens=64))
    assert parser().instantiate(parser().parse_args(["--model.objective=NLL"])).model.objective.request() is None


def test_factors_are_values_that_say_what_they_are():
    assert repr(DivergenceObjective(StudentTopK(8)).support) == "StudentTopK(k=8, normalization='renormalize')"
    assert repr(JensenShannon(0.3)) == "JensenShannon(beta=0.3)"
    assert FullVocabulary() == FullVocabulary()
    assert StudentTopK(8) != TeacherTopK(8)
    assert len({ReverseKL(), ReverseKL(), JensenShannon(0.1), JensenShannon(0.2)}) == 3
