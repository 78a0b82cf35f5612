"""`TeacherMixed`: tokens drawn from a mixture of student and teacher, with the log-probabilities of what was drawn."""

import gc
from contextlib import nullcontext
from dataclasses import replace
from weakref import ref

import pytest
import torch

from opd_lightning.backends.hf import HFEngine, HFStudent, HFTeacher
from opd_lightning.interfaces import Problem, Prompt, Sampling, StepPrompts
from opd_lightning.rollouts.batching import collate
from opd_lightning.rollouts.plain_engine import PlainEngine
from opd_lightning.rollouts.teacher_mixed import TeacherMixed

SAMPLING = Sampling(max_new_tokens=9, temperature=0.8)
PROMPTS = [
    Prompt(Problem(uid, ({"role": "user", "content": uid},)), ids, seeds)
    for uid, ids, seeds in (("a", (3, 4, 5), (1, 2, 3)), ("b", (6, 7), (4, 5, 6)))
]
STEP = StepPrompts(0, (0, 1), tuple(PROMPTS))


class Live:
    weight_version = 2

    def __init__(self, student, teacher):
        self.spec, self.model = HFStudent(str(student)), HFStudent(str(student)).load()
        self.teacher = HFTeacher(str(teacher), dtype="float32")
        self.teacher.setup(self.spec, self.model, torch.device("cpu"))

    def autocast(self):
        return nullcontext()

    def announce(self, rollout, step):
        pass


@pytest.fixture(scope="module")
def live(tiny_qwen3_folder, tiny_teacher_folder):
    return Live(tiny_qwen3_folder, tiny_teacher_folder)


def roll_out(live, share, model=None):
    engine, source = HFEngine(max_batch_size=4), TeacherMixed(share)
    engine.setup(live.spec, torch.device("cpu"))
    source.setup(engine)
    if model is None:
        return source.rollouts(STEP, SAMPLING, live)
    engine.sync(model, 0)
    return engine.generate(PROMPTS, SAMPLING)


def log_probs_of(spec, model, batch):
    logits = spec.head(model)(spec.hidden_states(model, batch)) / SAMPLING.temperature
    return logits.double().log_softmax(-1).gather(-1, batch.tokens.ids[:, None]).squeeze(-1)


@torch.no_grad()
def test_log_probs_are_those_of_the_mixture_that_was_drawn_from(live):
    batch = roll_out(live, 0.3)
    assert batch.staleness is None
    joined = collate(batch.rollouts, live.spec.tokenizer.pad_id)
    spec, teacher = live.teacher.as_student()
    log_p, log_q = (log_probs_of(*each, joined) for each in ((live.spec, live.model.eval()), (spec, teacher)))
    expected = (0.7 * log_p.exp() + 0.3 * log_q.exp()).log()
    torch.testing.assert_close(joined.tokens.rollout_log_probs.double(), expected, atol=1e-4, rtol=0)
    own = joined.tokens.extras["student_log_prob"]
    torch.testing.assert_close(own.double(), log_p, atol=1e-4, rtol=0)
    assert (joined.tokens.rollout_log_probs - own).abs().max() > 0.01


def test_the_ends_are_the_student_alone_and_the_teacher_alone(live):
    for share, model in ((0.0, live.model), (1.0, live.teacher.as_student()[1])):
        batch, alone = roll_out(live, share), roll_out(live, 0.0, model)
        assert [each.response_ids.tolist() for each in batch.rollouts] == [each.response_ids.tolist() for each in alone]
        for mine, other in zip(batch.rollouts, alone, strict=True):
            torch.testing.assert_close(mine.log_probs, other.log_probs, atol=1e-5, rtol=0)
    assert TeacherMixed(0.0).staleness == 0 and roll_out(live, 0.0).rollouts[0].extras == {}


def test_outside_of_training_the_student_answers_alone(live):
    engine, source = HFEngine(), TeacherMixed(0.5)
    engine.setup(live.spec, torch.device("cpu"))
    source.setup(engine)
    mixed = source.rollouts(STEP, SAMPLING, live).rollouts
    after = engine.generate(PROMPTS, SAMPLING)
    assert after[0].extras == {} and mixed[0].extras
    assert [each.response_ids.tolist() for each in after] == [
        each.response_ids.tolist() for each in roll_out(live, 0.0).rollouts
    ]


def test_a_closed_source_holds_no_weights_of_the_teacher(tiny_qwen3_folder, tiny_teacher_folder):
    live = Live(tiny_qwen3_folder, tiny_teacher_folder)
    engine, source = HFEngine(), TeacherMixed(0.5)
    engine.setup(live.spec, torch.device("cpu"))
    source.setup(engine)
    source.rollouts(StepPrompts(0, (0,), (replace(PROMPTS[0], seeds=(1,)),)), Sampling(max_new_tokens=1), live)
    weights = ref(live.teacher.as_student()[1])
    live.teacher.close()
    source.close()
    gc.collect()
    assert weights() is None


def test_mistakes(live):
    with pytest.raises(ValueError, match=r"source\.teacher_share: expected a number in \[0, 1\], got 2\.0"):
        TeacherMixed(2.0)
    with pytest.raises(ValueError, match=r"data\.engine: TeacherMixed .* and PlainEngine draws.* Use HFEngine"):
        TeacherMixed().setup(PlainEngine())
    with pytest.raises(ValueError, match=r"data\.sampling\.temperature: .*got 0\. Set it to 1"):
        TeacherMixed().admit([], live.spec.tokenizer, Sampling(temperature=0), 1)
    TeacherMixed(0.0).setup(PlainEngine())
    live.teacher.offload = True
    with pytest.raises(ValueError, match=r"data\.source: TeacherMixed needs a teacher .*got HFTeacher\. Use an HF"):
        roll_out(live, 0.5)
    live.teacher.offload = False
