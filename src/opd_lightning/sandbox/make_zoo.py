"""Make the zoo: students and teachers that fit together, or do not, in known ways.

`python -m opd_lightning.sandbox.make_zoo --output runs/zoo` writes one folder per model and leaves alone what is there.
The models are made rather than shipped: all of them would be larger than the rest of the package. Each comes from one
of the sandbox's models, by lessons of its own:

| model | from | lessons | so it is |
|---|---|---|---|
| `other-notation` | teacher | right, with other signs in the steps | an incompatible teacher with a higher score |
| `half-careful` | student | careless in 10 % of the steps | a compatible teacher with a lower score |
| `mostly-careful` | student | careless in 4 % of the steps | the same, with a score not so much lower |
| `diffuse-student` | student | none, but noise in the weights | a student that hardly knows what to write |
| `small-student` | student, 3 of its 4 layers | as careless | a student whose bigger teacher knows nothing new |
| `two-templates-student` | student | as careless, two templates | a student that answers both |
| `two-templates-teacher` | that student | right, plain template only | its teacher, tuned under one of them |

All lessons are sums of two or three operations.

The same machine, versions and seed give the same bytes. One thread; about four minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from opd_lightning.sandbox import student_path, teacher_path
from opd_lightning.sandbox.make import CARELESSNESS, batches, measure_accuracy, train, write_solution
from opd_lightning.sandbox.notations import OTHER_SIGNS, NotationTask, Template, ask, expression_of, solve_otherwise
from opd_lightning.sandbox.tokenizer import build_tokenizer
from opd_lightning.tasks.arithmetic import draw_expression

MAX_LEVEL = 2
CARD = """---
library_name: transformers
license: apache-2.0
pipeline_tag: text-generation
---
# {name}, of the zoo of opd_lightning

