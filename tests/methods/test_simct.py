"""SimCT (arXiv 2605.07711): reverse KL on shared tokens and on the shortest text that both tokenizers can end on."""

import random

import pytest
import torch
from conftest import CHAT_TEMPLATE, make_model, save_folder
from objective_cases import gradient, make_case, make_tokens

from opd_lightning.backends.hf import CrossTokenizerTeacher, HFStudent, HFTeacher
from opd_lightning.backends.hf.reading import Unreadable
from opd_lightning.interfaces import LinearHead, Problem, Rollout, ScoreRequest
from opd_lightning.methods import SimCT
from opd_lightning.methods.simct import partition
from opd_lightning.objectives import DivergenceObjective, HiddenScores, JointScores, compare_in_chunks
from opd_lightning.objectives.joint_scores import SharedTokens, Units
from opd_lightning.rollouts.batching import collate

CPU = torch.device("cpu")
FORMS = ["log_probs", "logits"]

# ---------------------------------------------------------------------------------------------------------- partitions


def cut(raw, generator):
    ends = [*sorted(generator.sample(range(1, len(raw)), generator.randint(0, len(raw) - 1))), len(raw)]
    return [raw[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def test_cells_put_together_are_the_text_and_have_no_common_boundary_inside():
    generator = random.Random(0)
    for _ in range(200):
        raw = generator.randbytes(generator.randint(1, 12))
        student, teacher = cut(raw, generator), cut(raw, generator)
        cells = partition(student, teacher)
        texts, i, j = [], 0, 0
        for own, other in cells:
            assert own >= 1 and other >= 1
            left, right = student[i : i + own], teacher[j : j + other]
            assert b"".join(left) == b"".join(right)
            inner = [{sum(map(len, pieces[:n])) for n in range(1, len(pieces))} for pieces in (left, right)]
            assert not inner[0] & inner[1]
            texts, i, j = [*texts, b"".join(left)], i + own, j + other
        assert b"".join(texts) == raw and i == len(student) and j == len(teacher)


def test_what_is_behind_the_last_common_boundary_is_in_no_cell_and_other_text_is_refused():
    assert partition([b"ab", b"c", b"de"], [b"a", b"b", b"c", b"d"]) == [(1, 2), (1, 1)]
    assert partition([], []) == []
    with pytest.raises(ValueError, match=r"byte 1 is b'b' on one side and b'x' on the other"):
        partition([b"ab"], [b"a", b"x"])


# --------------------------------------------------------------------------------------------------------------- losses


class Example:
    """Six student tokens over 7, in float64: a shared one, a unit of 2 against 3, one of 2 against 1, and a rest."""

    own, other = 7, 5
    lengths, rows = [1, 2, 2], [1, 3, 1]  # the last student token is in no unit

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.logits = 2 * torch.randn(6, self.own, generator=generator, dtype=torch.float64)
        self.hidden = 2 * torch.randn(5, self.other, generator=generator, dtype=torch.float64)
        self.shared = SharedTokens(torch.tensor([1, 3, 4]), torch.tensor([2, 0, 3]))
        self.ids = torch.tensor([3, 5, 6, 2, 1, 0])
        self.teacher_ids = torch.tensor([0, 1, 4, 1, 2])
        self.units = Units(
            num_tokens=torch.tensor([1, 2, 0, 2, 0, 0]),
            first_row=torch.tensor([0, 1, 0, 4, 0, 0]),
            num_rows=torch.tensor([1, 3, 0, 1, 0, 0]),
            column=torch.tensor([1, -1, -1, -1, -1, -1]),
            joined=torch.tensor([False, False, True, False, True, False]),
        )

    def scores(self):
        head = LinearHead(torch.eye(self.other, dtype=torch.float64), None, self.other)
        return JointScores(self.ids, HiddenScores(self.hidden, self.teacher_ids, head), self.units, self.shared)

    def losses(self, averaged, logits, **settings):
        tokens = make_tokens(self.ids, torch.zeros(6))
        return SimCT(averaged, **settings).token_losses(logits, self.scores(), tokens)

    def obvious(self, averaged, logits):
        """The formula, unit by unit, everything differentiated."""

        def read(logits):
            return logits.log_softmax(-1) if averaged == "log_probs" else logits

        p, q, losses = read(logits), read(self.hidden), []
        i = j = 0
        for own, other in zip(self.lengths, self.rows, strict=True):
            student, teacher = p[i, self.shared.student_ids], q[j, self.shared.teacher_ids]
            if int(self.units.column[i]) < 0:
                mine = torch.stack([p[i + n, self.ids[i + n]] for n in range(own)]).mean()
                theirs = torch.stack([q[j + n, self.teacher_ids[j + n]] for n in range(other)]).mean()
                student, teacher = torch.cat([student, mine[None]]), torch.cat([teacher, theirs[None]])
            student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
            losses.append((student.exp() * (student - teacher)).sum())
            i, j = i + own, j + other
        return torch.stack(losses)


@pytest.mark.parametrize("averaged", FORMS)
@pytest.mark.parametrize("seed", range(3))
def test_losses_and_gradient_are_those_of_the_formula(seed, averaged):
    example = Example(seed)
    found = example.losses(averaged, example.logits)
    torch.testing.assert_close(found[[0, 1, 3]], example.obvious(averaged, example.logits))
    assert found[[2, 4, 5]].tolist() == [0, 0, 0]
    expected = gradient(lambda logits: example.obvious(averaged, logits), example.logits)
    assert expected[2].abs().sum() > 0  # a further token of a unit
    torch.testing.assert_close(gradient(lambda logits: example.losses(averaged, logits), example.logits), expected)


@pytest.mark.parametrize("averaged", FORMS)
def test_units_that_the_teacher_gives_little_mass_are_left_out(averaged):
    example = Example()
    q = example.hidden.log_softmax(-1)
    shared = q[:, example.shared.teacher_ids].exp().sum(-1)
    ids = example.teacher_ids
    of_unit = torch.stack([q[1:4].gather(-1, ids[1:4, None]).mean().exp(), q[4, ids[4]].exp()])
    masses = torch.stack([shared[0], shared[1] + of_unit[0], shared[4] + of_unit[1]])
    least = float(masses.sort().values[:2].mean())  # one of the three goes
    kept = masses >= least
    found = example.losses(averaged, example.logits, least_teacher_mass=least)
    torch.testing.assert_close(found[[0, 1, 3]], example.obvious(averaged, example.logits) * kept)
    expected = gradient(lambda logits: example.obvious(averaged, logits) * kept, example.logits)
    got = gradient(lambda logits: example.losses(averaged, logits, least_teacher_mass=least), example.logits)
    torch.testing.assert_close(got, expected)
    assert int(kept.sum()) == 2 and torch.equal(
        example.losses(averaged, example.logits, least_teacher_mass=1e-9), example.losses(averaged, example.logits)
    )


@pytest.mark.parametrize("averaged", FORMS)
def test_one_tokenizer_for_both_is_the_reverse_kl_of_the_whole_vocabulary(averaged):
    case = make_case()
    n, size = case.logits.shape
    everything, nothing = SharedTokens(*2 * (torch.arange(size),)), torch.zeros(n, dtype=torch.int64)
    units = Units(nothing + 1, torch.arange(n), nothing + 1, case.response_ids, nothing > 0)
    head = LinearHead(torch.eye(size, dtype=torch.float64), None, size)
    teacher = JointScores(
        case.response_ids, HiddenScores(case.teacher_logits, case.response_ids, head), units, everything
    )

    def losses(logits):
        return SimCT(averaged).token_losses(logits, teacher, case.tokens)

    torch.testing.assert_close(losses(case.logits), case.losses(DivergenceObjective()))
    torch.testing.assert_close(gradient(losses, case.logits), case.gradient(DivergenceObjective()))
    torch.testing.assert_close(teacher.sampled().double(), case.scores().sampled(), atol=1e-6, rtol=0)
    equal = gradient(losses, case.teacher_logits)
    torch.testing.assert_close(equal, torch.zeros_like(equal), atol=1e-12, rtol=0)


def test_a_text_without_units_costs_nothing_and_tokens_inside_one_have_no_score_of_their_own():
    example = Example()
    assert example.scores().sampled().isnan().tolist() == [False, True, True, True, True, True]
    tail = example.scores().slice(4, 6)
    losses = SimCT().token_losses(example.logits[4:], tail, make_tokens(example.ids[4:], torch.zeros(2)))
    assert losses.tolist() == [0, 0]
    none = example.scores().slice(0, 0)
    assert SimCT().token_losses(example.logits[:0], none, make_tokens(example.ids[:0], torch.zeros(0))).shape == (0,)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_chunks_end_between_units(size):
    example = Example()
    head = LinearHead(torch.eye(example.own, dtype=torch.float64), None, example.own)
    results = []
    for chunk_tokens in (64, size):
        hidden = example.logits.clone().requires_grad_()
        objective = SimCT(chunk_tokens=chunk_tokens)
        tokens = make_tokens(example.ids, torch.zeros(6))
        asked = objective.request()
        found = compare_in_chunks(hidden, head, objective, example.scores(), tokens, asked=asked, facts_k=2)
        found.losses.sum().backward()
        results.append([found.losses.detach(), hidden.grad])
        assert found.facts["sampled_log_ratio"].isnan().tolist() == [False, True, True, True, True, True]
    torch.testing.assert_close(*results)
    with pytest.raises(ValueError, match=r"objective.chunk_tokens=1: a unit of text has more tokens"):
        compare_in_chunks(
            example.logits, head, SimCT(chunk_tokens=1), example.scores(), tokens, asked=SimCT().request()
        )


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"objective.averaged: expected one of log_probs, logits, got 'mean'"):
        SimCT("mean")
    with pytest.raises(ValueError, match=r"objective.least_teacher_mass: expected a mass in \[0, 1\)"):
        SimCT(least_teacher_mass=1.0)


# ------------------------------------------------------------------------------------------------------ real tokenizers

LINES = ["the cat sat on the mat", "12 + 34 = 46, so 46 it is", "naïve cafés — 日本語", "the mats that cats sat on"]
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]


