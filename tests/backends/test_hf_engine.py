"""The rollout engine: against transformers' own generation, against a full forward, and alone against in company."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from conftest import END_OF_TEXT, END_OF_TURN, VOCAB_SIZE, make_model, make_tokenizer, save_folder
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, GenerationConfig

from opd_lightning.backends.hf import HFEngine, HFStudent, LoraSettings
from opd_lightning.interfaces import Problem, Prompt, Sampling, Task
from opd_lightning.randomness import derive_seed
from opd_lightning.rollouts.answering import grade
from opd_lightning.rollouts.batching import collate

NEVER = [VOCAB_SIZE - 1]  # a stop id rare enough to let responses run to the end


def make_prompt(length: int, num_seeds: int = 1, name: int = 0) -> Prompt:
    generator = torch.Generator().manual_seed(derive_seed("prompt", length, name) % 2**31)
    token_ids = torch.randint(7, VOCAB_SIZE, (length,), generator=generator).tolist()
    problem = Problem(uid=f"p/{length}/{name}", messages=({"role": "user", "content": "?"},), answer="")
    return Prompt(problem, tuple(token_ids), tuple(derive_seed(length, name, i) for i in range(num_seeds)))


PROMPTS = [make_prompt(length, name=i) for i, length in enumerate([5, 11, 3, 11, 8, 1, 14])]


def make_engine(student: HFStudent, model: torch.nn.Module, **options) -> HFEngine:
    engine = HFEngine(**options)
    engine.setup(student, torch.device("cpu"))
    engine.sync(model, 7)
    return engine


@pytest.fixture
def student(tiny_qwen3_folder):
    """In float64, so that what differs by more than rounding shows."""
    return HFStudent(str(tiny_qwen3_folder), dtype="float64")


@pytest.fixture
def model(student):
    return student.load()


def assert_same(first, second, atol: float = 1e-5) -> None:
    """Same tokens, and log-probabilities equal to rounding."""
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.problem.uid == other.problem.uid
        assert one.seed == other.seed
        assert one.response_ids.tolist() == other.response_ids.tolist()
        assert one.finished == other.finished
        torch.testing.assert_close(one.log_probs, other.log_probs, atol=atol, rtol=0)


def forward_log_probs(student, model, rollout, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of a response in one unpadded forward without a cache."""
    ids = torch.cat([rollout.prompt_ids, rollout.response_ids])[None]
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1, : student.tokenizer.vocab_size]
    log_probs = (logits.double() / temperature).log_softmax(-1)
    return log_probs.gather(-1, rollout.response_ids[:, None]).squeeze(-1).float()


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma2", "mistral", "granite"])
def test_greedy_equals_transformers_generate(tmp_path, architecture):
    options = {"sliding_window": 6} if architecture in ("gemma2", "mistral") else {}
    folder = save_folder(tmp_path, make_model(architecture, seed=3, **options), make_tokenizer())
    student = HFStudent(str(folder))
    model = student.load()
    sampling = Sampling(max_new_tokens=24, temperature=0)
    rollouts = make_engine(student, model).generate(PROMPTS, sampling)
    for prompt, rollout in zip(PROMPTS, rollouts, strict=True):
        expected = model.eval().generate(
            torch.tensor([prompt.token_ids]),
            attention_mask=torch.ones(1, len(prompt.token_ids), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=[END_OF_TURN, END_OF_TEXT],
            pad_token_id=0,
        )
        assert rollout.response_ids.tolist() == expected[0, len(prompt.token_ids) :].tolist()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=20),
        Sampling(max_new_tokens=20, temperature=0.7),
        Sampling(max_new_tokens=20, top_k=5, top_p=0.9),
        Sampling(max_new_tokens=20, temperature=0),
    ],
    ids=str,
)
def test_log_probs_match_a_full_forward(student, model, sampling):
    prompts = [make_prompt(length, num_seeds=3, name=1) for length in (4, 9, 15)]
    for rollout in make_engine(student, model).generate(prompts, sampling):
        expected = forward_log_probs(student, model, rollout, sampling.temperature or 1.0)
        torch.testing.assert_close(rollout.log_probs, expected, atol=1e-5, rtol=0)


