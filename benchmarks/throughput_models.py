"""What the trainers in `throughput.py` train: models with random weights, words as tokens, prompts, and the least work.

All is made from configurations: nothing is downloaded.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from typing_extensions import override

from opd_lightning.interfaces import Problem, Split, Task

PAD, END, FIRST_WORD = 0, 1, 2
NUM_PROMPTS = 1024
BYTES = 4  # float32


@dataclass(frozen=True)
class Shape:
    """Of a Qwen3 model with tied embeddings.

    Attributes:
        hidden: Width.
        layers: Their number.
        intermediate: Width of the feed-forward layers.
        heads: Of attention; 0 for as many as fit into the width.
        key_value_heads: Those of keys and values; 0 for as many as `heads`.
        head_dim: Width of a head.
    """

    hidden: int
    layers: int
    intermediate: int
    heads: int = 0
    key_value_heads: int = 0
    head_dim: int = 64

    @property
    def query_width(self) -> int:
        """Of all heads of attention."""
        return self.head_dim * (self.heads or max(1, self.hidden // self.head_dim))

    @property
    def key_width(self) -> int:
        """Of all keys of a token; its values have as much."""
        return self.head_dim * self.key_value_heads or self.query_width

    @property
    def weights(self) -> list[tuple[int, int, int]]:
        """Inputs, outputs and number of the matrices of all layers, the head aside."""
        sizes = [
            (self.hidden, self.query_width, 1),
            (self.hidden, self.key_width, 2),
            (self.query_width, self.hidden, 1),
        ]
        sizes += [(self.hidden, self.intermediate, 2), (self.intermediate, self.hidden, 1)]
        return [(inputs, outputs, number * self.layers) for inputs, outputs, number in sizes]

    @property
    def body(self) -> int:
        """Weights that every token is multiplied with, the head aside."""
        attention = 2 * self.query_width + 2 * self.key_width
        return self.layers * self.hidden * (attention + 3 * self.intermediate)


@dataclass(frozen=True)
class Product:
    """[rows, inner] by [inner, columns], so many times."""

    rows: int
    inner: int
    columns: int
    times: float


@dataclass(frozen=True)
class Work:
    """One step: what is trained on what.

    Attributes:
        vocabulary: V.
        student: Its shape.
        teacher: Its shape.
        num_rollouts: Of a step.
        max_new_tokens: Of a rollout; random weights hardly ever end one earlier.
        prompt_tokens: Mean; prompts are from half of it to one and a half.
        top_k: Size of the student's list that the loss looks at; 0 for the whole vocabulary.
    """

    vocabulary: int = 32_000
    student: Shape = field(default_factory=lambda: Shape(256, 4, 704))
    teacher: Shape = field(default_factory=lambda: Shape(384, 8, 1024))
    num_rollouts: int = 16
    max_new_tokens: int = 64
    prompt_tokens: int = 16
    top_k: int = 0

    def written(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Self:
        """From JSON."""
        values = json.loads(text)
        return cls(**values | {name: Shape(**values[name]) for name in ("student", "teacher")})

    def products(self, chunk_tokens: int) -> dict[str, list[Product]]:
        """The matrix products of each part of a step, attention aside, at the sizes they have here.

        Args:
            chunk_tokens: Response tokens whose logits exist at a time in training.
        """
        n, new = self.num_rollouts, self.max_new_tokens
        rows, responses = n * (self.prompt_tokens + new), n * new
        s, t = self.student, self.teacher
        forward = [Product(rows, inner, columns, times) for inner, columns, times in s.weights]
        chunk, times = min(chunk_tokens, responses), responses / min(chunk_tokens, responses)
        return {
            "generate": [
                *(Product(n * self.prompt_tokens, inner, columns, times) for inner, columns, times in s.weights),
                *(Product(n, inner, columns, times * (new - 1)) for inner, columns, times in s.weights),
                Product(n, s.hidden, self.vocabulary, new),
            ],
            "teacher": [Product(rows, inner, columns, times) for inner, columns, times in t.weights],
            "student": [
                *forward,
                *(Product(rows, each.columns, each.inner, each.times) for each in forward),
                *(Product(each.columns, rows, each.inner, each.times) for each in forward),
                Product(chunk, s.hidden, self.vocabulary, times),
                Product(chunk, t.hidden, self.vocabulary, times),
                Product(chunk, self.vocabulary, s.hidden, times),
                Product(self.vocabulary, chunk, s.hidden, times),
            ],
        }

    def floor(self, flops: float, bandwidth: float) -> dict[str, float]:
        """Least seconds of each part of a step.

        Matrix products at the best rate that the machine was seen to reach, and bytes that must be moved at the best
        bandwidth where that takes longer (a decoding step reads all weights and the cache). Attention is counted
        without its softmax, as if it used only what it may see.

        Args:
            flops: Operations a second.
            bandwidth: Bytes a second.
        """
        n, new, s, t = self.num_rollouts, self.max_new_tokens, self.student, self.teacher
        length, responses = self.prompt_tokens + new, n * new
        head = {shape: shape.hidden * self.vocabulary for shape in (s, t)}
        seen = {shape: 2 * shape.layers * shape.query_width for shape in (s, t)}  # products for each token attended to

        generate = 2 * n * self.prompt_tokens * s.body / flops
        for position in range(self.prompt_tokens, length):
            operations = 2 * n * (s.body + head[s] + seen[s] * position)
            moved = BYTES * (s.body + head[s] + n * 2 * s.layers * s.key_width * position)
            generate += max(operations / flops, moved / bandwidth)

        def forward(shape: Shape) -> float:
            return 2 * n * length * (shape.body + seen[shape] * length / 2)

        return {
            "generate": generate,
            "teacher": forward(t) / flops,
            "student": (3 * forward(s) + 2 * responses * (3 * head[s] + head[t])) / flops,
            "optimizer": 7 * BYTES * (s.body + head[s]) / bandwidth,
        }


class WordPrompts(Task):
    """Prompts of words that mean nothing, without answers.

    Args:
        work: Says how long they are, and how many words there are.
    """

    def __init__(self, work: Work) -> None:
        self.texts = make_texts(work)

    @override
    def problems(self, split: Split) -> list[Problem]:
        return [Problem(str(i), ({"role": "user", "content": text},)) for i, text in enumerate(self.texts)]


def make_texts(work: Work) -> list[str]:
    """Prompts, always the same."""
    generator = torch.Generator().manual_seed(0)
    half = work.prompt_tokens // 2
    lengths = torch.randint(half, 3 * half + 1, (NUM_PROMPTS,), generator=generator).tolist()
    return [
        " ".join(f"w{i}" for i in torch.randint(FIRST_WORD, work.vocabulary, (n,), generator=generator).tolist())
        for n in lengths
    ]


def make_tokenizer(vocabulary: int) -> Any:
    """One token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(vocab={f"w{i}": i for i in range(vocabulary)}, unk_token="w2"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=f"w{PAD}",
        eos_token=f"w{END}",
        unk_token="w2",
        padding_side="left",
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
        clean_up_tokenization_spaces=False,
    )


def make_models(
    folder: Path, work: Work, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> tuple[str, str]:
    """Write student and teacher as the hub would hold them, once; their folders.

    Args:
        folder: Where.
        work: Says what they look like.
        dtype: Of the files; None for float32.
        device: Where weights are drawn; None for the CPU.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    paths = []
    for seed, shape in enumerate((work.student, work.teacher)):
        path = folder / f"{work.vocabulary}-{shape.hidden}-{shape.layers}-{seed}"
        paths.append(str(path))
        if path.exists():
            continue
        config = Qwen3Config(
            vocab_size=work.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.query_width // shape.head_dim,
            num_key_value_heads=shape.key_width // shape.head_dim,
            head_dim=shape.head_dim,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=PAD,
        )
        with torch.random.fork_rng(), device or torch.device("cpu"):
            torch.manual_seed(seed)
            Qwen3ForCausalLM(config).to(dtype or torch.float32).save_pretrained(path)
        make_tokenizer(work.vocabulary).save_pretrained(path)
    return paths[0], paths[1]