def make_byte_level(size, normalizer=None, end="<|im_end|>"):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if normalizer is not None:
        core.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [*SPECIAL[:2], end]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(LINES * 4, trainer)
    return fast(core, end)


def make_metaspace(size):
    """As Llama's: a space is written ▁ and put in front of a text, and what is not known is spelt in bytes."""
    import json

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    core.train_from_iterator([line for line in LINES * 4 if line.isascii()], trainer)
    state = json.loads(core.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    state["model"] |= {"byte_fallback": True, "vocab": vocabulary}
    core = Tokenizer.from_str(json.dumps(state))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast(core, SPECIAL[2])


def fast(core, end):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=end,
        pad_token=SPECIAL[0],
        additional_special_tokens=SPECIAL[1:2],
        chat_template=CHAT_TEMPLATE.replace("<|im_end|>", end),
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A student and teachers, each with a tokenizer of its own."""
    from tokenizers import normalizers

    tokenizers = {
        "student": make_byte_level(300),
        "byte_level": make_byte_level(330, end="<|end|>"),
        "metaspace": make_metaspace(60),
        "lower": make_byte_level(290, normalizers.Lowercase()),
    }
    made = {}
    for seed, (name, tokenizer) in enumerate(tokenizers.items()):
        model = make_model(seed=seed, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
        made[name] = str(save_folder(tmp_path_factory.mktemp(name), model, tokenizer))
    return made


def rollout_of(student, token_ids, finished=True, **options):
    problem = Problem("train/7", ({"role": "user", "content": "the cat?"},))
    ids = [*token_ids, student.tokenizer.closing_id] if finished else list(token_ids)
    prompt = torch.tensor(student.tokenizer.render(problem.messages))
    return Rollout(problem, prompt, torch.tensor(ids), torch.zeros(len(ids)), finished=finished, seed=0, **options)


def reader_of(folders, name, student="student"):
    teacher = CrossTokenizerTeacher(folders[name], dtype="float32")
    teacher.preflight(HFStudent(folders[student]))
    return teacher._reader


@pytest.mark.parametrize(
    ("who", "name"),
    [("student", "byte_level"), ("student", "metaspace"), ("student", "student"), ("metaspace", "byte_level")],
)
def test_real_answers_are_aligned_to_the_last_byte(folders, who, name):
    student, reader = HFStudent(folders[who]), reader_of(folders, name, who)
    own, other = student.tokenizer.token_bytes(), reader.teacher.token_bytes()
    generator = random.Random(1)
    ascii_tokens = [i for i, text in own.items() if text.isascii()]
    texts = [*LINES, " two spaces  before", "\n\nthe", "🙂 x"]
    answers = [student.tokenizer.encode(text) for text in texts]
    answers += [generator.choices(ascii_tokens, k=9) for _ in range(30)]
    letters = {text: i for i, text in own.items()}
    answers.append([letters[letter.encode()] for letter in "the cats"])  # no tokenizer writes so
    num_units = []
    for answer in answers:
        reading = reader.align(rollout_of(student, answer))
        ids = reading.rollout.response_ids.tolist()
        assert reading.cells[-1] == (1, 1) and ids[-1] == reader.teacher.closing_id
        i = j = 0
        for mine, theirs in reading.cells[:-1]:
            left = b"".join(own[n] for n in answer[i : i + mine])
            right = b"".join(other[n] for n in ids[j : j + theirs])
            assert left == right or (j == 0 and right == b" " + left)  # metaspace puts one in front
            i, j = i + mine, j + theirs
        assert (i, j) == (len(answer), len(ids) - 1)
        num_units.append(len(reading.cells) - 1 < len(answer))
    assert any(num_units)
    shared = {own.get(i) for i in reader.shared_ids[0].tolist()}
    assert b"the" in shared or b" the" in shared  # Ġ and ▁ are the same space


def test_a_teacher_of_the_same_tokenizer_shares_every_token(folders):
    ours, theirs = reader_of(folders, "student").shared_ids
    assert torch.equal(ours, theirs) and len(ours) == HFStudent(folders["student"]).tokenizer.vocab_size
    ours, theirs = reader_of(folders, "byte_level").shared_ids
    assert len(set(theirs.tolist())) == len(ours) >= 256


@pytest.mark.parametrize("name", ["byte_level", "metaspace", "student"])
def test_scores_are_the_teacher_s_own_on_its_own_tokens(folders, name):
    student = HFStudent(folders["student"])
    teacher = CrossTokenizerTeacher(folders[name], dtype="float32")
    teacher.setup(student, torch.nn.Module(), CPU)
    answers = [student.tokenizer.encode(text) for text in LINES[:3]]
    rollouts = [rollout_of(student, answers[0]), rollout_of(student, answers[2][:-1], False), rollout_of(student, [])]
    batch = collate(rollouts, student.tokenizer.pad_id)
    scores = teacher.score(batch, SimCT().request())
    model = student.load()
    asked = compare_in_chunks(
        student.hidden_states(model, batch), student.head(model), SimCT(), scores, batch.tokens, asked=teacher.offer
    )
    assert asked.losses.isfinite().all() and asked.losses.sum() >= 0
    # the first unit of the first answer, read alone
    reading = teacher._reader.align(rollouts[0])
    own = HFTeacher(folders[name], dtype="float32")
    own.setup(HFStudent(folders[name]), torch.nn.Module(), CPU)
    full = own.score(collate([reading.rollout], 0), ScoreRequest(full_vocabulary=True)).full()
    ids, size = reading.rollout.response_ids, reading.cells[0][1]
    expected = full[range(size), ids[:size]].mean()
    torch.testing.assert_close(scores.at_units("log_probs")[0, -1], expected)
    torch.testing.assert_close(scores.at_units("log_probs")[0, :-1], full[0, scores.shared.teacher_ids])
    if name == "student":  # the same weights and the same words
        torch.testing.assert_close(asked.losses, torch.zeros_like(asked.losses), atol=1e-5, rtol=0)


def test_a_character_that_the_limit_cuts_is_left_out(folders):
    student, reader = HFStudent(folders["student"]), reader_of(folders, "byte_level")
    answer = student.tokenizer.encode("ok 🙂")
    reading = reader.align(rollout_of(student, answer[:-1], False))
    text = b"".join(student.tokenizer.token_bytes()[i] for i in answer[: sum(own for own, _ in reading.cells)])
    assert text in (b"ok", b"ok ") and reading.num_tokens == len(answer) - 1


def test_what_cannot_be_aligned_is_refused_in_one_line(folders):
    student = HFStudent(folders["student"])
    byte = {text: i for i, text in student.tokenizer.token_bytes().items()}
    teacher = CrossTokenizerTeacher(folders["byte_level"], dtype="float32")
    teacher.setup(student, torch.nn.Module(), CPU)
    cases = {
        "its bytes are no UTF-8 at byte 1": rollout_of(student, [byte[b"a"], byte[b"\xff"], byte[b"b"]]),
        "the student's token 1 is no text": rollout_of(student, [byte[b"a"], 1, byte[b"b"]]),
        "it has several turns": rollout_of(student, [byte[b"a"]], student_wrote=torch.tensor([True, False])),
    }
    for message, rollout in cases.items():
        batch = collate([rollout], 0)
        with pytest.raises(ValueError, match=message) as caught:
            teacher.score(batch, teacher.offer)
        assert "\n" not in str(caught.value) and "problem 'train/7'" in str(caught.value)
        lenient = CrossTokenizerTeacher(folders["byte_level"], dtype="float32", skip_unaligned=True)
        lenient.setup(student, torch.nn.Module(), CPU)
        with pytest.warns(UserWarning, match=r"left out of the loss"):
            scores = lenient.score(batch, teacher.offer)
        assert scores.num_tokens == batch.num_tokens and not scores.units.num_tokens.any()
    with pytest.raises(ValueError, match=r"changes text, so student and teacher cannot be aligned: it reads b.let x"):
        reader_of(folders, "lower")
    with pytest.raises(Unreadable, match=r"which is no text"):
        reader_of(folders, "byte_level").read("a <|end|> b")


def test_teacher_and_objective_must_both_speak_of_units(folders):
    teacher = CrossTokenizerTeacher(folders["byte_level"])
    for objective in (DivergenceObjective(),):
        with pytest.raises(ValueError, match=r"CrossTokenizerTeacher cannot give"):
            teacher.check(objective.request())
    with pytest.raises(ValueError, match=r"scores units of text.*Set objective: SimCT"):
        teacher.check(ScoreRequest())
    with pytest.raises(ValueError, match=r"HFTeacher cannot give .*units of text that two tokenizers share"):
        HFTeacher(folders["byte_level"]).check(SimCT().request())
    teacher.check(SimCT().request())
    assert teacher.as_student() is None
    with pytest.raises(ValueError, match=r"would answer in other tokens"):
        teacher.as_answerer(HFStudent(folders["student"]))


def test_closing_tokens_can_be_named(folders):
    student = HFStudent(folders["student"])
    with pytest.raises(ValueError, match=r"teacher.closing_tokens: expected two"):
        CrossTokenizerTeacher(folders["byte_level"], closing_tokens=["a"])
    teacher = CrossTokenizerTeacher(folders["byte_level"], closing_tokens=["<|im_end|>", "<|im_end|>"])
    with pytest.raises(ValueError, match=r"'<.im_end.>' is no token of the teacher"):
        teacher.preflight(student)
    teacher = CrossTokenizerTeacher(folders["byte_level"], closing_tokens=["<|im_end|>", "<|im_start|>"])
    teacher.preflight(student)
    assert teacher._reader.closing == (2, 1)


def test_tokenizers_of_other_kinds_are_refused():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    from opd_lightning.backends.hf.token_bytes import bytes_of_tokens

    core = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    core.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match=r"teacher.path: its tokenizer decodes by WordPiece"):
        bytes_of_tokens(PreTrainedTokenizerFast(tokenizer_object=core), "teacher")