def test_log_probs_match_a_full_forward_in_float32_too(tiny_qwen3_folder):
    student = HFStudent(str(tiny_qwen3_folder))
    model = student.load()
    for rollout in make_engine(student, model).generate(PROMPTS, Sampling(max_new_tokens=20)):
        torch.testing.assert_close(rollout.log_probs, forward_log_probs(student, model, rollout), atol=1e-4, rtol=0)


def test_log_probs_match_what_training_computes(student, model):
    rollouts = make_engine(student, model).generate(PROMPTS, Sampling(max_new_tokens=12))
    for side in ("left", "right"):
        batch = collate(rollouts, student.tokenizer.pad_id, side=side)
        with torch.no_grad():
            log_probs = student.head(model)(student.hidden_states(model, batch)).log_softmax(-1)
        torch.testing.assert_close(
            log_probs.gather(-1, batch.tokens.ids[:, None]).squeeze(-1).float(),
            batch.tokens.rollout_log_probs,
            atol=1e-5,
            rtol=0,
        )


@pytest.mark.parametrize("max_batch_size", [1, 3, 8, 256])
def test_a_sample_depends_on_its_seed_and_not_on_its_company(student, model, max_batch_size):
    prompts = [make_prompt(length, num_seeds=1 + i % 3, name=2) for i, length in enumerate([6, 2, 13, 9, 6])]
    sampling = Sampling(max_new_tokens=30, temperature=0.9)
    together = make_engine(student, model, max_batch_size=max_batch_size).generate(prompts, sampling)
    alone = [
        rollout
        for prompt in prompts
        for seed in prompt.seeds
        for rollout in make_engine(student, model).generate(
            [Prompt(prompt.problem, prompt.token_ids, (seed,))], sampling
        )
    ]
    assert_same(together, alone)
    lengths = {len(rollout.response_ids) for rollout in together}
    assert len(lengths) > 3  # rows did close at different times, so some were dropped on the way


def test_order_of_prompts_and_seeds_does_not_matter(student, model):
    prompts = [make_prompt(length, num_seeds=2, name=3) for length in (6, 2, 13, 9)]
    engine, sampling = make_engine(student, model), Sampling(max_new_tokens=16)
    forward = engine.generate(prompts, sampling)
    turned = [Prompt(p.problem, p.token_ids, p.seeds[::-1]) for p in reversed(prompts)]
    assert_same(forward, engine.generate(turned, sampling)[::-1])


def test_same_seed_same_sample_other_seed_other_sample(student, model):
    engine, sampling = make_engine(student, model), Sampling(max_new_tokens=16)
    prompt = make_prompt(7, num_seeds=4)
    first, second = engine.generate([prompt], sampling), engine.generate([prompt], sampling)
    assert_same(first, second, atol=0)
    assert len({tuple(rollout.response_ids.tolist()) for rollout in first}) == 4


def test_first_tokens_follow_the_models_distribution(student, model):
    num_samples = 4000
    prompt = make_prompt(6, num_seeds=num_samples)
    rollouts = make_engine(student, model, max_batch_size=2000).generate([prompt], Sampling(max_new_tokens=1))
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([prompt.token_ids])).logits[0, -1]
    expected = logits.double().softmax(-1) * num_samples
    counts = torch.bincount(torch.cat([rollout.response_ids for rollout in rollouts]), minlength=VOCAB_SIZE).double()
    common = expected > 5
    chi_square = float(((counts - expected) ** 2 / expected)[common].sum())
    freedom = int(common.sum())
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_every_stop_id_closes_and_nothing_follows(student, model):
    stop_ids = [20, 30, 40, 50]
    prompts = [make_prompt(5, num_seeds=64)]
    rollouts = make_engine(student, model).generate(prompts, Sampling(max_new_tokens=40, stop_ids=stop_ids))
    closing = set()
    for rollout in rollouts:
        ids = rollout.response_ids.tolist()
        assert len(rollout.log_probs) == len(ids) <= 40
        assert not set(ids[:-1]) & set(stop_ids)
        assert rollout.finished == (ids[-1] in stop_ids)
        if rollout.finished:
            closing.add(ids[-1])
        else:
            assert len(ids) == 40
    assert len(closing) > 1


