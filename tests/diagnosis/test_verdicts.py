"""Numbers in, words out: every verdict by value, on both sides of its thresholds."""

from dataclasses import replace

import pytest
from diagnosed import answers, gain, loss, make_diagnosis

from opd_lightning.diagnosis.measurements import Gradients
from opd_lightning.diagnosis.verdicts import noise_depth, overlap_above_chance, recommend_loss, verdicts

NEW, COLD = "The teacher adds nothing new here", "Cold start first"
REINFORCE, UNDECIDED = "Reinforcement learning would serve you better", "Too few prompts to tell"
NO_GAIN = (gain(0, 0.0, 0.02), gain(16, -0.01, 0.02))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["Distil"]),
        ({"reverse_kl": 9e-4}, [NEW, REINFORCE]),
        ({"reverse_kl": 0.0, "student": answers(mixed=0.05)}, [NEW]),
        ({"continuations": NO_GAIN}, [NEW, REINFORCE]),
        ({"continuations": NO_GAIN, "student": answers(mixed=None)}, [NEW]),
        ({"continuations": (gain(0, -0.3, 0.05), gain(16, 0.0, 0.05))}, [f"{NEW}: it is worse", REINFORCE]),
        ({"continuations": (gain(0, -0.3, 0.05), gain(16, 0.3, 0.05))}, ["Distil"]),
        ({"continuations": (gain(0, 0.04, 0.05),)}, [UNDECIDED]),
        ({"continuations": (gain(0, 0.2, 0.11),)}, [UNDECIDED]),
        ({"continuations": (gain(0, 0.2, None),)}, [UNDECIDED]),
        ({"continuations": (gain(0, 0.0, 0.0),)}, [NEW, REINFORCE]),  # all the same on 64 prompts: 3 / 64 < 0.05
        ({"continuations": ()}, ["The two fit together; whether the teacher is better cannot be known"]),
        ({"overlap_ratio": 0.61}, [COLD]),
        ({"overlap_ratio": 0.63}, ["Distil"]),
        ({"student_entropy": 0.71}, [COLD]),
        ({"overlap_mass_teacher": 0.89}, [COLD]),
        ({"overlap_ratio": 0.4, "continuations": ()}, [COLD]),
        ({"overlap_ratio": 0.1, "k": 16, "vocab_size": 16}, ["Distil"]),  # the list is the vocabulary
        ({"overlap_ratio": None, "reverse_kl": None, "overlap_mass_teacher": None}, ["Distil"]),
        ({"student": answers(truncated=0.5)}, ["Most answers are cut", "Distil"]),
        (
            {"continuations": (gain(0, 0.3, 0.02), gain(8, 0.2, 0.02), gain(16, 0.02, 0.02))},
            ["Distil", "Beyond 16 tokens it is noise"],
        ),
    ],
)
def test_each_pair_gets_its_verdict(options, expected):
    found = verdicts(make_diagnosis(**options))
    assert len(found) == len(expected)
    for verdict, words in zip(found, expected, strict=True):
        assert verdict.words.startswith(words)
        assert verdict.because and verdict.rule and verdict.source


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ([0.3, 0.2, 0.02, 0.01], 20),
        ([0.3, 0.02, 0.2, 0.01], 30),  # useful again further on
        ([0.3, 0.2, 0.1, 0.06], None),
        ([0.02, 0.01, 0.0, 0.0], None),  # never useful: another verdict
        ([0.3, 0.02, 0.02, 0.02], 10),
    ],
)
def test_where_noise_begins(gains, expected):
    assert noise_depth([gain(10 * i, value, 0.02) for i, value in enumerate(gains)]) == expected


def test_a_gain_that_may_be_as_large_as_before_is_not_called_noise():
    assert noise_depth([gain(0, 0.1, 0.02), gain(8, 0.04, 0.05)]) is None


def test_overlap_by_chance_counts_for_nothing():
    assert overlap_above_chance(16 / 262, 16, 262) == pytest.approx(0)
    assert overlap_above_chance(1.0, 16, 262) == 1
    assert overlap_above_chance(0.7, 16, 150_000) == pytest.approx(0.7, abs=1e-4)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (
            [loss("full vocabulary"), loss("student top 4", 4, 0.98), loss("student top 16", 16, 0.995)],
            "k = 16 is enough",
        ),
        ([loss("full vocabulary"), loss("student top 4", 4, 0.999, 1.2)], "No list of up to 64 tokens"),
        ([loss("full vocabulary", norm=0.0)], "No loss moves this pair"),
        ([loss("sampled token", cosine=None)], "Use the longest list that the teacher gives"),
    ],
)
def test_the_smallest_list_with_the_same_gradient_is_recommended(losses, expected):
    assert expected in recommend_loss(Gradients(8, 10, 10, tuple(losses)), 0.99).words


def test_signal_below_0_has_no_noise_scale():
    assert loss("any").noise_scale == pytest.approx(4)
    assert replace(loss("any"), signal=-0.1).noise_scale is None
