import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import forward_kl, make_case, reverse_kl, top_sets

from opd_lightning.interfaces import ScoreRequest
from opd_lightning.objectives import DenseScores, known_facts, token_facts
from opd_lightning.objectives.facts import overlap_facts

FULL = ScoreRequest(full_vocabulary=True)
STUDENT = {"student_entropy", "student_top_mass", "rollout_mismatch", "rollout_kl"}
ALWAYS = STUDENT | {"sampled_log_ratio"}
OVERLAP = {"overlap_ratio", "overlap_mass_student", "overlap_mass_teacher", "overlap_advantage", "overlap_reverse_kl"}
OVERLAP |= {"teacher_mass_above"}
VOCABULARY = {"reverse_kl", "forward_kl", "teacher_entropy", "entropy_gap"}


def facts_of(case, asked=FULL, k=4):
    return token_facts(case.p.log(), case.scores(), case.tokens, asked, k)


def assert_same_facts(actual, expected):
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(actual[name], values, rtol=1e-5, atol=1e-5, equal_nan=True)


def expected_facts(case, k):
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
            "teacher_mass_above": q[q > q[y]].sum() if int(y) in t else torch.tensor(1.0),
            "overlap_advantage": torch.tensor(math.nan),
            "overlap_reverse_kl": torch.tensor(math.nan),
        }
        if overlap:
            p_in, q_in = p[overlap] / p[overlap].sum(), q[overlap] / q[overlap].sum()
            values["overlap_advantage"] = (p_in * (q_in.log() - p_in.log())).mean()
            values["overlap_reverse_kl"] = reverse_kl(p_in, q_in)
        for name, value in values.items():
            columns.setdefault(name, []).append(value.item())
    return {name: torch.tensor(column) for name, column in columns.items()}


@given(st.integers(0, 10_000), st.integers(1, 12), st.floats(0.3, 4))
@settings(max_examples=30)
def test_every_fact_is_its_definition_and_nan_where_it_has_none(seed, k, spread):
    case = make_case(seed, n=6, spread=spread)
    facts = facts_of(case, k=k)
    assert_same_facts({name: facts[name] for name in expected_facts(case, k)}, expected_facts(case, k))
    assert facts.keys() == expected_facts(case, k).keys()


def test_what_the_engine_does_not_know_is_not_compared():
    case = make_case()
    known = facts_of(case)
    case.rollout_log_probs[[1, 3]] = math.nan
    for name, values in facts_of(case).items():
        about_rollouts = name in ("rollout_mismatch", "rollout_kl")
        missing = torch.tensor([False, about_rollouts, False, about_rollouts])
        torch.testing.assert_close(values, known[name].masked_fill(missing, math.nan), equal_nan=True)


@given(st.integers(0, 10_000), st.integers(1, 9))
def test_overlap_advantage_is_minus_the_kl_over_the_overlap_size(seed, k):
    case = make_case(seed, n=1)
    facts = facts_of(case, k=k)
    size = facts["overlap_ratio"] * k
    expected = -facts["overlap_reverse_kl"] / size.clamp(min=1)
    torch.testing.assert_close(facts["overlap_advantage"], expected, atol=1e-6, rtol=1e-5, equal_nan=True)
    assert facts["overlap_advantage"].isnan() == (size == 0)


def test_positions_without_overlap_have_masses_of_0_but_no_advantage():
    case = make_case()
    case.teacher_logits[:3] = -case.logits[:3]
    case.teacher_logits[3] = case.logits[3]
    facts = facts_of(case, k=3)
    assert facts["overlap_ratio"].tolist() == [0, 0, 0, 1]
    for name in ("overlap_mass_student", "overlap_mass_teacher"):
        assert facts[name][:3].tolist() == [0, 0, 0]
        assert facts[name][3] > 0
    for name in ("overlap_advantage", "overlap_reverse_kl"):
        assert facts[name].isnan().tolist() == [True, True, True, False]


def test_an_agreeing_student_has_no_divergence_and_full_overlap():
    facts = facts_of(make_case().agreeing())
    for name in ("reverse_kl", "forward_kl", "entropy_gap", "overlap_advantage", "sampled_log_ratio", "rollout_kl"):
        torch.testing.assert_close(facts[name], torch.zeros(4), atol=1e-7, rtol=0)
    assert facts["overlap_ratio"].tolist() == [1] * 4


class OnlyTopK(DenseScores):
    """A teacher that gives the sampled token and its own k likeliest."""

    knows_full = False

    def at(self, token_ids):
        assert token_ids.shape[-1] == 1, "asked for ids that this teacher was not asked to score"
        return self._log_probs.gather(-1, token_ids)

    def topk(self, k):
        log_probs, ids = self._log_probs.topk(min(k, self._log_probs.shape[-1]))
        return ids, log_probs

    def full(self):
        raise AssertionError("asked for the whole vocabulary")


class OnlySampled(OnlyTopK):
    def topk(self, k):
        raise AssertionError("asked for the top k")