def test_stop_ids_come_from_the_student_by_default(student, model):
    assert student.tokenizer.stop_ids == (END_OF_TEXT, END_OF_TURN)
    rollouts = make_engine(student, model).generate([make_prompt(5, num_seeds=64)], Sampling(max_new_tokens=60))
    closing = {int(rollout.response_ids[-1]) for rollout in rollouts if rollout.finished}
    assert closing == {END_OF_TEXT, END_OF_TURN}


def test_pad_may_equal_a_stop_id(tmp_path):
    tokenizer = make_tokenizer(pad_token="<|im_end|>")
    student = HFStudent(str(save_folder(tmp_path, make_model(seed=1), tokenizer)), dtype="float64")
    assert student.tokenizer.pad_id in student.tokenizer.stop_ids
    model = student.load()
    rollouts = make_engine(student, model).generate(
        [*PROMPTS, make_prompt(4, num_seeds=32)], Sampling(max_new_tokens=30)
    )
    finished = [rollout for rollout in rollouts if rollout.finished]
    assert any(rollout.response_ids[-1] == END_OF_TURN for rollout in finished)
    for rollout in rollouts:
        torch.testing.assert_close(rollout.log_probs, forward_log_probs(student, model, rollout), atol=1e-5, rtol=0)


def test_padded_vocabulary_rows_are_never_sampled(tmp_path):
    model = make_model(seed=4, vocab_size=VOCAB_SIZE + 40)
    with torch.no_grad():
        model.lm_head.weight[VOCAB_SIZE:] *= 50  # the padding would win nearly always
    student = HFStudent(str(save_folder(tmp_path, model, make_tokenizer())), dtype="float64")
    loaded = student.load()
    for temperature in (0.0, 1.0):
        sampling = Sampling(max_new_tokens=20, temperature=temperature, stop_ids=NEVER)
        for rollout in make_engine(student, loaded).generate(PROMPTS, sampling):
            assert int(rollout.response_ids.max()) < VOCAB_SIZE
            expected = forward_log_probs(student, loaded, rollout)
            torch.testing.assert_close(rollout.log_probs, expected, atol=1e-5, rtol=0)


def test_modes_settings_and_random_state_are_left_as_they_were(student, model):
    model.model.layers[1].eval()
    model.config.use_cache = False
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    rollouts = make_engine(student, model).generate(PROMPTS, Sampling(max_new_tokens=5))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is False
    assert not any(rollout.log_probs.requires_grad or rollout.log_probs.is_inference() for rollout in rollouts)


def test_dropout_is_off_while_generating(tmp_path):
    folder = save_folder(tmp_path, make_model(seed=1, attention_dropout=0.5), make_tokenizer())
    student = HFStudent(str(folder), dtype="float64")
    model = student.load()
    assert model.training
    rollouts = make_engine(student, model).generate(PROMPTS, Sampling(max_new_tokens=10))
    for rollout in rollouts:
        torch.testing.assert_close(rollout.log_probs, forward_log_probs(student, model, rollout), atol=1e-5, rtol=0)


