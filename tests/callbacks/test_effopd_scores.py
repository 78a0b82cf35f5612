import math
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback
from toys import CopyEngine, LetterTask, adamw, make_data, make_module, make_trainer, weights_of

from opd_lightning import EffOPD
from opd_lightning.backends.hf import HFTeacher, LoraSettings
from opd_lightning.callbacks.effopd_scores import (
    TaskAccuracy,
    TeacherKL,
    TeacherKLOnFixedRollouts,
    TeacherKLOnNewRollouts,
    divergence_from_teacher,
)
from opd_lightning.interfaces import Score
from opd_lightning.methods.uni_opd_data import left_untrained
from opd_lightning.rollouts.batching import collate
from opd_lightning.rollouts.on_policy import OnPolicy
from opd_lightning.teachers import PrivilegedTeacher

SCORES = {
    "accuracy": lambda: TaskAccuracy(num_prompts=4, num_samples=2),
    "fresh": lambda: TeacherKL(num_prompts=4),
    "fixed": lambda: TeacherKLOnFixedRollouts(),
}


def fit(folder, student, teacher, score, *, steps=4, data=None, ckpt_path=None, lora=False, **options):
    torch.manual_seed(0)
    student_options = {"lora": LoraSettings(r=4)} if lora else {}
    module = make_module(student, teacher, optimizer=adamw, student_options=student_options)
    callbacks = options.pop("callbacks", [])
    effopd = EffOPD(score=score, **({"schedule": "powers_of_two", "candidates": (0.5, 1.0)} | options))
    trainer = make_trainer(folder, steps, callbacks=[effopd, *callbacks])
    trainer.fit(module, data if data is not None else make_data(), ckpt_path=ckpt_path)
    return module, effopd, trainer


class Spy(Score):
    """Keeps what a score said."""

    def __init__(self, inner):
        self.inner, self.values = inner, []

    def __call__(self, trainer, module):
        self.values.append(self.inner(trainer, module))
        return self.values[-1]


