import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import forward_kl, make_case, reverse_kl, top_sets

from opd_lightning.interfaces import ScoreRequest
from opd_lightning.objectives import DenseScores, TokenStatistics, token_statistics
from opd_lightning.objectives.statistics import overlap_statistics, sum_and_count

FULL = ScoreRequest(full_vocabulary=True)
ALWAYS = {"student_entropy", "student_top_mass", "sampled_log_ratio", "rollout_mismatch", "rollout_kl"}
OVERLAP = {"overlap_ratio", "overlap_mass_student", "overlap_mass_teacher", "overlap_advantage", "overlap_reverse_kl"}
VOCABULARY = {"reverse_kl", "forward_kl", "teacher_entropy", "entropy_gap"}


def statistics(case, answers=FULL, k=4):
    return token_statistics(case.p.log(), case.scores(), case.response_ids, case.rollout_log_probs, answers, k)


def means(result):
    return {name: (total / count).item() for name, (total, count) in result.sums.items() if count > 0}


def expected_means(case, k):
    """Every definition, position by position, in the obvious way."""
    columns = {}
    for row, (p, q, s, t) in enumerate(zip(case.p, case.q, top_sets(case.p, k), top_sets(case.q, k), strict=True)):
        y = case.response_ids[row]
        drift = p[y].log() - case.rollout_log_probs[row]
        entropy_p, entropy_q = -(p * p.log()).sum(), -(q * q.log()).sum()
        overlap = sorted(s & t)
        values = {
            "reverse_kl": reverse_kl(p, q),
            "forward_kl": forward_kl(p, q),
            "student_entropy": entropy_p,
            "teacher_entropy": entropy_q,
            "entropy_gap": (entropy_q - entropy_p).abs(),
            "student_top_mass": p[sorted(s)].sum(),
            "sampled_log_ratio": p[y].log() - q[y].log(),
            "rollout_mismatch": drift.abs(),
            "rollout_kl": drift.exp() - 1 - drift,
            "overlap_ratio": torch.tensor(len(overlap) / len(s)),
            "overlap_mass_student": p[overlap].sum(),
            "overlap_mass_teacher": q[overlap].sum(),
        }
        if overlap:
            p_in, q_in = p[overlap] / p[overlap].sum(), q[overlap] / q[overlap].sum()
            values["overlap_advantage"] = (p_in * (q_in.log() - p_in.log())).mean()
            values["overlap_reverse_kl"] = reverse_kl(p_in, q_in)
        for name, value in values.items():
            columns.setdefault(name, []).append(value.item())
    return {name: sum(column) / len(column) for name, column in columns.items()}


@given(st.integers(0, 10_000), st.integers(1, 12), st.floats(0.3, 4))
@settings(max_examples=30)
def test_every_mean_is_its_definition(seed, k, spread):
    case = make_case(seed, n=6, spread=spread)
    assert means(statistics(case, k=k)) == pytest.approx(expected_means(case, k), rel=1e-5, abs=1e-5)


def test_the_largest_mismatch_is_kept_apart():
    case = make_case()
    drift = (case.p.log()[range(4), case.response_ids] - case.rollout_log_probs).abs()
    assert statistics(case).maxima["rollout_mismatch_max"].item() == pytest.approx(drift.max().item())


@given(st.integers(0, 10_000), st.integers(1, 9))
def test_overlap_advantage_is_minus_the_kl_over_the_overlap_size(seed, k):
    case = make_case(seed, n=1)
    result = statistics(case, k=k).sums
    size = result["overlap_ratio"][0] * k
    if size > 0:
        expected = -result["overlap_reverse_kl"][0] / size
        torch.testing.assert_close(result["overlap_advantage"][0], expected, atol=1e-6, rtol=1e-5)
    else:
        assert result["overlap_advantage"][1] == 0


def test_positions_without_overlap_count_in_the_masses_but_not_in_the_advantage():
    case = make_case()
    case.teacher_logits[:3] = -case.logits[:3]
    case.teacher_logits[3] = case.logits[3]
    result = statistics(case, k=3).sums
    assert result["overlap_ratio"][0] == 1
    assert [result[name][1].item() for name in ("overlap_ratio", "overlap_mass_student", "overlap_mass_teacher")] == [
        4
    ] * 3
    assert [result[name][1].item() for name in ("overlap_advantage", "overlap_reverse_kl")] == [1, 1]
    assert all(torch.isfinite(total) for total, _ in result.values())


def test_an_agreeing_student_has_no_divergence_and_full_overlap():
    result = means(statistics(make_case().agreeing()))
    for name in ("reverse_kl", "forward_kl", "entropy_gap", "overlap_advantage", "sampled_log_ratio", "rollout_kl"):
        assert result[name] == pytest.approx(0, abs=1e-7)
    assert result["overlap_ratio"] == 1


