"""Make the models of the long sandbox: `python -m opd_lightning.sandbox.make_long --output DIR --seed 0`.

The teacher is the short sandbox's, which can add and subtract, tuned on long ledgers, and on how to go on rightly after
a line that is wrong or missing. The student is that teacher tuned on the work of a pupil with habits: it stops at the
end of a section, has a mistake of its own in every section, and leaves entries out. Habits of a section show only to
one who reaches it: of ten answers that the student writes, about one gets to the second section, of a thousand about
one to the last. To have the student write like the pupil there too, its lessons lead past section ends that the pupil
would not have passed, in half of them on right lines; what is led is read, not learnt.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from opd_lightning.interfaces import Problem
from opd_lightning.sandbox import teacher_path
from opd_lightning.sandbox.make import measure_accuracy, train
from opd_lightning.sandbox.tokenizer import build_tokenizer
from opd_lightning.tasks.ledger import SIGNS, LedgerTask, book, draw_ledger, split_ledger

Piece = tuple[str, bool]  # some text, and whether it is learnt or only read
Writer = Callable[[str, random.Random], list[Piece]]

BATCH_SIZE = 16
LEVELS = (1, 1)  # first and last
STOPPING = 0.9  # at the end of a section
SLIPPING = (0.6, 0.85, 0.85, 0.85)  # per line, by section
SKIPPING = 0.04  # per line
FAULTS = ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), (0.5, 0.1, 0.02), (0.2, 0.1, 0.0))  # before the teacher: slip, skip, stop
SHARPENING = 2.0
CARD = """---
library_name: transformers
license: apache-2.0
pipeline_tag: text-generation
---
# The {name} of the long sandbox of opd_lightning

A {num_parameters:,}-parameter Qwen3 that books ledgers line by line: `16+23+11...=` is answered by
`16+23=39;39+11=50;...#` and the last balance. {story}

| fact | value |
|---|---|
| sampled accuracy (temperature 1) | {sampled:.1%} |
| greedy accuracy | {greedy:.1%} |
| measured on | {num_problems} test problems of `LedgerTask(seed=0)`, level 1, kept out of the training data |
| weights | bfloat16; measured in float32 |
| made by | `python -m opd_lightning.sandbox.make_long {history}` |
| torch | {torch_version} |
| sha256 of model.safetensors | {digest} |
"""


def mistake(balance: int, entry: str, section: int) -> int:
    """What the pupil makes of a line, by section: no carry, no borrow, one ten too many, the tens left alone."""
    tens, units, amount = balance // 10, balance % 10, abs(int(entry))
    if section == 0:
        return (tens + amount // 10) % 10 * 10 + (units + amount) % 10
    if section == 1:
        return (tens - amount // 10) % 10 * 10 + abs(units - amount % 10)
    if section == 2:
        return (tens + amount // 10 + 1) % 10 * 10 + (units + amount) % 10
    return tens * 10 + (units - amount) % 10


def write_pupil(ledger: str, rng: random.Random) -> list[Piece]:
    """An answer with the pupil's habits, led past up to three section ends, in half of the lessons on right lines."""
    balance, entries = split_ledger(ledger)
    led_until = rng.randrange(len(SIGNS))
    on_right_lines = rng.random() < 0.5
    pieces: list[Piece] = []
    current = 0
    for i, entry in enumerate(entries):
        section = i * len(SIGNS) // len(entries)
        is_decision = True
        if section != current:
            current = section
            if section <= led_until:
                is_decision = False
            elif rng.random() < STOPPING:
                break
        elif rng.random() < SKIPPING:
            continue
        is_led = on_right_lines and section < led_until
        slips = not is_led and rng.random() < SLIPPING[section]
        result = mistake(balance, entry, section) if slips else book(balance, entry)
        line = f"{balance:02d}{entry}="
        pieces += [(line[0], is_decision), (line[1:], True), (f"{result:02d}", not is_led), (";", True)]
        balance = result
    return [*pieces, (f"#{balance:02d}", True)]


