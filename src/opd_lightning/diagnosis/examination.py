"""`diagnose`: every measurement of a pair, one after the other.

Trains nothing. One process, one device; a function of the weights, the problems and the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from opd_lightning.diagnosis.alignment import NUM_CANDIDATES, Forcing, Node, draw_positions, measure_alignment
from opd_lightning.diagnosis.continuations import compare_answers, continue_answers, depths_of
from opd_lightning.diagnosis.coverage import cells_of, cover
from opd_lightning.diagnosis.estimates import answer_facts
from opd_lightning.diagnosis.gradients import losses_to_compare, measure_gradients
from opd_lightning.diagnosis.measurements import (
    Alignment,
    AnswerFacts,
    Continuation,
    Diagnosis,
    Gradients,
    RenderedPrompt,
)
from opd_lightning.diagnosis.pair import Pair
from opd_lightning.diagnosis.prompt_rows import prompt_rows
from opd_lightning.diagnosis.quantization import LoadWhole, measure_quantization
from opd_lightning.diagnosis.template_choice import REFERENCE, PromptTemplate, compare_templates, template_numbers
from opd_lightning.diagnosis.templates import find_differences, render_both
from opd_lightning.diagnosis.tokens import facts_by_position, mean_facts, reward_auroc
from opd_lightning.interfaces import Problem, Prompt, Rollout, TrainedRollout
from opd_lightning.rollouts.answering import render_prompts

Say = Callable[[str], None]


def diagnose(
    pair: Pair,
    problems: Sequence[Problem],
    *,
    num_samples: int = 4,
    num_bins: int = 8,
    num_gradient_rollouts: int = 32,
    num_alignment_nodes: int = 0,
    num_cells: int = 0,
    templates: Sequence[PromptTemplate] = (),
    load_whole: LoadWhole | None = None,
    say: Say = lambda words: None,
) -> Diagnosis:
    """Measure a pair on some problems.

    Args:
        pair: Loaded here, and let go of afterwards.
        problems: At least one.
        num_samples: Answers per problem.
        num_bins: Bins of response position.
        num_gradient_rollouts: Answers, one of each problem, whose gradients are taken.
        num_alignment_nodes: Answers, one of each problem, at one token of which the gradient is compared with that of
            the expected reward; 0 leaves this out.
        num_cells: Cells of states that prompts are to cover; 0 leaves this out.
        templates: Other ways of putting the same problems, to compare with the run's own.
        load_whole: Of a quantised teacher, to compare it with itself in full on an answer to each problem; None leaves
            this out.
        say: Told what is done next.
    """
    seed_parts = (pair.seed, "diagnose")
    places = range(len(problems))
    prompts = render_prompts(pair.student.tokenizer, problems, places, num_samples=num_samples, seed_parts=seed_parts)
    with pair.loaded():
        say(f"the student answers {len(problems)} prompts, {num_samples} times each")
        groups = pair.answer(prompts)
        rollouts = pair.shape([rollout for group in groups for rollout in group], num_samples)
        say("student and teacher are compared on every token")
        compared = pair.compare(rollouts)
        teacher = _TeacherAnswers(pair, prompts, groups, say)
        gradients = _gradients(pair, rollouts[::num_samples][:num_gradient_rollouts], say)
        aligned = _alignment(pair, compared[::num_samples][:num_alignment_nodes], say)
        covers = _cover(pair, groups, num_cells, say) if num_cells else [{} for _ in groups]
        shown = prompt_rows(groups, compared, teacher.answers, draws_as_compared=pair.draws_as_compared)
        rows = [row | extra for row, extra in zip(shown, covers, strict=True)]
        example = pair.student.tokenizer.decode(prompts[0].token_ids, skip_special_tokens=False)
        own = template_numbers(REFERENCE, {}, example, rows)
        found = compare_templates(pair, own, templates, num_samples, say) if templates else ()
        quantization = None
        if load_whole is not None:
            say("the quantised teacher is compared with itself in full")
            quantization = measure_quantization(pair, load_whole, rollouts[::num_samples])
    auroc, num_right = reward_auroc(compared)
    vocab_size = pair.student.tokenizer.vocab_size
    return Diagnosis(
        settings={},
        num_prompts=len(problems),
        num_rollouts=len(rollouts),
        num_tokens=sum(len(each.losses) for each in compared),
        vocab_size=vocab_size,
        k=min(pair.k, vocab_size),
        facts=mean_facts(compared),
        student=answer_facts(groups),
        teacher=teacher.facts,
        teacher_own_template=teacher.own_template,
        reward_auroc=auroc,
        num_right=num_right,
        positions=facts_by_position(compared, num_bins),
        continuations=teacher.continuations,
        gradients=gradients,
        prompt=teacher.prompt,
        findings=teacher.findings,
        left_out=(
            *_left_out(pair, problems, is_speechless=teacher.facts is None),
            *([quantization] if isinstance(quantization, str) else []),
        ),
        prompts=tuple(rows),
        templates=found,
        alignment=aligned,
        quantization=None if isinstance(quantization, str) else quantization,
    )


class _TeacherAnswers:
    """What the teacher says itself: to the same prompts, to its own rendering of them, and after the student's words.

    Attributes:
        prompt: One prompt as both sides render it.
        findings: Of tokenizers and templates.
        answers: To the student's prompts, marked; None where this process cannot run it.
        facts: What they say.
        own_template: Its answers to its own; None where they are the same.
        continuations: By depth.
    """

    def __init__(self, pair: Pair, prompts: Sequence[Prompt], groups: Sequence[Sequence[Rollout]], say: Say) -> None:
        own, speaker = pair.student.tokenizer, pair.speaker
        tokenizer = speaker[0].tokenizer if speaker is not None else None
        self.prompt: RenderedPrompt = render_both(own, tokenizer, prompts)
        self.findings = find_differences(own, tokenizer, self.prompt, len(prompts))
        self.answers: list[list[Rollout]] | None = None
        self.facts: AnswerFacts | None = None
        self.own_template: AnswerFacts | None = None
        self.continuations: tuple[Continuation, ...] = ()
        if speaker is None:
            return
        say("the teacher answers the same prompts")
        self.answers = answers = pair.answer_as_teacher(prompts)
        self.facts = answer_facts(answers)
        if self.prompt.num_different:
            say("the teacher answers as its own template asks")
            theirs = [replace(p, token_ids=tuple(speaker[0].tokenizer.render(p.problem.messages))) for p in prompts]
            self.own_template = answer_facts(pair.answer_as_teacher(theirs))
        if self.facts.accuracy is not None:
            self.continuations = (compare_answers(groups, answers), *_continuations(pair, groups, say))


def _continuations(pair: Pair, groups: Sequence[Sequence[Rollout]], say: Say) -> list[Continuation]:
    found = []
    for depth in depths_of([rollout for group in groups for rollout in group]):
        say(f"the teacher goes on after {depth} tokens of the student")
        found.append(
            continue_answers(
                groups,
                depth,
                pair.generate_as_teacher,
                task=pair.task,
                tokenizer=pair.student.tokenizer,
                sampling=pair.sampling,
                seed=pair.seed,
            )
        )
    return found


def _gradients(pair: Pair, rollouts: Sequence[Rollout], say: Say) -> Gradients:
    assert pair.model is not None, "the pair is loaded"
    losses = losses_to_compare(pair.objective, pair.teacher.offer, pair.student.tokenizer.vocab_size)
    say(f"gradients of {len(losses)} losses on {len(rollouts)} answers")
    with pair.precision():
        return measure_gradients(
            pair.student,
            pair.model,
            rollouts,
            losses,
            pair.teacher,
            pair.request,
            device=pair.device,
            max_tokens=pair.max_tokens,
            seed=pair.seed,
        )


def _alignment(pair: Pair, compared: Sequence[TrainedRollout], say: Say) -> Alignment | None:
    is_marked = all(pair.task.can_grade(each.rollout.problem) for each in compared)
    if not compared or not is_marked or not pair.teacher.offer.arbitrary_ids:
        return None
    say(f"the student goes on after each of {NUM_CANDIDATES} tokens, in {len(compared)} answers")
    positions = draw_positions(compared, pair.seed)
    at = [
        replace(each.rollout, student_wrote=torch.arange(len(each.rollout.response_ids)) == position)
        for each, position in zip(compared, positions, strict=True)
    ]
    known = zip(compared, positions, pair.candidates(at, NUM_CANDIDATES), strict=True)
    nodes = [Node(each.rollout, position, *candidates) for each, position, candidates in known]
    forcing = Forcing(pair.generate, pair.task, pair.student.tokenizer, pair.sampling, pair.seed)
    return measure_alignment(nodes, forcing)


def _cover(pair: Pair, groups: Sequence[Sequence[Rollout]], num_cells: int, say: Say) -> list[dict[str, float]]:
    """Each prompt's place in the order that covers the states fastest, and the coverage up to it."""
    if pair.speaker is None:
        raise ValueError(
            "coverage_cells: states are the teacher's, and this process cannot run it (an HFTeacher without offload"
            " can). Set coverage_cells: 0."
        )
    say(f"the teacher's states are cut into {num_cells} cells")
    states = [torch.cat(pair.teacher_states(group)) for group in groups]
    cells = torch.split(cells_of(torch.cat(states), num_cells, pair.seed), [len(each) for each in states])
    found: list[dict[str, float]] = [{} for _ in groups]
    for rank, (place, share) in enumerate(cover([set(each.tolist()) for each in cells]), start=1):
        found[place] = {"cover_rank": rank, "covered": share}
    return found


def _left_out(pair: Pair, problems: Sequence[Problem], *, is_speechless: bool) -> tuple[str, ...]:
    found = []
    if not all(map(pair.task.can_grade, problems)):
        some = "some problems without" if pair.task.is_graded else "no"
        found.append(f"Accuracies, gains and the AUROC of the reward: the task has {some} answers to mark.")
    if is_speechless:
        found.append(
            "The teacher's own answers and its continuations: this process cannot generate with"
            f" {type(pair.teacher).__name__} (an HFTeacher without offload can)."
        )
    if not pair.teacher.offer.full_vocabulary:
        found.append(f"What needs the teacher's whole vocabulary: it gives {pair.teacher.offer}.")
    return tuple(found)