class OnlyTopK(DenseScores):
    """A teacher that gives the sampled token and its own k likeliest."""

    def at(self, token_ids):
        assert token_ids.shape[-1] == 1, "asked for ids that this teacher was not asked to score"
        return super().at(token_ids)

    def full(self):
        raise AssertionError("asked for the whole vocabulary")


class OnlySampled(OnlyTopK):
    def topk(self, k):
        raise AssertionError("asked for the top k")


@pytest.mark.parametrize(
    ("teacher", "answers", "names"),
    [
        (DenseScores, FULL, ALWAYS | OVERLAP | VOCABULARY),
        (OnlyTopK, ScoreRequest(top_k=16), ALWAYS | OVERLAP),
        (OnlyTopK, ScoreRequest(top_k=4), ALWAYS | OVERLAP),
        (OnlyTopK, ScoreRequest(top_k=3), ALWAYS),
        (OnlySampled, ScoreRequest(), ALWAYS),
        (OnlySampled, ScoreRequest(arbitrary_ids=True), ALWAYS),
    ],
)
def test_only_what_the_teacher_answers_is_reported_and_it_is_exact(teacher, answers, names):
    case = make_case()
    scores = teacher(case.q.log(), case.response_ids)
    result = token_statistics(case.p.log(), scores, case.response_ids, case.rollout_log_probs, answers, 4)
    assert set(result.sums) == names
    whole = means(statistics(case))
    assert means(result) == pytest.approx({name: whole[name] for name in names}, rel=1e-6)


def test_k_is_clipped_to_the_vocabulary():
    case = make_case()
    result = means(statistics(case, ScoreRequest(top_k=16), k=16))
    assert result["overlap_ratio"] == 1
    assert result["student_top_mass"] == pytest.approx(1)
    assert result["overlap_reverse_kl"] == pytest.approx(reverse_kl(case.p, case.q).mean().item(), rel=1e-5)


@given(st.integers(0, 1000), st.integers(1, 7))
@settings(max_examples=20)
def test_statistics_of_parts_add_up(seed, cut):
    case = make_case(seed, n=8)
    total = TokenStatistics()
    for rows in (slice(0, cut), slice(cut, 8)):
        part = token_statistics(
            case.p.log()[rows],
            case.scores().slice(rows.start, rows.stop),
            case.response_ids[rows],
            case.rollout_log_probs[rows],
            FULL,
            4,
        )
        total.add(part)
    whole = statistics(case)
    assert means(total) == pytest.approx(means(whole), rel=1e-5, abs=1e-6)
    assert total.maxima == whole.maxima


def test_no_tokens_give_zero_sums_and_counts():
    result = statistics(make_case(n=0))
    assert set(result.sums) == ALWAYS | OVERLAP | VOCABULARY
    assert all(total == 0 and count == 0 for total, count in result.sums.values())
    assert result.maxima["rollout_mismatch_max"] == 0


def test_tokens_that_a_model_excludes_keep_the_sums_finite():
    case = make_case()
    case.teacher_logits[:, [0, 1]] = -math.inf
    case.logits[:, [1, 2]] = -math.inf
    case.rollout_log_probs = torch.full((4,), -1.0, dtype=torch.float64)
    assert all(torch.isfinite(total) for total, _ in statistics(case).sums.values())


def test_statistics_are_detached_float32():
    case = make_case()
    log_probs = case.p.log().requires_grad_()
    result = token_statistics(log_probs, case.scores(), case.response_ids, case.rollout_log_probs, FULL, 4)
    for total, count in result.sums.values():
        assert total.dtype == count.dtype == torch.float32
        assert not total.requires_grad


def test_overlap_statistics_of_a_worked_example():
    student_ids, teacher_ids = torch.tensor([[0, 1, 2]]), torch.tensor([[1, 5, 0]])
    student = torch.tensor([[0.5, 0.25, 0.1]]).log()
    teacher = torch.tensor([[0.6, 0.2, 0.1]]).log()
    result = {
        name: total.item()
        for name, (total, _) in overlap_statistics(student_ids, student, teacher_ids, teacher).items()
    }
    kl = 2 / 3 * math.log((2 / 3) / (1 / 7)) + 1 / 3 * math.log((1 / 3) / (6 / 7))
    assert result == pytest.approx(
        {
            "overlap_ratio": 2 / 3,
            "overlap_mass_student": 0.75,
            "overlap_mass_teacher": 0.7,
            "overlap_advantage": -kl / 2,
            "overlap_reverse_kl": kl,
        },
        rel=1e-5,
    )


def test_sum_and_count_leaves_masked_values_out_even_when_they_are_not_finite():
    total, count = sum_and_count(torch.tensor([1.0, math.nan, 3.0]), torch.tensor([True, False, True]))
    assert (total.item(), count.item()) == (4, 2)