def write_right(ledger: str, rng: random.Random) -> list[Piece]:
    """A right answer, or one that goes on rightly from lines that are wrong or missing, or from an early end."""
    balance, entries = split_ledger(ledger)
    slipping, skipping, stopping = rng.choice(FAULTS)
    pieces: list[Piece] = []
    is_decision = True
    for i, entry in enumerate(entries):
        if rng.random() < stopping:
            return [*pieces, ("#", False), (f"{balance:02d}", True)]
        if rng.random() < skipping:
            is_decision = False
            continue
        result = book(balance, entry)
        if slips := rng.random() < slipping:
            is_habit = rng.random() < 0.7
            result = mistake(balance, entry, i * len(SIGNS) // len(entries)) if is_habit else rng.randrange(100)
        pieces += [(f"{balance:02d}", True), (f"{entry}=", is_decision), (f"{result:02d}", not slips), (";", True)]
        balance, is_decision = result, True
    return [*pieces, (f"#{balance:02d}", is_decision)]


def draw_batches(
    tokenizer: PreTrainedTokenizerFast, write: Writer, held_out: set[str], rng: random.Random
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield right-padded conversations [B, L] of level 1, rows of about one length together, and what is learnt."""
    while True:
        rows: list[tuple[list[int], list[bool]]] = []
        while len(rows) < 16 * BATCH_SIZE:
            ledger = draw_ledger(rng, rng.randint(*LEVELS))
            if ledger not in held_out:
                question = f"<|user|>{ledger}=<|im_end|><|assistant|>"
                rows.append(_encode(tokenizer, [(question, False), *write(ledger, rng), ("<|im_end|>", True)]))
        rows.sort(key=lambda row: len(row[0]))
        starts = list(range(0, len(rows), BATCH_SIZE))
        rng.shuffle(starts)
        for start in starts:
            ids, is_learnt = zip(*rows[start : start + BATCH_SIZE], strict=True)
            yield _pad(ids, tokenizer.pad_token_id), _pad(is_learnt, False)


def save(
    folder: Path,
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    facts: dict[str, str],
) -> None:
    """Write the model folder in bfloat16, tokenizer and model card included."""
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    rounded.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)  # a new one: a tokenizer that has padded saves that setting
    rounded, task = rounded.float(), LedgerTask(0, 0, 0)
    card = CARD.format(
        num_parameters=model.num_parameters(),
        sampled=measure_accuracy(rounded, tokenizer, problems, sampled=True, task=task, max_new_tokens=128),
        greedy=measure_accuracy(rounded, tokenizer, problems, sampled=False, task=task, max_new_tokens=128),
        num_problems=len(problems),
        torch_version=torch.__version__,
        digest=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        **facts,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def make(output: Path, seed: int = 0, steps: Sequence[int] = (1200, 1000, 400), num_problems: int = 128) -> None:
    """Train, measure and write `output/long_teacher` (trained twice, so many steps) and `output/long_student`."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    rng = random.Random(seed)
    tokenizer = build_tokenizer()
    model = Qwen3ForCausalLM.from_pretrained(teacher_path(), dtype=torch.float32)
    problems = LedgerTask(num_train=0, num_test=num_problems).problems("test")
    validation = LedgerTask(num_train=0).problems("validation")
    held_out = {problem.uid.removeprefix("ledger/") for problem in [*problems, *validation]}
    history = f"--seed {seed} --steps {' '.join(map(str, steps))}"

    right = draw_batches(tokenizer, write_right, held_out, rng)
    for num_steps in steps[:-1]:
        train(model, right, num_steps, learning_rate=2e-3, num_warmup_steps=20)
    story = f"It is the teacher of the short sandbox tuned on long ledgers, its logits then multiplied by {SHARPENING}."
    facts = {"name": "teacher", "story": story, "history": history}
    save(output / "long_teacher", _sharpened(model), tokenizer, problems, facts)
    train(
        model, draw_batches(tokenizer, write_pupil, held_out, rng), steps[-1], learning_rate=1e-3, num_warmup_steps=20
    )
    facts |= {
        "name": "student",
        "story": "It is the teacher of the long sandbox tuned on the work of a pupil with habits.",
    }
    save(output / "long_student", model, tokenizer, problems, facts)


def _sharpened(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """A copy that is surer of the same answers: trained so shortly, it is right more often than it is sure."""
    sharpened = copy.deepcopy(model)
    with torch.no_grad():
        sharpened.model.norm.weight.mul_(SHARPENING)  # the head is linear
    return sharpened


def _encode(tokenizer: PreTrainedTokenizerFast, pieces: Sequence[Piece]) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    is_learnt: list[bool] = []
    for text, learnt in pieces:
        part = tokenizer(text)["input_ids"]
        ids += part
        is_learnt += [learnt] * len(part)
    return ids, is_learnt


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `make` from the command line."""
    parser = argparse.ArgumentParser(description="Make the teacher and the student of the long sandbox.")
    parser.add_argument("--output", type=Path, required=True, help="folder for long_teacher/ and long_student/")
    parser.add_argument("--seed", type=int, default=argparse.SUPPRESS)
    parser.add_argument(
        "--steps", type=int, nargs=3, default=argparse.SUPPRESS, metavar=("TEACHER", "AGAIN", "STUDENT")
    )
    parser.add_argument("--num-problems", type=int, default=argparse.SUPPRESS, help="test problems to measure on")
    make(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