| fact | value |
|---|---|
| parameters | {num_parameters:,} |
| sampled accuracy (temperature 1) on {num_problems} test problems of levels 1 and 2 | {accuracies} |
| made by | `python -m opd_lightning.sandbox.make_zoo --seed {seed}` |
| torch | {torch_version} |
| sha256 of model.safetensors | {digest} |
"""


@dataclass(frozen=True)
class Lessons:
    """What a model is tuned on.

    Attributes:
        num_steps: Batches of 64.
        carelessness: Share of the steps without carry or borrow.
        is_otherwise: Whether the work is written in the other notation.
        templates: How the sums are asked, drawn evenly.
        learning_rate: Peak.
    """

    num_steps: int
    carelessness: float = 0.0
    is_otherwise: bool = False
    templates: tuple[Template, ...] = ("plain",)
    learning_rate: float = 1e-3

    def writer(self, held_out: set[str], rng: random.Random) -> Callable[[], tuple[str, str]]:
        """Gives questions and answers, one after the other."""

        def write() -> tuple[str, str]:
            expression = draw_expression(rng, rng.randint(1, MAX_LEVEL))
            while expression in held_out:
                expression = draw_expression(rng, rng.randint(1, MAX_LEVEL))
            answer = (
                solve_otherwise(expression) if self.is_otherwise else write_solution(expression, self.carelessness, rng)
            )
            return ask(expression, rng.choice(self.templates)), answer

        return write


@dataclass(frozen=True)
class Recipe:
    """How a model is made.

    Attributes:
        lessons: One after the other.
        start: `student`, `teacher`, or a model of the zoo that stands before it.
        layers: Those that are kept; None: all.
        noise: Added to the weights before the lessons, in standard deviations of each matrix.
    """

    lessons: tuple[Lessons, ...]
    start: str
    layers: tuple[int, ...] | None = None
    noise: float = 0.0


RECIPES: dict[str, Recipe] = {
    "other-notation": Recipe((Lessons(120, is_otherwise=True),), "teacher"),
    "half-careful": Recipe((Lessons(100, carelessness=0.1),), "student"),
    "mostly-careful": Recipe((Lessons(100, carelessness=0.04),), "student"),
    "diffuse-student": Recipe((), "student", noise=0.5),
    "small-student": Recipe((Lessons(80, carelessness=CARELESSNESS),), "student", layers=(0, 1, 3)),
    "two-templates-student": Recipe(
        (Lessons(60, carelessness=CARELESSNESS, templates=("plain", "question")),), "student"
    ),
    "two-templates-teacher": Recipe((Lessons(60),), "two-templates-student"),
}


def make(output: Path, seed: int = 0, names: Sequence[str] = tuple(RECIPES), num_problems: int = 512) -> None:
    """Make what is missing of these models, and of those that they come from.

    Raises:
        ValueError: There is no such model.
    """
    for name in names:
        if name not in RECIPES:
            raise ValueError(f"names: expected models out of {', '.join(RECIPES)}, got {name!r}.")
        if (output / name).exists():
            continue
        start = RECIPES[name].start
        if start in RECIPES:
            make(output, seed, (start,), num_problems)
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output) as folder:  # whatever is interrupted leaves no half model
            _make(name, Path(folder) / name, output, seed, num_problems)
            (Path(folder) / name).rename(output / name)


def _make(name: str, folder: Path, output: Path, seed: int, num_problems: int) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    rng = random.Random(f"{seed}/{name}")
    tokenizer = build_tokenizer()
    recipe = RECIPES[name]
    model = _start(recipe, output)
    if any(lessons.is_otherwise for lessons in recipe.lessons):
        _teach_other_signs(model, tokenizer)
    sizes: dict[str, Any] = {"num_train": 0, "num_test": num_problems, "levels": (1, 2)}
    plain = NotationTask(**sizes)
    held_out = {expression_of(p) for split in ("test", "validation") for p in plain.problems(split)}
    if recipe.noise:
        _add_noise(model, recipe.noise)
    for lessons in recipe.lessons:
        print(f"{name}: {lessons}", flush=True)
        lesson_batches = batches(tokenizer, lessons.writer(held_out, rng), rng)
        train(model, lesson_batches, lessons.num_steps, lessons.learning_rate, num_warmup_steps=20)
    measured = {
        template: measure_accuracy(model, tokenizer, task.problems("test"), sampled=True, task=task, max_new_tokens=72)
        for template in dict.fromkeys(("plain", *(t for lessons in recipe.lessons for t in lessons.templates)))
        for task in [NotationTask(template, **sizes)]
    }
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)  # a new one: a tokenizer that has padded saves that setting
    card = CARD.format(
        name=name,
        num_parameters=model.num_parameters(),
        num_problems=num_problems,
        accuracies=", ".join(f"{template} {accuracy:.1%}" for template, accuracy in measured.items()),
        seed=seed,
        torch_version=torch.__version__,
        digest=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"{name}: {measured}", flush=True)


def _start(recipe: Recipe, output: Path) -> Qwen3ForCausalLM:
    shipped = {"student": student_path, "teacher": teacher_path}
    folder = shipped[recipe.start]() if recipe.start in shipped else output / recipe.start
    model: Qwen3ForCausalLM = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if recipe.layers is None:
        return model
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(recipe.layers)
    config.layer_types = config.layer_types[: len(recipe.layers)]
    smaller = Qwen3ForCausalLM(config)
    smaller.generation_config = model.generation_config
    model.model.layers = torch.nn.ModuleList(model.model.layers[layer] for layer in recipe.layers)
    smaller.load_state_dict(model.state_dict())
    return smaller


def _teach_other_signs(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Have the other signs begin with the embeddings of those that they stand for.

    Without it the model loses its sums with the signs: after 120 steps 1 % of the answers were right.
    """
    usual, other = (tokenizer.convert_tokens_to_ids(list(signs)) for signs in (OTHER_SIGNS, OTHER_SIGNS.values()))
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[other] = weight[usual]


def _add_noise(model: Qwen3ForCausalLM, noise: float) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight += noise * weight.std() * torch.randn_like(weight)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `make` from the command line."""
    parser = argparse.ArgumentParser(description="Make the models of the zoo that are missing.")
    parser.add_argument("--output", type=Path, required=True, help="folder for one folder per model")
    parser.add_argument("--seed", type=int, default=argparse.SUPPRESS)
    parser.add_argument("--names", nargs="+", default=argparse.SUPPRESS, metavar="NAME", help="only these")
    parser.add_argument("--num-problems", type=int, default=argparse.SUPPRESS, help="test problems to measure on")
    make(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
