"""Make the sandbox models: `python -m opd_lightning.sandbox.make --output DIR --seed 0`.

A base model learns to write right solutions. The student is the base tuned on the work of a careless pupil, who does
not carry or borrow in about half of the steps; the teacher is the student tuned on right solutions again. So both lay
out their work alike, and the student errs where the teacher does not. One thread and seeded draws make the run
repeatable: the same machine and the same versions give the same bytes. Takes about 15 minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opd_lightning.interfaces import Problem, Task
from opd_lightning.sandbox.tokenizer import END_OF_TEXT, build_tokenizer
from opd_lightning.tasks.arithmetic import NUM_LEVELS, ArithmeticTask, calculate, draw_expression, split_expression

BATCH_SIZE = 64
CARELESSNESS = 0.55
CARD = """---
library_name: transformers
license: apache-2.0
pipeline_tag: text-generation
---
# The {name} of the opd_lightning sandbox

A {num_parameters:,}-parameter Qwen3 that works out sums one step at a time: `17+25-8=` is answered by
`17+25=42;42-8=34;#34`. {story}

| fact | value |
|---|---|
| sampled accuracy (temperature 1) | {sampled:.1%} |
| greedy accuracy | {greedy:.1%} |
| measured on | {num_problems} test problems of `ArithmeticTask(seed=0)`, levels 1 to 4, kept out of the training data |
| made by | `python -m opd_lightning.sandbox.make {history}` |
| torch | {torch_version} |
| sha256 of model.safetensors | {digest} |
"""


def misjudge(left: int, sign: str, right: int) -> int:
    """Return the result of a pupil who never carries and never borrows: 17+25=32, 42-17=35 and 13*4=42."""
    if sign == "-":
        return (left // 10 - right // 10) * 10 + abs(left % 10 - right % 10)
    units = calculate(left % 10, sign, right if sign == "*" else right % 10)
    return calculate(left, sign, right) - units // 10 * 10


def write_solution(expression: str, carelessness: float, rng: random.Random) -> str:
    """Work the expression out, careless in that share of the steps, going on from whatever number came out.

    A wrong number may lead out of 0..99; the hundreds are dropped then, so that no step grows longer.
    """
    value, terms = split_expression(expression)
    written = ""
    for sign, number in terms:
        result = (misjudge if rng.random() < carelessness else calculate)(value, sign, number) % 100
        written += f"{value}{sign}{number}={result};"
        value = result
    return f"{written}#{value}"


def draw_batches(
    tokenizer: PreTrainedTokenizerFast, carelessness: float, held_out: set[str], rng: random.Random
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `batches` of the pupil's solutions; held-out expressions are left out."""

    def write() -> tuple[str, str]:
        expression = draw_expression(rng, rng.randint(1, NUM_LEVELS))
        while expression in held_out:
            expression = draw_expression(rng, rng.randint(1, NUM_LEVELS))
        return f"{expression}=", write_solution(expression, carelessness, rng)

    return batches(tokenizer, write, rng)


def batches(
    tokenizer: PreTrainedTokenizerFast, write: Callable[[], tuple[str, str]], rng: random.Random
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield right-padded conversations [B, L], rows of about one length together, and which tokens are learnt.

    Args:
        tokenizer: Of the sandbox.
        write: Gives the next question and its answer.
        rng: Shuffles the batches.
    """
    assistant = tokenizer.convert_tokens_to_ids("<|assistant|>")
    while True:
        lessons = [write() for _ in range(16 * BATCH_SIZE)]
        texts = [f"<|user|>{question}<|im_end|><|assistant|>{answer}<|im_end|>" for question, answer in lessons]
        rows = sorted(tokenizer(texts)["input_ids"], key=len)
        starts = list(range(0, len(rows), BATCH_SIZE))
        rng.shuffle(starts)
        for start in starts:
            batch = [torch.tensor(row) for row in rows[start : start + BATCH_SIZE]]
            ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=tokenizer.pad_token_id)
            is_answer = ((ids == assistant).cumsum(1) > 0) & (ids != assistant)
            yield ids, is_answer & (ids != tokenizer.pad_token_id)


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Build the randomly initialised model."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TEXT)],
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def train(
    model: Qwen3ForCausalLM,
    batches: Iterator[tuple[Tensor, Tensor]],
    num_steps: int,
    learning_rate: float,
    num_warmup_steps: int = 100,
) -> None:
    """Minimise the cross-entropy of what is learnt; linear decay over the second half."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / num_warmup_steps, 2 * (1 - step / num_steps), 1.0)
        ids, is_learnt = next(batches)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits[is_learnt[:, 1:]], ids[:, 1:][is_learnt[:, 1:]])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} of {num_steps}: loss {loss.item():.4f}", flush=True)