@pytest.mark.parametrize(
    ("teacher", "asked", "names"),
    [
        (DenseScores, FULL, ALWAYS | OVERLAP | VOCABULARY),
        (OnlyTopK, ScoreRequest(top_k=16), ALWAYS | OVERLAP),
        (OnlyTopK, ScoreRequest(top_k=4), ALWAYS | OVERLAP),
        (OnlyTopK, ScoreRequest(top_k=3), ALWAYS),
        (OnlySampled, ScoreRequest(), ALWAYS),
        (OnlySampled, ScoreRequest(arbitrary_ids=True), ALWAYS),
    ],
)
def test_only_what_the_teacher_answers_is_reported_and_it_is_exact(teacher, asked, names):
    case = make_case()
    facts = token_facts(case.p.log(), teacher(case.q.log(), case.response_ids), case.tokens, asked, 4)
    assert set(facts) == names
    whole = facts_of(case)
    assert_same_facts(facts, {name: whole[name] for name in names})


def test_without_a_teacher_the_student_is_still_known():
    case = make_case()
    facts = token_facts(case.p.log(), None, case.tokens, None, 4)
    assert set(facts) == STUDENT
    whole = facts_of(case)
    assert_same_facts(facts, {name: whole[name] for name in STUDENT})


@pytest.mark.parametrize("k", [1, 4, 9, 16])
@pytest.mark.parametrize("full_vocabulary", [False, True])
@pytest.mark.parametrize("arbitrary_ids", [False, True])
@pytest.mark.parametrize("top_k", [0, 3, 4, 9, 16])
def test_known_facts_are_exactly_those_given(top_k, arbitrary_ids, full_vocabulary, k):
    case = make_case()  # of 9 tokens, which cuts lists of 16
    asked = ScoreRequest(top_k, arbitrary_ids, full_vocabulary)
    assert set(known_facts(asked, k)) == facts_of(case, asked, k).keys()
    assert set(known_facts(None, k)) == token_facts(case.p.log(), None, case.tokens, None, k).keys()
    assert known_facts(asked, 0) == ()


def test_k_is_clipped_to_the_vocabulary():
    case = make_case()
    facts = facts_of(case, ScoreRequest(top_k=16), k=16)
    assert facts["overlap_ratio"].tolist() == [1] * 4
    torch.testing.assert_close(facts["student_top_mass"], torch.ones(4))
    torch.testing.assert_close(facts["overlap_reverse_kl"], reverse_kl(case.p, case.q).float())


@given(st.integers(0, 1000), st.integers(1, 7))
@settings(max_examples=20)
def test_facts_of_parts_are_those_of_the_whole(seed, cut):
    case = make_case(seed, n=8)
    parts = [
        token_facts(case.p.log()[rows], case.scores().slice(rows.start, rows.stop), case.tokens[rows], FULL, 4)
        for rows in (slice(0, cut), slice(cut, 8))
    ]
    assert_same_facts({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, facts_of(case))


def test_no_tokens_have_no_facts():
    facts = facts_of(make_case(n=0))
    assert set(facts) == ALWAYS | OVERLAP | VOCABULARY
    assert all(values.shape == (0,) for values in facts.values())


def test_tokens_that_a_model_excludes_keep_the_facts_finite():
    case = make_case()
    case.teacher_logits[:, [0, 1]] = -math.inf
    case.logits[:, [1, 2]] = -math.inf
    case.rollout_log_probs = torch.full((4,), -1.0, dtype=torch.float64)
    facts = facts_of(case)
    assert (facts["overlap_ratio"] > 0).all()
    assert all(values.isfinite().all() for values in facts.values())


def test_facts_are_detached_float32():
    case = make_case()
    for values in token_facts(case.p.log().requires_grad_(), case.scores(), case.tokens, FULL, 4).values():
        assert values.dtype == torch.float32
        assert not values.requires_grad


def test_overlap_facts_of_a_worked_example():
    student_ids, teacher_ids = torch.tensor([[0, 1, 2]]), torch.tensor([[1, 5, 0]])
    student = torch.tensor([[0.5, 0.25, 0.1]]).log()
    teacher = torch.tensor([[0.6, 0.2, 0.1]]).log()
    result = {name: fact.item() for name, fact in overlap_facts(student_ids, student, teacher_ids, teacher).items()}
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


def test_tokens_outside_of_the_teachers_nucleus_are_those_with_as_much_mass_above():
    case = make_case(n=40, vocabulary=9)
    above = facts_of(case, k=9)["teacher_mass_above"]
    for row, (q, y) in enumerate(zip(case.q, case.response_ids.tolist(), strict=True)):
        for mass in (0.3, 0.6, 0.95):
            nucleus, total = set(), 0.0
            for token in q.argsort(descending=True).tolist():
                if total >= mass:
                    break
                nucleus.add(token)
                total += float(q[token])
            assert (y in nucleus) == bool(above[row] < mass)
    short = facts_of(case, k=2)["teacher_mass_above"]
    in_list = (case.q.topk(2).indices == case.response_ids[:, None]).any(-1)
    assert (short[in_list] < 0.95).all() and (short[~in_list] == 1).all()
