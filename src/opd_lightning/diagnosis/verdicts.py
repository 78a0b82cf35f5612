"""From numbers to words: pure functions whose thresholds are stated with the verdict, each with its source.

What they cannot see: whether a teacher of the same training pipeline will teach anything. In arXiv 2604.13016 (section
3.1) initial overlap and the AUROC of the reward are higher for pairs that fail than for pairs that succeed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opd_lightning.diagnosis.gradients import FULL, OWN, SAMPLED
from opd_lightning.diagnosis.measurements import Continuation, Diagnosis, Estimate, Gradients, LossGradient

LEAST_GAIN = 0.05
SAME_MODEL = 1e-3
LEAST_OVERLAP = 0.62
MOST_ENTROPY = 0.7
LEAST_MASS = 0.9
LEAST_MIXED = 0.1
MOST_TRUNCATED = 0.5
LEAST_COSINE = 0.99
MOST_VARIANCE = 1.1

GAIN_SOURCE = (
    "arXiv 2604.13016, Fig. 11: continuing student answers gained 0.152 at 8K tokens, where distillation still helped,"
    " and 0.024 at 16K, where it hurt; 0.05 lies between. Two standard errors are our choice."
)
OVERLAP_SOURCE = (
    "arXiv 2604.13016: the pair that needed a cold start begins at an overlap of 0.58 to 0.60, those that did not at"
    " 0.63 to 0.76 (read off curves, one seed each). Chance level k/V is taken off first, which changes nothing for"
    " large vocabularies. Entropy: a third party's replication diverged from 1.14 nats and was stable from 0.31; 0.7"
    " lies between. Mass: pairs of the paper have 0.97 to 0.99; 0.9 is our choice, and one pair of the zoo (docs,"
    " When distillation works) got two thirds of the way without a cold start at 0.70."
)
SAME_SOURCE = "Our choice: a teacher this close moves nothing (two loads of one model differ by rounding only)."
REINFORCEMENT_SOURCE = (
    "Our choice: group-relative methods learn from prompts with both right and wrong answers only; with fewer than a"
    " tenth of such prompts they see next to nothing either."
)
REVERSE_SOURCE = (
    "arXiv 2604.13016, reverse distillation: a student above its teacher fell back to about the teacher's level within"
    " 100 steps and stayed there. Two standard errors are our choice."
)
TRUNCATION_SOURCE = "Our choice: cut answers are marked wrong whatever they would have said."
LOSS_SOURCE = (
    "Our choice: a cosine of 0.99 is an angle of 8 degrees. arXiv 2604.13016 found k = 4, 16 and 64 and the sampled"
    " token within the noise of one seed, and k = 1 unstable."
)


@dataclass(frozen=True)
class Verdict:
    """One conclusion.

    Attributes:
        words: What to do or to know.
        because: The numbers behind it.
        rule: The thresholds they were held against.
        source: Where these come from.
    """

    words: str
    because: str
    rule: str
    source: str


def verdicts(numbers: Diagnosis) -> list[Verdict]:
    """What the numbers say, the most important first; at least one."""
    nothing_new = _nothing_new(numbers)
    cut = _many_answers_cut(numbers)
    if nothing_new is not None:
        return [each for each in (cut, nothing_new, _reinforcement(numbers)) if each is not None]
    cold, better = _cold_start(numbers), _is_better(numbers)
    headline = cold if cold is not None else _distil(numbers) if better else _undecided(numbers)
    return [each for each in (cut, headline, _noise_from(numbers)) if each is not None]


def noise_depth(continuations: Sequence[Continuation]) -> int | None:
    """The first depth from which on the teacher's gain is below `LEAST_GAIN`, after a shallower one that was not.

    None where no shallower gain is certain, or where the gain at that depth is not certainly below it (both by two
    standard errors).
    """
    ordered = sorted(continuations, key=lambda each: each.depth)
    for place, here in enumerate(ordered):
        useful = [each.gain for each in ordered[:place] if _is_gain(each.gain)]
        is_noise = all(each.gain.value < LEAST_GAIN for each in ordered[place:])
        if useful and is_noise and here.gain.upper < max(gain.value for gain in useful):
            return here.depth
    return None


def recommend_loss(gradients: Gradients, top_mass: float | None) -> Verdict:
    """Which loss, and which k, give the gradient of the exact one on this pair's own answers.

    Args:
        gradients: Of the losses.
        top_mass: Mean of `student_top_mass`, for the words only.
    """
    rule = f"Smallest k with a cosine of at least {LEAST_COSINE} and a variance of at most {MOST_VARIANCE} times."
    exact = next((each for each in gradients.losses if each.loss == FULL), None)
    if exact is None:
        words = (
            "Use the longest list that the teacher gives, with a tail bucket; it cannot be held against the exact loss"
        )
        return Verdict(words, "This teacher does not give its whole vocabulary.", rule, LOSS_SOURCE)
    if exact.norm == 0:
        return Verdict("No loss moves this pair", "The exact gradient is 0.", rule, LOSS_SOURCE)
    lists = [each for each in gradients.losses if each.k is not None and each.cosine is not None]
    good = [each for each in lists if _at_least(each.cosine, LEAST_COSINE) and _at_most(each.variance, MOST_VARIANCE)]
    words = "Use the full vocabulary, the default: it is exact, and this teacher gives it"
    best = min(good, key=lambda each: (each.k or 0, -(each.cosine or 0)), default=None)
    if best is not None:
        words += f". Where a list must do, k = {best.k} is enough ({best.loss})"
    else:
        words += ". No list of up to 64 tokens gives the same gradient here"
    shown = {each.loss: each for each in gradients.losses if each.loss in (OWN, SAMPLED) or each is best}
    because = "Beside the full vocabulary, " + "; ".join(_likeness(each) for each in shown.values())
    mass = "" if top_mass is None else f"; the student's top k hold {top_mass:.1%} of its mass"
    return Verdict(words, f"{because}{mass}.", rule, LOSS_SOURCE)


def overlap_above_chance(overlap: float, k: int, vocab_size: int) -> float:
    """Overlap ratio with that of two random lists taken off: 0 by chance, 1 for the same lists."""
    chance = k / vocab_size
    return (overlap - chance) / (1 - chance) if chance < 1 else overlap


# ------------------------------------------------------------------------------------------------------ single verdicts


def _nothing_new(numbers: Diagnosis) -> Verdict | None:
    words = "The teacher adds nothing new here"
    divergence = numbers.facts.get("reverse_kl")
    if divergence is not None and divergence < SAME_MODEL:
        rule = f"Reverse KL below {SAME_MODEL} nats per token."
        return Verdict(words, f"The reverse KL is {divergence:.2g} nats per token.", rule, SAME_SOURCE)
    if not numbers.continuations or _is_better(numbers):
        return None
    first = min(numbers.continuations, key=lambda each: each.depth)
    if first.gain.upper < 0:
        rule = (
            "Teacher's accuracy below the student's by more than two standard errors, and no depth at which it helps."
        )
        because = f"On the same prompts it has {_gain(first.gain)} against the student."
        return Verdict(f"{words}: it is worse, and would pull the student back", because, rule, REVERSE_SOURCE)
    if all(each.gain.upper < LEAST_GAIN for each in numbers.continuations):
        rule = f"At every depth, gain plus two standard errors below {LEAST_GAIN}."
        gains = "; ".join(f"after {each.depth} tokens {_gain(each.gain)}" for each in numbers.continuations)
        return Verdict(words, f"When it goes on for the student: {gains}.", rule, GAIN_SOURCE)
    return None


def _cold_start(numbers: Diagnosis) -> Verdict | None:
    reasons = []
    overlap = numbers.facts.get("overlap_ratio")
    if overlap is not None and numbers.k < numbers.vocab_size:
        above_chance = overlap_above_chance(overlap, numbers.k, numbers.vocab_size)
        if above_chance < LEAST_OVERLAP:
            reasons.append(
                f"the overlap of the top {numbers.k} is {above_chance:.2f} above chance ({overlap:.2f} as it is)"
            )
    entropy, mass = numbers.facts.get("student_entropy"), numbers.facts.get("overlap_mass_teacher")
    if entropy is not None and entropy > MOST_ENTROPY:
        reasons.append(f"the student's entropy is {entropy:.2f} nats per token")
    if mass is not None and mass < LEAST_MASS:
        reasons.append(f"the tokens that both consider hold only {mass:.1%} of the teacher's mass")
    rule = (
        f"One of: overlap above chance below {LEAST_OVERLAP}, student entropy above {MOST_ENTROPY} nats, teacher's"
        f" mass on the overlap below {LEAST_MASS}."
    )
    because = "; ".join(reasons).capitalize() + "."
    return Verdict("Cold start first", because, rule, OVERLAP_SOURCE) if reasons else None


def _distil(numbers: Diagnosis) -> Verdict:
    best = max(numbers.continuations, key=lambda each: each.gain.lower)
    where = f"after {best.depth} tokens of the student" if best.depth else "alone"
    rule = (
        f"At some depth a gain of at least {LEAST_GAIN} and above 0 by two standard errors; no reason for a cold start."
    )
    return Verdict("Distil", f"The teacher {where} has {_gain(best.gain)}.", rule, GAIN_SOURCE)


def _undecided(numbers: Diagnosis) -> Verdict:
    if not numbers.continuations:
        words = "The two fit together; whether the teacher is better cannot be known here"
        because = "Answers of the teacher could not be marked (see what was left out)."
        return Verdict(words, because, "No reason for a cold start.", OVERLAP_SOURCE)
    best = max(numbers.continuations, key=lambda each: each.gain.value)
    because = f"Its largest gain is {_gain(best.gain)}, after {best.depth} tokens."
    rule = f"Neither certainly above 0 and at least {LEAST_GAIN}, nor certainly below {LEAST_GAIN} at every depth."
    words = "Too few prompts to tell whether the teacher is better: raise --num_prompts"
    return Verdict(words, because, rule, GAIN_SOURCE)


def _noise_from(numbers: Diagnosis) -> Verdict | None:
    depth = noise_depth(numbers.continuations)
    if depth is None:
        return None
    gains = "; ".join(f"after {each.depth} tokens {_gain(each.gain)}" for each in numbers.continuations)
    rule = (
        f"From there on every gain is below {LEAST_GAIN}, and the first of them certainly below the best before it. On"
        " short answers it may also be that all is decided by then."
    )
    words = f"Beyond {depth} tokens it is noise: a data.horizon of so many tokens leaves the rest out"
    return Verdict(words, f"When the teacher goes on for the student: {gains}.", rule, GAIN_SOURCE)


def _reinforcement(numbers: Diagnosis) -> Verdict | None:
    mixed = numbers.student.mixed_prompts
    if mixed is None or mixed < LEAST_MIXED:
        return None
    rule = f"The teacher adds nothing, and at least {LEAST_MIXED:.0%} of the prompts have right and wrong answers."
    because = f"{mixed:.0%} of the prompts have both a right and a wrong answer of the student."
    return Verdict("Reinforcement learning would serve you better", because, rule, REINFORCEMENT_SOURCE)


def _many_answers_cut(numbers: Diagnosis) -> Verdict | None:
    rate = numbers.student.truncation_rate
    if rate < MOST_TRUNCATED:
        return None
    words = "Most answers are cut: raise data.sampling.max_new_tokens before you believe the rest"
    rule = f"Truncation rate of at least {MOST_TRUNCATED:.0%}."
    return Verdict(words, f"{rate:.0%} of the student's answers are.", rule, TRUNCATION_SOURCE)


def _is_better(numbers: Diagnosis) -> bool:
    return any(_is_gain(each.gain) for each in numbers.continuations)


def _is_gain(gain: Estimate) -> bool:
    return gain.lower > 0 and gain.value >= LEAST_GAIN


def _likeness(loss: LossGradient) -> str:
    if loss.cosine is None:
        return f"{loss.loss}: no gradient"
    variance = "" if loss.variance is None else f", variance {loss.variance:.2g} times"
    return f"{loss.loss}: cosine {loss.cosine:.3f}{variance}"


def _gain(gain: Estimate) -> str:
    error = "" if gain.error is None else f" ± {gain.error:.3f}"
    return f"a gain of {gain.value:+.3f}{error}"


def _at_least(value: float | None, bound: float) -> bool:
    return value is not None and value >= bound


def _at_most(value: float | None, bound: float) -> bool:
    return value is not None and value <= bound