@pytest.mark.parametrize("name", SCORES)
def test_every_score_drives_a_search_and_the_rollouts_stay_on_policy(
    tmp_path, tiny_qwen3_folder, tiny_teacher_folder, name
):
    spy, seen = Spy(SCORES[name]()), []

    class Recorder(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append((batch, weights_of(pl_module), pl_module.weight_version))

    data = make_data(engine=CopyEngine())  # a copy that is stale, or a candidate's, would show
    module, effopd, _ = fit(
        tmp_path, tiny_qwen3_folder, tiny_teacher_folder, spy, data=data, schedule=1, callbacks=[Recorder()]
    )
    assert len(spy.values) >= 8  # four searches: where they stand, and at least one candidate each
    assert effopd.last_search.step == 4
    versions = [version for _, _, version in seen]
    assert [batch.weight_version for batch, _, _ in seen] == versions
    assert all(later >= earlier + 2 for earlier, later in pairwise(versions))  # the step, and every edit by a search
    for batch, weights, _ in seen:
        module.student.load_state_dict(weights, strict=False)
        micro_batch = collate(batch.rollouts, 0)
        logits = module.spec.head(module.student)(module.spec.hidden_states(module.student, micro_batch))
        log_probs = logits.log_softmax(-1).gather(-1, micro_batch.tokens.ids[:, None]).squeeze(-1)
        torch.testing.assert_close(log_probs, micro_batch.tokens.rollout_log_probs, rtol=1e-4, atol=1e-4)


def test_teacher_kl_is_the_reverse_kl_per_token_against_a_full_forward(
    tmp_path, tiny_qwen3_folder, tiny_teacher_folder
):
    module, _, _ = fit(tmp_path, tiny_qwen3_folder, tiny_teacher_folder, TeacherKLOnFixedRollouts(), steps=1)
    module.teacher.setup(module.spec, module.student, torch.device("cpu"))
    with torch.no_grad():
        total, count = divergence_from_teacher(module, module.last_rollouts)
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(tiny_teacher_folder, dtype=torch.float64)
    student = AutoModelForCausalLM.from_pretrained(tiny_qwen3_folder, dtype=torch.float64)
    student.load_state_dict({name: weight.double() for name, weight in module.student.state_dict().items()})
    vocab_size, expected, num_tokens = module.spec.tokenizer.vocab_size, 0.0, 0
    with torch.no_grad():
        for rollout in module.last_rollouts:
            ids = torch.cat([rollout.prompt_ids, rollout.response_ids])[None]
            at = slice(len(rollout.prompt_ids) - 1, -1)
            p = student(ids).logits[0, at, :vocab_size].log_softmax(-1)
            q = teacher(ids).logits[0, at, :vocab_size].log_softmax(-1)
            expected += float((p.exp() * (p - q)).sum())
            num_tokens += len(rollout.response_ids)
    assert count == num_tokens
    assert total == pytest.approx(expected, rel=1e-4)


class Whispers(PrivilegedTeacher):
    """Is told how many answers a prompt has, and remembers what it was told."""

    def __init__(self, path):
        super().__init__(HFTeacher(str(path)), "{hint} {question}", missing="plain")
        self.told = []

    def check_problems(self, problems):
        pass

    def shape(self, groups):
        return [[replace(each, context={"hint": str(len(group))}) for each in group] for group in groups]

    def with_context(self, batch):
        self.told += [rollout.context.get("hint") for rollout in batch.rollouts]
        return super().with_context(batch)


class LeavesTheFirstOut(OnPolicy):
    def share(self, asked, graded, seed):
        return replace(graded, rollouts=[left_untrained(graded.rollouts[0]), *graded.rollouts[1:]])


def test_scores_show_the_teacher_what_training_shows_it(tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    teacher, told = Whispers(tiny_teacher_folder), {}

    class Noted(EffOPD):
        def on_train_batch_end(self, *args):
            teacher.told.clear()
            super().on_train_batch_end(*args)
            told[self.name] = set(teacher.told)

    scores = {"fixed": TeacherKLOnFixedRollouts(1), "fresh": TeacherKL(2, 3), "new": TeacherKLOnNewRollouts(2, 4)}
    searches = [Noted(score, candidates=(0.5,), name=name) for name, score in scores.items()]
    module = make_module(tiny_qwen3_folder, tiny_teacher_folder, teacher_object=teacher)
    make_trainer(tmp_path, 1, callbacks=searches).fit(module, make_data(source=LeavesTheFirstOut()))
    assert all(math.isfinite(search.last_search.baseline) for search in searches)
    assert told == {"fixed": {"2"}, "fresh": {"3"}, "new": {"4"}}  # as many as there are of a prompt; None is nothing


def test_candidates_are_compared_on_common_random_numbers(tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    class Twice(Score):
        def __init__(self):
            self.inner, self.pairs = TaskAccuracy(num_prompts=6), []

        def __call__(self, trainer, module):
            self.pairs.append((self.inner(trainer, module), self.inner(trainer, module)))
            return self.pairs[-1][0]

    score = Twice()
    fit(tmp_path, tiny_qwen3_folder, tiny_teacher_folder, score, steps=2)
    assert all(first == second for first, second in score.pairs)


def test_reserved_prompts_are_scored_on_and_never_trained_on(tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    score = TaskAccuracy(num_prompts=4)
    data = make_data(num_reserved=4)
    fit(tmp_path, tiny_qwen3_folder, tiny_teacher_folder, score, data=data)
    trained_on = {problem.uid for problem in data.stream.problems}
    assert len(score.uids) == 4
    assert len(trained_on) == 8
    assert trained_on.isdisjoint(score.uids)
    assert score.tokens > 0


@pytest.mark.parametrize("score", [TaskAccuracy, TeacherKL])
def test_too_many_prompts_are_refused_before_the_first_step(tmp_path, tiny_qwen3_folder, tiny_teacher_folder, score):
    data = make_data(engine=(engine := CopyEngine()))
    with pytest.raises(ValueError, match="50 prompts were asked for, but there are 12 training problems"):
        fit(tmp_path, tiny_qwen3_folder, tiny_teacher_folder, score(), data=data)
    assert engine.versions == []  # found before anything is generated, and so before anything is trained


@pytest.mark.parametrize("score", [TaskAccuracy, TeacherKL])
def test_impossible_sizes_are_refused(score):
    with pytest.raises(ValueError, match=f"{score.__name__}.num_prompts: expected an integer of at least 1, got 0"):
        score(num_prompts=0)


@pytest.fixture(scope="module")
def whole_weights(tmp_path_factory, tiny_qwen3_folder, tiny_teacher_folder):
    """Weights of runs without a stop, trained once each."""

    @cache
    def train(name, lora):
        folder = tmp_path_factory.mktemp("whole")
        module, _, _ = fit(folder, tiny_qwen3_folder, tiny_teacher_folder, SCORES[name](), steps=5, lora=lora)
        return weights_of(module)

    return train


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "lora"])
@pytest.mark.parametrize("stop", [pytest.param(2, marks=pytest.mark.slow), 3])  # at a trigger and between two
@pytest.mark.parametrize("name", SCORES)
def test_resume_with_a_search_equals_one_run(
    tmp_path, tiny_qwen3_folder, tiny_teacher_folder, whole_weights, name, stop, lora
):
    folders = tiny_qwen3_folder, tiny_teacher_folder
    _, _, trainer = fit(tmp_path, *folders, SCORES[name](), steps=stop, lora=lora)
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    resumed, _, _ = fit(tmp_path, *folders, SCORES[name](), steps=5, lora=lora, ckpt_path=tmp_path / "stop.ckpt")
    whole = whole_weights(name, lora)
    assert all(torch.equal(weight, whole[n]) for n, weight in weights_of(resumed).items())


def test_an_accuracy_that_is_0_everywhere_equals_plain_distillation(tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    class NeverRight(LetterTask):
        def grade(self, problem, response):
            return 0.0

    score = TaskAccuracy(num_prompts=4)
    searched, effopd, _ = fit(
        tmp_path, tiny_qwen3_folder, tiny_teacher_folder, score, data=make_data(task=NeverRight()), backward=(-0.5,)
    )
    assert effopd.last_search.tied
    module = make_module(tiny_qwen3_folder, tiny_teacher_folder, optimizer=adamw)
    torch.manual_seed(0)
    make_trainer(tmp_path, 4).fit(module, make_data(task=NeverRight()))
    assert all(torch.equal(weight, weights_of(module)[name]) for name, weight in weights_of(searched).items())


def test_a_rejected_search_equals_plain_distillation(tmp_path, tiny_qwen3_folder, tiny_teacher_folder):
    class NeverBetter(Score):
        def __init__(self):
            self.value = 0.0

        def __call__(self, trainer, module):
            self.value -= 1
            return self.value

    searched, _, _ = fit(tmp_path, tiny_qwen3_folder, tiny_teacher_folder, NeverBetter())
    module = make_module(tiny_qwen3_folder, tiny_teacher_folder, optimizer=adamw)
    torch.manual_seed(0)
    make_trainer(tmp_path, 4).fit(module, make_data(task=LetterTask()))
    assert all(torch.equal(weight, weights_of(module)[name]) for name, weight in weights_of(searched).items())