@pytest.mark.parametrize("lora", [None, LoraSettings(r=4, dropout=0.3)], ids=["whole", "lora"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16 autocast"])
def test_generation_between_training_steps(tiny_qwen3_folder, lora, precision):
    """Checkpointing, adapters and autocast on; gradients flow after generation and the next rollouts see the update."""
    student = HFStudent(str(tiny_qwen3_folder), lora=lora, gradient_checkpointing=True)
    model = student.load()
    autocast = nullcontext() if precision == "float32" else torch.autocast("cpu", dtype=torch.bfloat16)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sampling = Sampling(max_new_tokens=10)
    with autocast:
        rollouts = make_engine(student, model).generate(PROMPTS, sampling)
        batch = collate(rollouts, student.tokenizer.pad_id)
        logits = student.head(model)(student.hidden_states(model, batch))
        logits.log_softmax(-1).gather(-1, batch.tokens.ids[:, None]).mean().backward()
        assert all(parameter.grad is not None for parameter in trained)
        with torch.no_grad():
            for parameter in trained:
                parameter += 0.5 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
                )
        after = make_engine(student, model).generate(PROMPTS, sampling)
    with autocast:  # a fresh context has no cached casts: the truth
        again = make_engine(student, model).generate(PROMPTS, sampling)
    assert_same(after, again)
    assert any(one.response_ids.tolist() != two.response_ids.tolist() for one, two in zip(rollouts, after, strict=True))
    if precision == "float32":
        for rollout in after:
            torch.testing.assert_close(rollout.log_probs, forward_log_probs(student, model, rollout), atol=1e-4, rtol=0)


def test_under_autocast_weights_are_cast_once_per_call(tiny_qwen3_folder):
    """Even where, as under Lightning, the cache of autocast is off."""
    student = HFStudent(str(tiny_qwen3_folder))
    model = student.load()
    engine = make_engine(student, model)
    counts = []
    for num_tokens in (2, 12):
        with (
            torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False),
            profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler,
        ):
            engine.generate(PROMPTS[:1], Sampling(max_new_tokens=num_tokens, stop_ids=NEVER))
            assert not torch.is_autocast_cache_enabled()
        head = list(model.lm_head.weight.shape)
        events = profiler.events()
        counts.append(sum(e.name == "aten::_to_copy" and e.input_shapes[:1] == [head] for e in events))
    assert counts == [1, 1]


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_under_autocast_the_cache_has_its_dtype_and_says_what_training_says(tmp_path, monkeypatch, architecture, dtype):
    student = HFStudent(
        str(save_folder(tmp_path, make_model(architecture, seed=3), make_tokenizer())),
        dtype=dtype,
        lora=LoraSettings(r=2),
    )
    model = student.load()
    caches, update = [], DynamicCache.update

    def seen(self, *args, **kwargs):
        caches.append(self)
        return update(self, *args, **kwargs)

    monkeypatch.setattr(DynamicCache, "update", seen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rollouts = make_engine(student, model).generate(PROMPTS, Sampling(max_new_tokens=16, stop_ids=NEVER))
        batch = collate(rollouts, student.tokenizer.pad_id)
        with torch.no_grad():
            log_probs = student.head(model)(student.hidden_states(model, batch)).log_softmax(-1)
    tensors = [tensor for cache in caches for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    mismatch = log_probs.gather(-1, batch.tokens.ids[:, None]).squeeze(-1) - batch.tokens.rollout_log_probs
    assert mismatch.abs().mean() < 0.03


def test_without_autocast_the_cache_has_the_dtype_of_the_weights(student, model, monkeypatch):
    dtypes, update = set(), DynamicCache.update

    def seen(self, *args, **kwargs):
        grown = update(self, *args, **kwargs)
        dtypes.update(tensor.dtype for tensor in grown)
        return grown

    monkeypatch.setattr(DynamicCache, "update", seen)
    make_engine(student, model).generate(PROMPTS, Sampling(max_new_tokens=3))
    assert dtypes == {torch.float64}


def test_without_stop_ids_only_the_length_ends_a_response(tmp_path):
    tokenizer = make_tokenizer(eos_token=None, pad_token=None)
    folder = save_folder(tmp_path / "model", make_model(seed=1, eos_token_id=None), tokenizer, eos_token_id=[])
    student = HFStudent(str(folder))
    model = student.load()
    engine = make_engine(student, model)
    for rollout in engine.generate(PROMPTS, Sampling(max_new_tokens=20, stop_ids=[])):
        assert len(rollout.response_ids) == 20
        assert not rollout.finished
        assert rollout.text == student.tokenizer.decode(rollout.response_ids.tolist(), skip_special_tokens=False)
    closed = engine.generate(PROMPTS, Sampling(max_new_tokens=40, stop_ids=[20, 30, 40]))
    assert any(rollout.finished for rollout in closed)
    with pytest.raises(
        ValueError, match=r"sampling\.stop_ids: the student's tokenizer names no token .*, or \[\] to let"
    ):
        engine.generate(PROMPTS, Sampling(max_new_tokens=20))
    student.save(model, tmp_path / "out")
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    assert settings.eos_token_id is None
    assert HFStudent(str(tmp_path / "out")).tokenizer.stop_ids == ()


def test_graders_read_tokens_that_are_called_special(tmp_path):
    """A tokenizer may pad with a token that answers are made of."""
    tokenizer = make_tokenizer(pad_token="0")
    student = HFStudent(str(save_folder(tmp_path, make_model(seed=1), tokenizer)))
    model = student.load()
    zero = student.tokenizer.vocabulary["0"]
    assert student.tokenizer.pad_id == zero
    with torch.no_grad():  # it always says 0, whatever it is asked
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(100.0 * torch.nn.functional.one_hot(torch.tensor(zero), VOCAB_SIZE))
    rollouts = make_engine(student, model).generate(PROMPTS, Sampling(max_new_tokens=3))
    assert {rollout.text for rollout in rollouts} == {"000"}
    assert [rollout.reward for rollout in grade(ZeroTask(), rollouts)] == [1.0] * len(PROMPTS)


class ZeroTask(Task):
    """Say 000."""

    def problems(self, split):
        return []

    def grade(self, problem, response):
        return float(response == "000")


def test_a_model_that_transformers_does_not_know_needs_another_engine(student):
    engine = HFEngine()
    engine.setup(student, torch.device("cpu"))
    message = (
        r"data\.engine: HFEngine generates with transformers models, but HFStudent trains a Linear\. Use PlainEngine"
    )
    with pytest.raises(ValueError, match=message):
        engine.sync(torch.nn.Linear(2, 2), 0)


def test_rollouts_carry_what_was_asked(student, model):
    prompts = [make_prompt(6, num_seeds=2), make_prompt(3, num_seeds=0), make_prompt(9, num_seeds=1)]
    engine = make_engine(student, model)
    assert engine.weight_version == 7
    rollouts = engine.generate(prompts, Sampling(max_new_tokens=8))
    assert [rollout.problem.uid for rollout in rollouts] == ["p/6/0", "p/6/0", "p/9/0"]
    assert [rollout.seed for rollout in rollouts] == [*prompts[0].seeds, *prompts[2].seeds]
    for rollout in rollouts:
        assert rollout.prompt_ids.tolist() == list(make_prompt(len(rollout.prompt_ids)).token_ids)
        assert rollout.response_ids.dtype == torch.int64
        assert rollout.log_probs.dtype == torch.float32
        written = rollout.response_ids.tolist()[: -1 if rollout.finished else None]
        assert rollout.text == student.tokenizer.decode(written, skip_special_tokens=False)
    assert engine.generate([], Sampling(max_new_tokens=8)) == []


def test_a_prompt_that_leaves_no_room_is_named(student, model):
    engine = make_engine(student, model)
    engine.generate([make_prompt(120)], Sampling(max_new_tokens=8))
    with pytest.raises(ValueError, match=r"problem 'p/121/0': 121 prompt tokens .*max_new_tokens=8 .* 128 tokens"):
        engine.generate([make_prompt(5), make_prompt(121)], Sampling(max_new_tokens=8))
    with pytest.raises(ValueError, match=r"problem 'p/0/0': the prompt is empty"):
        engine.generate([make_prompt(0)], Sampling(max_new_tokens=8))


def test_stop_ids_outside_the_vocabulary_are_refused(student, model):
    with pytest.raises(ValueError, match=rf"sampling\.stop_ids: expected .* {VOCAB_SIZE - 1}, got \[{VOCAB_SIZE}\]"):
        make_engine(student, model).generate(PROMPTS, Sampling(stop_ids=[2, VOCAB_SIZE]))


def test_broken_weights_are_reported(student, model):
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"not finite at response token 0 of problem 'p/1/5'.*learning rate"):
        make_engine(student, model).generate(PROMPTS, Sampling(max_new_tokens=4))
    assert model.training


def test_batch_size_must_be_positive():
    with pytest.raises(ValueError, match=r"engine\.max_batch_size: expected an integer of at least 1, got 0"):
        HFEngine(max_batch_size=0)