@torch.no_grad()
def measure_accuracy(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    *,
    sampled: bool,
    task: Task | None = None,
    max_new_tokens: int = 64,
) -> float:
    """Return the share of problems answered right, one answer each, sampled at temperature 1 or greedy."""
    torch.manual_seed(0)
    model.eval()
    prompts = tokenizer.apply_chat_template(
        [list(problem.messages) for problem in problems],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    choice = {"do_sample": True} if sampled else {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    ids = model.generate(**prompts, max_new_tokens=max_new_tokens, **choice)
    responses = tokenizer.batch_decode(ids[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    task = task if task is not None else ArithmeticTask(0, 0, 0)
    grades = [task.grade(problem, response) for problem, response in zip(problems, responses, strict=True)]
    return sum(grades) / len(grades)


def save(
    folder: Path,
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    facts: dict[str, object],
) -> None:
    """Write the model folder, tokenizer and model card included."""
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)  # a new one: a tokenizer that has padded saves that setting
    card = CARD.format(
        num_parameters=model.num_parameters(),
        sampled=measure_accuracy(model, tokenizer, problems, sampled=True),
        greedy=measure_accuracy(model, tokenizer, problems, sampled=False),
        num_problems=len(problems),
        torch_version=torch.__version__,
        digest=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        **facts,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def make(output: Path, seed: int = 0, steps: Sequence[int] = (1600, 300, 600), num_problems: int = 512) -> None:
    """Train, measure and write `output/student` and `output/teacher`; steps are those of base, student and teacher."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    rng = random.Random(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    problems = ArithmeticTask(num_train=0, num_test=num_problems).problems("test")
    validation = ArithmeticTask(num_train=0).problems("validation")
    held_out = {problem.uid.removeprefix("arithmetic/") for problem in [*problems, *validation]}
    right = draw_batches(tokenizer, 0.0, held_out, rng)
    careless = draw_batches(tokenizer, CARELESSNESS, held_out, rng)
    history = f"--seed {seed} --steps {' '.join(map(str, steps))}"

    train(model, right, steps[0], learning_rate=3e-3)
    train(model, careless, steps[1], learning_rate=1e-3)
    story = f"It learnt right sums, then a careless pupil's: no carry or borrow in {CARELESSNESS:.0%} of the steps."
    save(output / "student", model, tokenizer, problems, {"name": "student", "story": story, "history": history})
    train(model, right, steps[2], learning_rate=1e-3)
    story = "It is the sandbox student tuned on right sums again."
    save(output / "teacher", model, tokenizer, problems, {"name": "teacher", "story": story, "history": history})


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `make` from the command line."""
    parser = argparse.ArgumentParser(description="Make the sandbox student and teacher.")
    parser.add_argument("--output", type=Path, required=True, help="folder for student/ and teacher/")
    parser.add_argument("--seed", type=int, default=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, nargs=3, default=argparse.SUPPRESS, metavar=("BASE", "STUDENT", "TEACHER"))
    parser.add_argument("--num-problems", type=int, default=argparse.SUPPRESS, help="test problems to measure on")
    make(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
